"""LLaVA checkpoints in Hugging Face format -> mmllm bundles.

In: the folder of a `LlavaForConditionalGeneration` (Liu et al., 2023, arXiv:2310.03744): a CLIP vision tower, a
projector of two layers, and a Llama or Phi-3 LM, such as `xtuner/llava-phi-3-mini-hf`. Out: a bundle that serves
without training. Neither the LLaVA model nor its LM is built: the LM's tensors are read one at a time, and at most
a shard of them is held at once. Does not know where the folder came from.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from yaml import YAMLError

from mmllm_core.artifact import require_free_disk
from mmllm_core.bundle import Bundle, BundleInfo, bundles_folder, save_bundle
from mmllm_core.config import HubSource, MlpConfig, Origin, PathSource, Profile, VisionConfig
from mmllm_core.connectors import Connector, LmShape, build_connector
from mmllm_core.errors import WeightsError
from mmllm_core.interop.clip_weights import write_open_clip
from mmllm_core.interop.llava_chat import load_chat_tokenizer
from mmllm_core.interop.llava_checkpoint import LlavaCheckpoint, read_config, read_processor
from mmllm_core.interop.shards import write_shards
from mmllm_core.vision import ClipEncoder

if TYPE_CHECKING:
    from transformers import LlavaConfig


def import_llava(
    folder: Path,
    *,
    profile: Profile,
    name: str,
    source: HubSource | None = None,
    chat_template: str | None = None,
    make_latest: bool = True,
) -> Bundle:
    """Import a LLaVA checkpoint as a bundle.

    Args:
        folder: the checkpoint: `config.json`, safetensors, tokenizer and image processor.
        profile: gives the ears, and how the LM is loaded (quantization, dtype, context). Vision, connector and
            weights come from the checkpoint.
        name: the bundle's name.
        source: where the folder was fetched from, which the bundle records.
        chat_template: Jinja template to use instead of the checkpoint's.
        make_latest: whether `mmllm serve` starts from the bundle.

    Raises:
        WeightsError: not a LLaVA checkpoint, or one whose parts mmllm does not have.
        EnvironmentLack: not enough disk.
    """
    config = read_config(folder)
    weights = LlavaCheckpoint(folder)
    _check_language(config, weights)
    connector = _load_connector(config, weights)
    tokenizer = load_chat_tokenizer(folder, chat_template)
    origin = Origin(
        name=source.repo if source else folder.resolve().name,
        licence=_licence(folder),
        repo=source.repo if source else None,
    )
    require_free_disk(bundles_folder(), 1.1 * weights.n_bytes / 1e9, "importing the checkpoint")

    with tempfile.TemporaryDirectory(prefix="mmllm-import-") as scratch:
        vision_folder = Path(scratch)
        write_open_clip(vision_folder, config.vision_config, read_processor(folder), weights.part("vision"))
        vision = VisionConfig(
            source=PathSource(path=vision_folder),
            origin=origin,
            feature_layer=_feature_layer(config),
            cls_token=config.vision_feature_select_strategy == "full",
            max_pixels=profile.vision.max_pixels,
        )
        encoder = ClipEncoder(vision, vision_folder)
        info = BundleInfo(
            name=name,
            profile=profile.model_copy(
                update={
                    "vision": vision,
                    "language": profile.language.model_copy(
                        update={"context_length": _context(config, profile), "origin": origin}
                    ),
                    "connector": MlpConfig(bias=config.multimodal_projector_bias),
                }
            ),
            d_vision=encoder.d_vision,
            n_patches=encoder.n_patches,
            feature_fingerprint=encoder.fingerprint,
            recipe={"stage": "import", "format": "llava"}
            | ({"checkpoint": source.repo, "revision": source.revision} if source else {"checkpoint": origin.name}),
        )
        del encoder  # its gigabyte is not needed while the LM is written
        return save_bundle(
            info,
            connector,
            tokenizer,
            vision_weights=vision_folder,
            language_weights=lambda target: _write_language(config, weights, folder, target),
            make_latest=make_latest,
        )


def _licence(folder: Path) -> str | None:
    """The hub's identifier of the licence in the checkpoint's model card, if it has a card that says one."""
    from huggingface_hub import ModelCard

    if not (folder / "README.md").is_file():
        return None
    try:
        licence = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except (OSError, ValueError, YAMLError):
        return None
    return licence if isinstance(licence, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence) else None


def _feature_layer(config: "LlavaConfig") -> int:
    """The layer counted from the end: Hugging Face numbers blocks from 1, for 0 is what enters the first."""
    n_blocks, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    from_end: int = layer if layer < 0 else layer - n_blocks - 1
    if not -n_blocks <= from_end <= -1:
        raise WeightsError(f"vision_feature_layer {layer}: the vision tower's {n_blocks} blocks have no such output")
    return from_end


def _context(config: "LlavaConfig", profile: Profile) -> int:
    shorter: int = min(profile.language.context_length, config.text_config.max_position_embeddings)
    return shorter


def _load_connector(config: "LlavaConfig", weights: LlavaCheckpoint) -> Connector:
    connector = build_connector(
        MlpConfig(bias=config.multimodal_projector_bias),
        config.vision_config.hidden_size,
        LmShape.of(config.text_config),
    )
    try:
        connector.load_state_dict(weights.part("connector"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"its projector is not two linear layers with GELU between: {reason}") from error
    return connector


def _check_language(config: "LlavaConfig", weights: LlavaCheckpoint) -> None:
    """Compare names and shapes with the architecture, so that a mismatch shows before gigabytes are written."""
    from transformers import AutoModelForCausalLM

    # Whether input and output embeddings are one matrix is said on top by some versions and inside by others.
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config.text_config)
    expected = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
    found = set(weights.names("language"))
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := expected.keys() - found - optional:
        raise WeightsError(f"the LM lacks {len(missing)} tensors, such as '{min(missing)}'")
    if unknown := found - expected.keys():
        raise WeightsError(f"the LM has {len(unknown)} tensors that its architecture lacks, such as '{min(unknown)}'")
    for name in sorted(found):
        if (shape := weights.shape("language", name)) != expected[name]:
            raise WeightsError(f"the LM's tensor '{name}' has shape {shape} and its architecture {expected[name]}")


def _write_language(config: "LlavaConfig", weights: LlavaCheckpoint, source: Path, target: Path) -> None:
    """Write the LM as a causal LM's folder of its own, shard by shard."""
    text_config = config.text_config
    text_config.dtype = weights.tensor("language", "model.embed_tokens.weight").dtype
    text_config.save_pretrained(target)
    if (source / "generation_config.json").is_file():  # says which tokens end an answer
        shutil.copy(source / "generation_config.json", target)
    write_shards(target, ((name, weights.tensor("language", name)) for name in weights.names("language")))
