"""Ray Data and Ray Train jobs; each runs under `ray job submit` and from the `mmllm` command."""
