"""A config and a bundle -> the Serve application: CLIP and Whisper beside each other, the LM behind, HTTP in front.

Knows which class each deployment runs and under which name. Does not start Ray or Serve, and does not load a model:
the bundle is opened only to be verified and for its name.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

import mmllm_core
from mmllm_core.bundle import Bundle
from mmllm_core.errors import ConfigError
from serve_apps.assistant_app import Assistant
from serve_apps.autoscaling_config import RequestAutoscaling, WorkAutoscaling
from serve_apps.clip_app import ClipDeployment
from serve_apps.config import DeploymentConfig, PhiConfig, ServeConfig
from serve_apps.config_files import ServeArgs, with_feature_store
from serve_apps.observability_config import ObservabilityConfig
from serve_apps.perception import Fingerprints
from serve_apps.phi_app import PhiDeployment
from serve_apps.servable import require_servable
from serve_apps.served_bundles import Base, ServedBundle, ServedBundles, base_of, require_base
from serve_apps.whisper_app import WhisperDeployment, require_hearing

if TYPE_CHECKING:
    from ray.serve import Application, Deployment

APP_NAME = "mmllm"
INGRESS, CLIP, WHISPER, PHI = "Assistant", "ClipEncoder", "Transcriber", "PhiGenerator"


def build(config: ServeConfig, bundle: Path, model: str | None = None) -> "Application":
    """Compose the deployments.

    What is built of an equal config and of bundles with an equal base can take each other's place while it runs: Serve
    lets the LM's replicas change bundles (`PhiDeployment.reconfigure`) and restarts none.

    Args:
        bundle: folder of a bundle that every replica can read under this path.
        model: the name that it is asked for by; its own if None.

    Raises:
        BundleError: a bundle is missing, incomplete or altered, or one of `phi.adapters` has another base.
        ConfigError: it is not for an engine that the config names.
        EnvironmentLack: such an engine is not installed.
    """
    opened = Bundle.open(bundle)
    require_servable(opened, config.phi)
    require_hearing(opened, config.whisper)
    folder = opened.folder.absolute()
    name = model or opened.info.name
    base = base_of(opened)
    bundles = {name: ServedBundle.of(opened)} | _adapters(config.phi, base, name)
    drain_s = config.limits.request_timeout_s  # no request takes longer, so none is cut off
    version = version_of(config, base, list(bundles))

    def deployment(cls: type, name: str, part: DeploymentConfig, **more: Any) -> "Deployment":
        logs = logging_config(config.observability)
        options = serving_options(part, drain_s) | {"logging_config": logs} | more
        # Serve's own versions are new ones whenever something is deployed, and replicas of another version restart.
        return serve.deployment(cls, name=name, **options).options(version=version, _internal=True)

    clip = deployment(ClipDeployment, CLIP, config.clip).bind(folder, config.clip, config.observability)
    whisper = deployment(WhisperDeployment, WHISPER, config.whisper).bind(folder, config.whisper, config.observability)
    wanted = ServedBundles(bundles=bundles).model_dump(mode="json")
    phi = deployment(PhiDeployment, PHI, config.phi, user_config=wanted).bind(bundles, config.phi, config.observability)
    ingress = deployment(serve.ingress()(Assistant), INGRESS, config.ingress)
    fingerprints = Fingerprints.of(opened, config.whisper)
    return ingress.bind(clip, whisper, phi, list(bundles), config, fingerprints, opened.profile.name)


def _adapters(config: PhiConfig, base: Base, name: str) -> dict[str, ServedBundle]:
    """The further bundles of a config, by model name; all that is known against them is said here."""
    found = {}
    for other, folder in config.adapters.items():
        if other == name:
            raise ConfigError(f"phi.adapters: '{other}' is the name of the first bundle: give it another")
        opened = Bundle.open(folder)
        require_base(base, name, opened)
        require_servable(opened, config)
        found[other] = ServedBundle.of(opened)
    return found


def version_of(config: ServeConfig, base: Base, models: list[str]) -> str:
    """What must be equal for running replicas to stay: code, config, model names, and all of a bundle but its training.

    Two services of one version differ in the bundles' connectors and adapters alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    for folder in (Path(__file__).parent, Path(mmllm_core.__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    told = [config.model_dump(mode="json", exclude={"phi": {"adapters"}}), models, base]
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def app(args: ServeArgs) -> "Application":
    """`build` for a Serve config file: `import_path: serve_apps.builder:app`, `args: {config: ..., bundle: ...}`.

    CLIP reads the feature store of the machine's settings (`MMLLM_FEATURES`), unless the config names another.
    """
    return build(with_feature_store(args.serve_config()), args.bundle)


def logging_config(config: ObservabilityConfig) -> LoggingConfig:
    """How Serve's processes log; Serve adds the request's id to what is logged for it, whichever replica does.

    Its own line a request is left out: every part of the assistant writes one that says more.
    """
    return LoggingConfig(encoding=config.logs.upper(), log_level=config.log_level.upper(), enable_access_log=False)


def serving_options(config: DeploymentConfig, drain_s: float) -> dict[str, Any]:
    """A deployment's config as arguments of `serve.deployment`.

    Args:
        drain_s: how long a replica that is let go may go on with what it holds.
    """
    return {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "graceful_shutdown_timeout_s": drain_s,
        "ray_actor_options": config.ray_actor_options.model_dump(),
    } | (_scaling(config) | _routing(config))


def _routing(config: DeploymentConfig) -> dict[str, Any]:
    if not isinstance(config, PhiConfig) or config.routing != "prefix":
        return {}
    router = RequestRouterConfig(
        request_router_class="serve_apps.prefix_router.PrefixRouter",
        request_router_kwargs={"imbalance": config.routing_imbalance},
    )
    return {"request_router_config": router}


def _scaling(config: DeploymentConfig) -> dict[str, Any]:
    scaling = config.autoscaling
    if scaling is None:
        return {"num_replicas": config.num_replicas or 1}
    wanted: dict[str, Any] = {
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.max_replicas,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
        "look_back_period_s": scaling.look_back_s,
        "metrics_interval_s": scaling.metrics_interval_s,
        "target_ongoing_requests": config.max_ongoing_requests,
    }
    if isinstance(scaling, RequestAutoscaling):
        wanted["target_ongoing_requests"] = scaling.target_requests
    elif isinstance(scaling, WorkAutoscaling):
        wanted["policy"] = AutoscalingPolicy(
            policy_function="serve_apps.autoscaling:WorkPolicy",
            policy_kwargs={
                "modality": config.modality,
                "unit": scaling.unit,
                "targets": asdict(scaling.targets(config.max_ongoing_requests)),
            },
        )
    return {"autoscaling_config": AutoscalingConfig(**wanted)}
