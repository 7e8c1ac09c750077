"""The manifests under `k8s/`: rendered, checked and compared without a cluster."""
