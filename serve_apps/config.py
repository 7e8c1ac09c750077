"""How the assistant is served: one YAML, one model; settings that cannot work together are refused here.

Knows the names and limits of deployments. Does not know Ray: `serve_apps.builder` turns a config into an
application.
"""

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from mmllm_core.config import AudioConfig, Name, SpeechDtype, SpeechEngine, StrictModel, VllmConfig, parse_config
from mmllm_core.data.feature_location import absolute_location
from mmllm_core.errors import ConfigError
from mmllm_core.extensions import extension_names
from serve_apps.access_config import AccessConfig, require_keys_unless_loopback
from serve_apps.autoscaling_config import (
    AudioAutoscaling,
    Autoscaling,
    RequestAutoscaling,
    TextAutoscaling,
    VisionAutoscaling,
    WorkAutoscaling,
)
from serve_apps.files_config import FilesConfig, ImageUrlsConfig
from serve_apps.limits import Limits
from serve_apps.observability_config import ObservabilityConfig


class ActorOptions(StrictModel):
    """What a replica reserves. `resources` names its modality, so that a cluster starts the right kind of node."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    resources: dict[Literal["vision", "audio", "text"], float] = Field(default_factory=dict)


class DeploymentConfig(StrictModel):
    """What every deployment has."""

    modality: ClassVar[str | None] = None

    num_replicas: int | None = Field(default=None, gt=0)
    """A fixed number; leave it out where `autoscaling` is given. Without either, one replica."""
    autoscaling: Autoscaling | None = None
    max_ongoing_requests: int = Field(default=16, gt=0)
    """Requests that a replica takes at a time."""
    max_queued_requests: int = Field(default=128, ge=-1)
    """Requests that may wait for a replica before more are answered with 429; -1 for no limit."""
    ray_actor_options: ActorOptions = ActorOptions()

    @property
    def max_replicas(self) -> int:
        """The most replicas that there can be."""
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas or 1

    @model_validator(mode="after")
    def _scaling_can_work(self) -> "DeploymentConfig":
        if self.autoscaling is None:
            return self
        if self.num_replicas is not None:
            raise ValueError("give num_replicas or autoscaling, not both")
        scaling = self.autoscaling
        if isinstance(scaling, WorkAutoscaling):
            held = self.max_ongoing_requests * scaling.per_request
            if scaling.target > held:
                raise ValueError(
                    f"autoscaling.target_{scaling.unit} {scaling.target:g} is above the {held:g} {scaling.unit} that a "
                    f"replica can hold (max_ongoing_requests {self.max_ongoing_requests} times "
                    f"{scaling.unit}_per_request {scaling.per_request:g}): no replica would be added for its work"
                )
        elif isinstance(scaling, RequestAutoscaling) and scaling.target_requests > self.max_ongoing_requests:
            raise ValueError(
                f"autoscaling.target_requests {scaling.target_requests:g} is above max_ongoing_requests "
                f"{self.max_ongoing_requests}: no replica would ever be added"
            )
        return self

    @model_validator(mode="after")
    def _asks_for_its_modality(self) -> "DeploymentConfig":
        asked = {name for name, amount in self.ray_actor_options.resources.items() if amount > 0}
        wanted = {self.modality} if self.modality else set()
        if asked != wanted:
            raise ValueError(
                f"ray_actor_options.resources must ask for {' '.join(sorted(wanted)) or 'nothing'} "
                f"and asks for {', '.join(sorted(asked)) or 'nothing'}"
            )
        return self


class ModelDeploymentConfig(DeploymentConfig):
    """A deployment that runs a model."""

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=0, ge=0)
    """CPU threads of the model; 0 takes every core that the process may use."""

    @property
    def n_threads(self) -> int:
        """CPU threads of the model, counted on the machine that asks."""
        return self.threads or len(os.sched_getaffinity(0))

    @model_validator(mode="after")
    def _device_matches_reservation(self) -> "ModelDeploymentConfig":
        if (self.device == "cuda") != (self.ray_actor_options.num_gpus > 0):
            raise ValueError(
                f"device {self.device} does not go with ray_actor_options.num_gpus "
                f"{self.ray_actor_options.num_gpus:g}: a replica sees the GPUs that it reserves and no other"
            )
        return self


class ClipConfig(ModelDeploymentConfig):
    """Images -> features."""

    modality = "vision"

    autoscaling: VisionAutoscaling | None = None
    max_batch_size: int = Field(default=8, gt=0)
    batch_wait_s: float = Field(default=0.01, ge=0)
    """How long an image waits for company."""
    cache_bytes: int = Field(default=64_000_000, ge=0)
    """Features that a replica remembers."""
    feature_store: Annotated[str, AfterValidator(absolute_location)] | None = None
    """Folder or URL of features computed ahead; only read."""
    store_refresh_s: float = Field(default=30.0, ge=0)
    """How often a replica looks for features that were added to the store, at most."""

    @model_validator(mode="after")
    def _batches_can_fill(self) -> "ClipConfig":
        if self.max_batch_size > self.max_ongoing_requests:
            raise ValueError(
                f"max_batch_size {self.max_batch_size} is above max_ongoing_requests {self.max_ongoing_requests}: "
                "batches would never fill"
            )
        return self


class WhisperConfig(ModelDeploymentConfig):
    """Sound -> transcripts. How Whisper is run is the bundle's profile's to say, unless it is said here."""

    modality = "audio"

    autoscaling: AudioAutoscaling | None = None
    engine: SpeechEngine | None = None
    compute_type: SpeechDtype | None = None
    beam_size: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    tail_seconds: float | None = Field(default=None, ge=0)

    def audio(self, profile: AudioConfig) -> AudioConfig:
        """How Whisper is run.

        Raises:
            ConfigError: the engine does not compute in that, or the device does not.
        """
        names = ("engine", "compute_type", "beam_size", "batch_size", "tail_seconds")
        said = {name: value for name in names if (value := getattr(self, name)) is not None}
        audio = parse_config(AudioConfig, profile.model_dump() | said, "whisper")
        if self.device == "cpu" and audio.compute_type in ("float16", "int8_float16"):
            raise ConfigError(f"whisper.compute_type: {audio.compute_type} is for GPUs: set int8 or float32")
        return audio


class PhiConfig(ModelDeploymentConfig):
    """Conversations and features -> text."""

    modality = "text"

    autoscaling: TextAutoscaling | None = None
    engine: str = "transformers"
    """What decodes: `transformers`, `vllm` (for GPUs: pip install 'mmllm[vllm]'), or an engine that an installed
    package adds (`mmllm.engines`)."""
    vllm: VllmConfig = VllmConfig()
    kv_cache_bytes: int = Field(default=1_000_000_000, gt=0)
    """Memory for keys and values of prompts and answers, taken when a replica starts; requests wait for room in it.
    On GPUs vLLM goes by `vllm.gpu_memory_utilization` instead."""
    merged: bool = True
    """Whether the LM is dequantized and its adapter merged as a replica starts. It answers sooner then, and takes two
    or four bytes a weight, by the dtype that it is computed in. vLLM always dequantizes, and otherwise applies the
    adapter as it computes."""
    adapters: dict[Name, Annotated[Path, AfterValidator(Path.absolute)]] = Field(default_factory=dict)
    """Folders of further bundles, by the model name that they are asked for by. They share the base LM and all else of
    the bundle that is served, and have their own adapters and connectors. No adapter is merged then, the first bundle's
    neither, so that requests for any of them are computed together; `merged` dequantizes the LM alone."""
    adapters_in_memory: int = Field(default=8, gt=0)
    """Bundles, the first included, whose adapters a replica holds; the one unused longest makes room for another."""
    step_tokens: int = Field(default=256, gt=0)
    """Positions that are computed at a time: more answer long prompts sooner, fewer keep other answers flowing."""
    stream_interval_s: float = Field(default=0.05, ge=0)
    """Text that comes within it travels together; the first piece never waits. It holds while up to four answers are
    computed at a time and grows in proportion with more, so that streams do not take the CPU from who computes them."""
    stream_interval_most_s: float = Field(default=0.25, ge=0)
    """What `stream_interval_s` may grow to."""
    routing: Literal["prefix", "requests"] = "prefix"
    """Which replica is asked: the one that has computed most of what the conversation begins with, or the less busy of
    two."""
    routing_imbalance: int = Field(default=8, ge=0)
    """By how many requests the replica that has computed a conversation's beginning may be busier than the least busy
    one before it is passed over."""

    @field_validator("engine")
    @classmethod
    def _engine_is_there(cls, engine: str) -> str:
        known = ["transformers", "vllm", *extension_names("mmllm.engines")]
        if engine not in known:
            raise ValueError(f"'{engine}' is unknown: choose one of {', '.join(known)}")
        return engine

    @model_validator(mode="after")
    def _engine_shares_its_lm(self) -> "PhiConfig":
        if self.adapters and self.engine not in ("transformers", "vllm"):
            raise ValueError(f"adapters are for the engines transformers and vllm, and engine is {self.engine}")
        return self

    @model_validator(mode="after")
    def _settings_are_of_the_engine(self) -> "PhiConfig":
        if self.engine != "vllm" and self.vllm != VllmConfig():
            raise ValueError(f"vllm: set, and engine is {self.engine}: leave it out, or set engine to vllm")
        return self

    @model_validator(mode="after")
    def _vllm_fits_what_is_reserved(self) -> "PhiConfig":
        if self.engine != "vllm":
            return self
        if objection := self.vllm.objection(self.device):
            raise ValueError(objection)
        gpus = self.ray_actor_options.num_gpus
        if self.vllm.tensor_parallel > max(1, gpus):
            raise ValueError(
                f"vllm.tensor_parallel {self.vllm.tensor_parallel} is above ray_actor_options.num_gpus {gpus:g}: "
                "a replica sees the GPUs that it reserves and no other"
            )
        if 0 < gpus < self.vllm.gpu_memory_utilization:
            raise ValueError(
                f"vllm.gpu_memory_utilization {self.vllm.gpu_memory_utilization:g} is above ray_actor_options.num_gpus "
                f"{gpus:g}: what else runs on that GPU would lack memory"
            )
        return self


class IngressConfig(DeploymentConfig):
    """The HTTP side; needs no modality and is never scaled to zero."""

    autoscaling: RequestAutoscaling | None = None
    max_ongoing_requests: int = Field(default=256, gt=0)
    max_queued_requests: int = Field(default=-1, ge=-1)
    cache_bytes: int = Field(default=32_000_000, ge=0)
    """Features that a replica remembers of images that requests brought along: a repeated one is not sent to CLIP."""

    @model_validator(mode="after")
    def _always_there(self) -> "IngressConfig":
        if self.autoscaling and self.autoscaling.min_replicas == 0:
            raise ValueError("autoscaling.min_replicas must be at least 1: nobody would answer the first request")
        return self


class HttpConfig(StrictModel):
    """Where HTTP is served."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, gt=0, lt=65536)
    proxy: Literal["serve", "haproxy"] = "serve"
    """What takes requests in and hands them to ingress replicas: Ray Serve's own proxy, or the HAProxy that comes with
    Ray on Linux, which takes less time for each. The latter is for the Ray that `mmllm serve` starts."""

    @model_validator(mode="after")
    def _haproxy_reaches_replicas(self) -> "HttpConfig":
        if self.proxy == "haproxy" and self.host not in ("127.0.0.1", "0.0.0.0"):
            raise ValueError(
                f"http.proxy haproxy does not go with http.host {self.host}: replicas listen on that host too, and "
                "HAProxy asks for them on 127.0.0.1: set host to 127.0.0.1 or 0.0.0.0, or proxy to serve"
            )
        return self

    @property
    def base_url(self) -> str:
        """URL of the service as this machine reaches it; the API lies below `/v1`."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


class ServeConfig(StrictModel):
    """The whole service."""

    name: str
    http: HttpConfig = HttpConfig()
    access: AccessConfig = AccessConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    ui: bool = True
    """Whether the chat page is served at `/`; where keys are asked for, it asks for one too."""
    limits: Limits = Limits()
    files: FilesConfig | None = None
    """Uploaded files; left out, there are none."""
    image_urls: ImageUrlsConfig | None = None
    """Whether images may be named by https URLs; left out, they may not."""
    ingress: IngressConfig = IngressConfig()
    clip: ClipConfig
    whisper: WhisperConfig
    phi: PhiConfig

    @model_validator(mode="after")
    def _keyless_on_loopback_alone(self) -> "ServeConfig":
        try:
            require_keys_unless_loopback(self.http.host, self.access)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _page_has_one_home(self) -> "ServeConfig":
        if self.ui and self.ingress.max_replicas > 1:
            raise ValueError(
                f"ui needs a single ingress replica and ingress may have {self.ingress.max_replicas}: a chat page "
                "keeps its session in the replica that drew it; set 'ui: false' or fewer replicas"
            )
        return self
