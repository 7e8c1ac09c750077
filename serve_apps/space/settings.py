"""What a Space is told, by its variables and secrets: which bundle it runs, or which service it asks.

In: environment variables. Out: checked settings. Loads nothing.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import field_validator, model_validator

from mmllm_core.bundle import Bundle
from mmllm_core.config import StrictModel, parse_config
from mmllm_core.errors import ConfigError

VARIABLES = {
    "bundle": "MMLLM_BUNDLE",
    "base_url": "MMLLM_BASE_URL",
    "api_key": "MMLLM_API_KEY",
    "model": "MMLLM_MODEL",
}
UPLOADED = Path("bundle")
"""Where a bundle lies that is uploaded with the Space."""
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


class SpaceSettings(StrictModel):
    """Settings of a Space; without any, it runs the bundle that was uploaded with it."""

    bundle: str | None = None
    """A folder, or a repository of the hub: `owner/name`, and `@revision` behind it if it shall not move."""
    base_url: str | None = None
    """A service to ask, instead of a bundle."""
    api_key: str | None = None
    """Of that service. Whoever may see the Space asks by it."""
    model: str | None = None
    """That is asked for there; the first that is served if None."""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> "SpaceSettings":
        """What the environment says.

        Raises:
            ConfigError: settings that cannot be, or not together.
        """
        told = {field: environment[name] for field, name in VARIABLES.items() if environment.get(name)}
        return parse_config(cls, told, "the Space's variables")

    @classmethod
    def of_options(cls, **options: str | None) -> "SpaceSettings":
        """What the options of a command say.

        Raises:
            ConfigError: settings that cannot be, or not together.
        """
        return parse_config(cls, options, "the Space")

    @field_validator("base_url")
    @classmethod
    def _without_version(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("begins with http:// or https://")
        return url.rstrip("/").removesuffix("/v1") if url else None

    @model_validator(mode="after")
    def _one_source(self) -> "SpaceSettings":
        if self.bundle and self.base_url:
            raise ValueError("MMLLM_BUNDLE is run here and MMLLM_BASE_URL is asked instead: set one of them")
        if self.base_url is None and (self.api_key or self.model):
            raise ValueError("MMLLM_API_KEY and MMLLM_MODEL are for the service at MMLLM_BASE_URL: set that too")
        return self

    def open_bundle(self, folder: Path) -> Bundle:
        """Open the bundle that runs here, fetched from the hub if it lies there.

        Args:
            folder: of the Space.

        Raises:
            BundleError, WeightsError: it is damaged or cannot be had.
            ConfigError: there is none.
        """
        from mmllm_core.models.resolve import pin, resolve

        if self.bundle is None:
            if not (folder / UPLOADED).is_dir():
                raise ConfigError(
                    "this Space has no assistant: upload it with 'mmllm space deploy', or set MMLLM_BUNDLE to a "
                    "repository with a bundle or MMLLM_BASE_URL to a service"
                )
            return Bundle.open(folder / UPLOADED)
        if Path(self.bundle).is_dir():
            return Bundle.open(Path(self.bundle))
        return Bundle.open(resolve(pin(*require_repository(self.bundle))))


def require_repository(name: str) -> tuple[str, str | None]:
    """A hub repository's name and revision, from `owner/name` or `owner/name@revision`.

    Raises:
        ConfigError: it is neither.
    """
    found = _REPOSITORY.fullmatch(name)
    if not found or name.startswith("."):
        raise ConfigError(f"'{name}' is neither a folder nor a repository on the hub: owner/name, or with @revision")
    return found[1], found[2]
