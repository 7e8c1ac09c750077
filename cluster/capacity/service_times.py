"""How long each part of a request takes: one YAML, measured by `python -m tests.bench.capacity measure`.

In: a file's name or path. Out: seconds as straight lines in what a request brings along. Does not know queues: these
are times of a replica that has nothing else to do. The packaged file was measured on two CPU cores; figures of GPUs are
a user's own, and a file whose `origin` is `assumed` says so wherever its results are shown.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from mmllm_core.config import StrictModel, load_config
from mmllm_core.errors import ConfigError

_FOLDER = Path(__file__).parent / "tables"


class Hardware(StrictModel):
    """What one replica has for itself."""

    cpus: float = Field(default=0.0, ge=0)
    """Cores that are paid for; those that come with a GPU's node and its price are left out."""
    gpus: float = Field(default=0.0, ge=0)
    gpu: str = "GPU"
    """Its name in a table of prices, such as H100."""

    @property
    def amounts(self) -> dict[str, float]:
        """By the names that prices have."""
        return {name: amount for name, amount in (("cpu", self.cpus), (self.gpu, self.gpus)) if amount}


class Part(StrictModel):
    """What every deployment has."""

    hardware: Hardware
    start_seconds: float = Field(gt=0)
    """From when a replica is asked for until it answers, with a node that is there and has the image and weights."""


class IngressTimes(StrictModel):
    """HTTP, checks and passing on, there and back, of a request that nobody waits for."""

    hardware: Hardware
    seconds_per_request: float = Field(ge=0)


class VisionTimes(Part):
    """CLIP: a batch takes `seconds_per_batch` and `seconds_per_image` for each image."""

    seconds_per_batch: float = Field(ge=0)
    seconds_per_image: float = Field(gt=0)


class AudioTimes(Part):
    """Whisper: clips are heard one at a time."""

    seconds_per_clip: float = Field(ge=0)
    seconds_per_second: float = Field(ge=0)
    """Of sound."""
    tokens_per_second: float = Field(default=3.0, ge=0)
    """Tokens of the transcript, by second of sound."""


class TextTimes(Part):
    """The LM: a step takes `seconds_per_step`, more for every answer in it, and more for every position of a prompt."""

    seconds_per_step: float = Field(gt=0)
    seconds_per_answer: float = Field(ge=0)
    seconds_per_position: float = Field(ge=0)
    positions_per_image: int = Field(ge=0)
    kv_bytes_per_token: int = Field(gt=0)


class ServiceTimes(StrictModel):
    """All of it."""

    origin: Literal["measured", "assumed"]
    where: str
    """Models, hardware and date, or what is assumed and by whom."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Package -> version that was measured."""
    ingress: IngressTimes
    vision: VisionTimes
    audio: AudioTimes
    text: TextTimes


def service_time_names() -> list[str]:
    """Names of the files that ship with mmllm."""
    return sorted(path.stem.removeprefix("times-") for path in _FOLDER.glob("times-*.yaml"))


def load_service_times(name_or_path: str) -> ServiceTimes:
    """Load service times by name, or from a YAML file when a path is given.

    Raises:
        ConfigError: unknown name, unknown key, or a wrong value.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        return load_config(ServiceTimes, Path(name_or_path))
    if name_or_path not in service_time_names():
        known = ", ".join(service_time_names())
        raise ConfigError(
            f"--times {name_or_path}: no service times of that name ship with mmllm ({known} do). Measure your own on "
            "the hardware in question: python -m tests.bench.capacity measure --bundle FOLDER --out times.yaml, and "
            "give --times times.yaml"
        )
    return load_config(ServiceTimes, _FOLDER / f"times-{name_or_path}.yaml")
