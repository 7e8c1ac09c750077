"""All checks of rendered manifests, in one call. Each is a module of its own; none asks a cluster."""

from pathlib import Path

from cluster.k8s.agreement import agreement_findings
from cluster.k8s.flows import flow_findings
from cluster.k8s.kuberay import kuberay_findings
from cluster.k8s.manifests import Finding, Manifest, of_kind
from cluster.k8s.pods import pod_findings
from cluster.k8s.render import Target, render
from cluster.k8s.schemas import core_findings, custom_findings, load_crds


def validate(
    manifests: list[Manifest], *, context: list[Manifest] | None = None, crds: Path | None = None
) -> list[Finding]:
    """What is wrong with some manifests; nothing, if the list is empty.

    Args:
        context: manifests that are on the cluster besides, such as the service's where a job is checked.
        crds: folder or file of KubeRay's CRDs; without it custom resources are not checked against their schemas.

    Raises:
        EnvironmentLack: kubernetes-validate is not installed.
        ConfigError: there are no CRDs there.
    """
    context = context or []
    found = core_findings(manifests)
    if crds is not None:
        found += custom_findings(manifests, load_crds(crds))
    if found:
        return found  # the other checks read fields that have the right shape
    return [
        *kuberay_findings(manifests),
        *pod_findings(manifests, context),
        *agreement_findings(manifests, context),
        *flow_findings(manifests, context),
    ]


def context_of(target: Target, manifests: list[Manifest]) -> list[Manifest]:
    """What is on the cluster before a target comes: the service, for a job; nothing, for what brings the namespace.

    Raises:
        EnvironmentLack: there is no kubectl.
    """
    return [] if of_kind(manifests, "Namespace") else render(Target(target.root / "base", target.root))
