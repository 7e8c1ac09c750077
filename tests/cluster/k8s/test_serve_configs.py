"""The Serve config of every overlay is one that Ray Serve takes and that the real application is built by."""

from typing import Any

import pytest
import yaml
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from cluster.k8s.agreement import agreement_findings, read_serve_config
from cluster.k8s.render import overlays
from cluster.modalities import RESOURCES, ROLES
from mmllm_core.bundle import Bundle
from mmllm_core.errors import ConfigError
from serve_apps.config import ServeConfig
from serve_apps.config_files import ServeArgs, load_serve_config, serve_config_names
from tests.cluster.k8s.conftest import ROOT, Rendered, one
from tests.serve_apps.conftest import build_tiny_bundle

WITH = [*((overlay, ()) for overlay in overlays(ROOT)), ("dev-cpu", ("gpu",)), ("prod-gpu", ("vllm",))]
DEPLOYMENTS = {"Assistant": "ingress", "ClipEncoder": "vision", "Transcriber": "audio", "PhiGenerator": "text"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, home_of_the_module: None) -> Bundle:
    """A bundle in a home of its own."""
    return build_tiny_bundle(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize(("overlay", "components"), WITH)
def test_the_application_is_built_by_it(
    rendered: Rendered, bundle: Bundle, overlay: str, components: tuple[str, ...]
) -> None:
    from serve_apps.builder import app

    service = one(rendered(overlay, *components), "RayService")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert schema.http_options.host == "0.0.0.0"
    [application] = schema.applications
    assert application.import_path == "serve_apps.builder:app"
    args = ServeArgs.model_validate(application.args | {"bundle": bundle.folder})  # the one in the manifest is a pod's
    built = build_app(app(args), name=application.name, route_prefix=application.route_prefix)
    config = args.serve_config()
    assert {deployment.name for deployment in built.deployments} == DEPLOYMENTS.keys()
    for deployment in built.deployments:
        role = ROLES[DEPLOYMENTS[deployment.name]]  # type: ignore[index]
        asked = deployment.ray_actor_options
        assert asked.get("resources", {}).keys() == ({role.resource} if role.resource else set())
        scaling = deployment._deployment_config.autoscaling_config
        assert scaling.max_replicas == getattr(config, str(role.field)).max_replicas
        assert (scaling.min_replicas == 0) == (role.resource in ("vision", "audio"))
        # No request is cut off when a replica is let go.
        assert deployment._deployment_config.graceful_shutdown_timeout_s >= config.limits.request_timeout_s


def _manifest(changes: dict[str, Any]) -> dict[str, Any]:
    config = load_serve_config("embedded").model_dump(mode="json") | changes
    serve = {
        "http_options": {"host": config["http"]["host"], "port": config["http"].get("port", 8000)},
        "applications": [
            {"name": "mmllm", "import_path": "serve_apps.builder:app", "args": {"config": config, "bundle": "/b"}}
        ],
    }
    return {"kind": "RayService", "metadata": {"name": "mmllm"}, "spec": {"serveConfigV2": yaml.safe_dump(serve)}}


def test_a_config_within_a_manifest_is_the_same_as_by_its_name() -> None:
    assert read_serve_config(_manifest({}))[1] == load_serve_config("embedded")


def test_an_unknown_key_within_a_manifest_is_named() -> None:
    with pytest.raises(ConfigError, match=r"args\.config: unknown key 'trailing'"):
        read_serve_config(_manifest({"trailing": 1}))


def test_a_proxy_that_pods_are_not_started_for_is_found() -> None:
    manifest = _manifest({"http": {"host": "0.0.0.0", "proxy": "haproxy"}, "access": {"keys_file": "/k"}})
    assert any("args.config.http.proxy is haproxy" in found.said for found in agreement_findings([manifest], []))


@pytest.mark.parametrize("name", serve_config_names())
def test_shipped_configs_ask_for_the_resources_of_their_roles(name: str) -> None:
    config = load_serve_config(name)
    asked = [_asked(config, str(role.field)) for role in ROLES.values() if role.resource]
    assert asked == [{resource} for resource in RESOURCES]


def _asked(config: ServeConfig, field: str) -> set[str]:
    return set(getattr(config, field).ray_actor_options.resources)
