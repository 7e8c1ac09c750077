"""Settings of what a request may only name: files that were uploaded before, and images of other servers.

Does not know how either is kept or fetched.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from mmllm_core.config import StrictModel
from mmllm_core.models.home import home


def _absolute(folder: Path) -> Path:
    return folder.expanduser().absolute()


class FilesConfig(StrictModel):
    """Uploaded files (`/v1/files`). Several ingress replicas share the folder, wherever they run."""

    folder: Annotated[Path, AfterValidator(_absolute)] = Field(default_factory=lambda: home() / "files")
    max_bytes: int = Field(default=2_000_000_000, gt=0)
    """Of all files together, with what is kept beside them."""
    max_file_bytes: int = Field(default=25_000_000, gt=0)
    max_files: int = Field(default=2_000, gt=0)
    time_to_live_s: float | None = Field(default=30 * 86_400, gt=0)
    """How long a file is kept; None keeps it until it is deleted. An upload may ask for less."""

    @model_validator(mode="after")
    def _one_file_fits(self) -> "FilesConfig":
        if self.max_file_bytes > self.max_bytes:
            raise ValueError(f"max_file_bytes {self.max_file_bytes} is above max_bytes {self.max_bytes}")
        return self


class ImageUrlsConfig(StrictModel):
    """Images that a chat names by an https URL; the service fetches them from public addresses alone."""

    ports: tuple[Annotated[int, Field(gt=0, lt=65536)], ...] = Field(default=(443,), min_length=1)
    """That may be connected to."""
    max_bytes: int = Field(default=10_000_000, gt=0)
    timeout_s: float = Field(default=10.0, gt=0)
    """From looking the host up to the last byte."""
    max_fetches: int = Field(default=8, gt=0)
    """At a time, in one ingress replica."""
