"""The `data` section of a recipe: what is learned from, mixed by weight."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mmllm_core.config.reading import StrictModel
from mmllm_core.models.home import home

_PACKAGED = Path(__file__).parent.parent / "data" / "packaged"


def absolute(path: Path) -> Path:
    """As `AbsolutePath` is."""
    root = {"$MMLLM_HOME": home(), "$MMLLM_DATA": _PACKAGED}.get(path.parts[0] if path.parts else "")
    return root.joinpath(*path.parts[1:]) if root else path.expanduser().absolute()


AbsolutePath = Annotated[Path, AfterValidator(absolute)]
"""Workers of a cluster may run in other folders than the command did; a leading `$MMLLM_HOME` is the home folder,
and a leading `$MMLLM_DATA` the folder of the files that come with mmllm."""


class EasyVqaData(StrictModel):
    """easy-VQA's training questions, several about one image a conversation."""

    dataset: Literal["easy-vqa"] = "easy-vqa"
    weight: float = Field(default=1.0, gt=0)
    questions_per_image: int = Field(default=8, gt=0)
    caption_share: float = Field(default=0.0, ge=0, le=1)
    """Share of conversations that open by asking for a caption."""
    balance_kinds: bool = True
    """Draw yes/no, shape and colour questions equally often instead of as they come."""

    @property
    def label(self) -> str:
        """What sample ids and data hashes call the source."""
        return self.dataset


class FileData(StrictModel):
    """What every source that is one file of conversations says."""

    file: AbsolutePath
    weight: float = Field(default=1.0, gt=0)
    name: str | None = Field(default=None, pattern=r"^[^/\s]+$")
    """What sample ids and data hashes call the source; the file's name without its ending if it is not given."""

    @property
    def label(self) -> str:
        """What sample ids and data hashes call the source."""
        return self.name or self.file.stem


class LlavaData(FileData):
    """A file in LLaVA's format, e.g. LLaVA-Instruct-150K; `mmllm_core.data.llava` describes it."""

    dataset: Literal["llava"] = "llava"
    images: AbsolutePath | None = None
    """Folder that the file's image names start from; the file's own folder if it is not given."""

    @property
    def images_folder(self) -> Path:
        """Folder that the file's image names start from."""
        return self.images or self.file.parent


class ChatData(FileData):
    """Text conversations, one a line; `mmllm_core.data.text` describes the format."""

    dataset: Literal["chat"] = "chat"


DataSource = Annotated[EasyVqaData | LlavaData | ChatData, Field(discriminator="dataset")]


class DataConfig(StrictModel):
    """Where training conversations come from, mixed in proportion to the sources' weights."""

    sources: tuple[DataSource, ...] = Field(default=(EasyVqaData(),), min_length=1)
    streaming: bool = False
    """Read files anew each epoch, shuffled within a buffer, instead of from a memory-mapped copy of their rows."""

    @model_validator(mode="after")
    def _labels_differ(self) -> "DataConfig":
        labels = [source.label for source in self.sources]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two sources are called '{twice[0]}': give one of them another 'name'")
        return self
