"""Are manifests what the API server would take? Core kinds by kubernetes-validate, KubeRay's by its own CRDs.

Custom resources are checked as the API server does it: the CRD's defaults first, then its schema; but a field that the
schema does not know, which the server would silently drop, is an error here. Kinds of other projects (Gateway API,
Prometheus' operator, Kueue) have no schema here.
"""

import copy
import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from cluster.k8s.manifests import Finding, Manifest, read_manifests, title
from mmllm_core.errors import ConfigError, EnvironmentLack

KUBERNETES_VERSION = "1.32"
"""The oldest that the manifests are written for."""
KUBERAY_VERSION = "1.7.0"
HOW_TO_GET_CRDS = (
    "helm repo add kuberay https://ray-project.github.io/kuberay-helm && mkdir crds && "
    f"helm show crds kuberay/kuberay-operator --version {KUBERAY_VERSION} > crds/kuberay.yaml"
)

Schemas = dict[str, dict[str, Any]]
"""JSON Schema of each kind of KubeRay's, version v1."""


def core_findings(manifests: list[Manifest]) -> list[Finding]:
    """What the schemas of Kubernetes' own kinds refuse.

    Raises:
        EnvironmentLack: kubernetes-validate is not installed.
    """
    try:
        import kubernetes_validate  # noqa: F401
    except ImportError:
        raise EnvironmentLack("kubernetes-validate is not installed: pip install 'mmllm[k8s]'") from None
    return [finding for manifest in manifests if (finding := _core_finding(json.dumps(manifest, sort_keys=True)))]


@lru_cache(maxsize=4096)
def _core_finding(text: str) -> Finding | None:
    """Of one object as JSON: many renderings hold the same ones."""
    import kubernetes_validate
    from kubernetes_validate.utils import SchemaNotFoundError

    manifest: Manifest = json.loads(text)
    try:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    except SchemaNotFoundError as error:
        return Finding(title(manifest), error.message) if _is_core(manifest["apiVersion"]) else None
    except kubernetes_validate.ValidationError as error:
        return Finding(f"{title(manifest)} {_path(error.path)}".strip(), error.message)
    return None


def _is_core(api_version: str) -> bool:
    group = api_version.rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and group.count(".") == 2)


@cache
def load_crds(folder: Path) -> Schemas:
    """KubeRay's schemas from a folder of CRD files, or one file.

    Raises:
        ConfigError: there are no CRDs of KubeRay's there.
    """
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else [folder]
    schemas: Schemas = {}
    for file in files:
        try:
            text = file.read_text()
        except OSError as error:
            raise ConfigError(f"--crds {file}: cannot be read: {error.strerror}") from error
        for crd in read_manifests(text, str(file)):
            if crd["kind"] == "CustomResourceDefinition" and crd["spec"]["group"] == "ray.io":
                [version] = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
                schemas[crd["spec"]["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    if not schemas:
        raise ConfigError(f"--crds {folder}: there are no CRDs of KubeRay's: get them by '{HOW_TO_GET_CRDS}'")
    return schemas


def custom_findings(manifests: list[Manifest], schemas: Schemas) -> list[Finding]:
    """What KubeRay's CRDs refuse, unknown fields among it."""
    from jsonschema import Draft202012Validator

    found = []
    for manifest in manifests:
        if not manifest["apiVersion"].startswith("ray.io/"):
            continue
        if manifest["apiVersion"] != "ray.io/v1" or manifest["kind"] not in schemas:
            said = f"{manifest['apiVersion']} {manifest['kind']} is none of KubeRay's ray.io/v1 kinds"
            found.append(Finding(title(manifest), said))
            continue
        schema = schemas[manifest["kind"]]
        filled = with_defaults(copy.deepcopy(manifest), schema)
        for error in Draft202012Validator(_strict(manifest["kind"], schema)).iter_errors(filled):
            said = error.message if len(error.message) < 300 else f"{error.message[:300]}..."
            found.append(Finding(f"{title(manifest)} {_path(error.absolute_path)}".strip(), said))
    return found


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """Fill in a CRD's defaults, in place, as the API server does before it validates."""
    if isinstance(value, dict):
        for name, sub in (schema.get("properties") or {}).items():
            if name not in value and "default" in sub:
                value[name] = copy.deepcopy(sub["default"])
            if name in value:
                with_defaults(value[name], sub)
        if isinstance(more := schema.get("additionalProperties"), dict):
            for name in value.keys() - (schema.get("properties") or {}).keys():
                with_defaults(value[name], more)
    elif isinstance(value, list) and isinstance(items := schema.get("items"), dict):
        for item in value:
            with_defaults(item, items)
    return value


_STRICT: dict[tuple[str, int], dict[str, Any]] = {}


def _strict(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    key = (kind, id(schema))
    if key not in _STRICT:
        top = _closed(schema)
        top["properties"]["metadata"] = {"type": "object"}  # the API server's own to check
        _STRICT[key] = top
    return _STRICT[key]


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI v3 schema of a CRD's as JSON Schema that knows no fields but those it names."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | {k: schema[k] for k in ("pattern",) if k in schema}
    dropped = ("properties", "items", "additionalProperties", "description", "default", "format", "nullable")
    closed = {k: v for k, v in schema.items() if k not in dropped and not k.startswith("x-")}
    if "properties" in schema:
        closed["properties"] = {name: _closed(sub) for name, sub in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed["additionalProperties"] = False
    if isinstance(more := schema.get("additionalProperties"), dict):
        closed["additionalProperties"] = _closed(more)
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    if schema.get("nullable") and isinstance(closed.get("type"), str):
        closed["type"] = [closed["type"], "null"]
    return closed


def _path(parts: Any) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
