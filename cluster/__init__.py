"""Reaching a machine or a cluster: the `mmllm` command and what it starts."""
