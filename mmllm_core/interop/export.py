"""Exports: a bundle -> a folder in another format, whole or absent, with its model card.

In: an opened bundle and a format. Out: a folder that plain transformers opens, or a bundle that carries its merged LM.
Does not know the hub; `mmllm_core.interop.push` does.
"""

from pathlib import Path

from mmllm_core.artifact import STAMP, building, require_free_disk
from mmllm_core.bundle import Bundle
from mmllm_core.config import Dtype
from mmllm_core.errors import ExportError
from mmllm_core.interop.llava_export import write_llava
from mmllm_core.interop.model_card import build_card
from mmllm_core.language import load_tokenizer
from mmllm_core.merging import merge_bundle, merge_language_model, write_language_model


def export_llava(bundle: Bundle, out: Path, *, dtype: Dtype | None = None, exact_ids: bool = True) -> None:
    """Write a bundle as a LLaVA checkpoint with its processor and model card.

    Args:
        out: folder to make; it must not exist, or be empty.
        dtype: of the merged LM; the bundle's own if not given.
        exact_ids: whether to refuse a chat template that a processor tokenizes otherwise than our renderer.

    Raises:
        ExportError: something that LLaVA cannot express, or a folder that holds files already.
        EnvironmentLack: not enough disk.
    """
    _require_room(bundle, out, dtype)
    with building(out, {}) as folder:
        record = write_llava(bundle, folder, dtype=dtype, exact_ids=exact_ids)
        build_card(bundle, "llava-hf", record).save(folder / "README.md")
    (out / STAMP).unlink()


def export_merged_lm(bundle: Bundle, out: Path, *, dtype: Dtype | None = None) -> None:
    """Write a bundle's LM, merged, as a causal LM's folder with tokenizer and model card.

    Args:
        out: folder to make; it must not exist, or be empty.
        dtype: of the merged LM; the bundle's own if not given.

    Raises:
        ExportError: an adapter that cannot be merged, or a folder that holds files already.
        EnvironmentLack: not enough disk.
    """
    _require_room(bundle, out, dtype)
    with building(out, {}) as folder:
        lm, record = merge_language_model(bundle, bundle.load_model().lm, dtype)
        write_language_model(lm, folder)
        load_tokenizer(bundle.folder / "tokenizer").save_pretrained(folder)
        build_card(bundle, "merged-lm", record).save(folder / "README.md")
    (out / STAMP).unlink()


def export_merged_bundle(bundle: Bundle, name: str, *, dtype: Dtype | None = None, make_latest: bool = False) -> Bundle:
    """Make a bundle that carries the merged LM, with its model card (`mmllm_core.merging.merge_bundle`).

    Raises:
        ExportError: the name is the bundle's own, or an adapter that cannot be merged.
    """
    merged = merge_bundle(bundle, name, dtype=dtype, make_latest=make_latest)
    build_card(merged, "merged-bundle", merged.info.merged).save(merged.folder / "README.md")
    return merged


def _require_room(bundle: Bundle, out: Path, dtype: Dtype | None) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: exists and is not an empty folder: give another with --out")
    language = bundle.weights(bundle.profile.language.source)
    n_bytes = sum(path.stat().st_size for path in language.glob("*.safetensors"))
    factor = 2.2 if dtype == "float32" else 1.1
    require_free_disk(out.absolute(), factor * n_bytes / 1e9, "the export")
