"""Model cards: the README, with a YAML header that the Hugging Face hub reads, of everything that is exported.

In: a bundle, the format it was exported in and how its LM was merged. Out: a `huggingface_hub.ModelCard`. All that it
says comes from `bundle.json`: licences and names from the profile's `origin` fields, data by hash, recipe, metrics
and versions. Does not know weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmllm_core.bundle import Bundle, MergedAdapter
from mmllm_core.config import HubSource, Origin, PackageSource, TrainedSource
from mmllm_core.evaluation.accuracy import OVERALL, Scores, scores_from_json
from mmllm_core.interop import ExportFormat

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

_PARTS: dict[ExportFormat, tuple[str, ...]] = {
    "llava-hf": ("vision", "connector", "language"),
    "merged-lm": ("language",),
    "merged-bundle": ("vision", "connector", "language", "audio"),
}
_WHAT = {"vision": "sees (CLIP)", "connector": "features to embeddings", "language": "answers", "audio": "hears"}

_LOADING: dict[ExportFormat, str] = {
    "llava-hf": """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER_OR_REPO")
processor = AutoProcessor.from_pretrained("FOLDER_OR_REPO", backend="pil")
content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
new = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs.input_ids.shape[1]:]
print(processor.decode(new, skip_special_tokens=True))
```

`backend="pil"` gives the very pixels that the model was trained on; torchvision's differ by less than one of 256 steps
where a picture is resized. mmllm runs CLIP in float32: `dtype=torch.float32` does too. An image goes on a line of its
own before the question, as in training. Text that spells a control token is text to mmllm and a control token to this
processor: clean what strangers send.""",
    "merged-lm": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_REPO")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPO")
```

This is the LM alone: it sees nothing without its connector and vision tower.""",
    "merged-bundle": """\
```
mmllm serve --bundle FOLDER
```""",
}


def build_card(bundle: Bundle, format_: ExportFormat, merged: MergedAdapter | None) -> "ModelCard":
    """The model card of an export.

    Args:
        merged: how the LM was merged, or None where it holds nothing merged.
    """
    from huggingface_hub import ModelCard, ModelCardData

    origins = {name: origin for name in _PARTS[format_] if (origin := _origin(bundle, name))}
    multimodal = format_ != "merged-lm"
    data = ModelCardData(
        model_name=bundle.info.name,
        library_name="mmllm" if format_ == "merged-bundle" else "transformers",
        pipeline_tag="image-text-to-text" if multimodal else "text-generation",
        base_model=list(dict.fromkeys(origin.repo for origin in origins.values() if origin.repo)) or None,
        tags=["mmllm", *(["llava", "clip"] if multimodal else [])],
        datasets=sorted(bundle.info.data) or None,
        eval_results=list(_eval_results(bundle)) if multimodal else None,
        license=_licence(origins),
    )
    if data.license == "other":
        data.license_name = "unknown" if any(o.licence is None for o in origins.values()) else "of-each-part"
    sections = [
        f"# {bundle.info.name}",
        _introduction(bundle, format_),
        f"## How to load it\n\n{_LOADING[format_]}",
        "## Parts and their licences\n\n" + _parts_table(bundle, format_, origins),
        *(_merging(merged) if merged else ()),
        "## Data\n\n" + _data_table(bundle),
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(_without_folders(bundle.info.recipe), sort_keys=False).strip()}\n```",
        *(_metrics(bundle) if multimodal else ()),
        "## Versions\n\n" + _table(("package", "version"), sorted(bundle.info.versions.items())),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _without_folders(value: Any) -> Any:
    """A recipe whose absolute paths are file names: where they lay on somebody's machine is nobody's business."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _origin(bundle: Bundle, part: str) -> Origin | None:
    """Where a part comes from; the connector is trained with the bundle, or comes with an imported checkpoint."""
    if part == "connector":
        return bundle.profile.vision.origin if bundle.info.recipe.get("stage") == "import" else None
    config = getattr(bundle.profile, part)
    origin: Origin | None = config.origin
    if origin:
        return origin
    source = config.source
    if isinstance(source, HubSource):
        return Origin(name=source.repo, repo=source.repo)
    if isinstance(source, PackageSource):
        return Origin(name=source.requirement)
    return Origin(name=source.recipe if isinstance(source, TrainedSource) else "weights of unrecorded origin")


def _licence(origins: dict[str, Origin]) -> str:
    """The header's licence: the parts' own where they agree."""
    licences = {origin.licence for origin in origins.values()}
    return (licences.pop() if len(licences) == 1 else None) or "other"


def _introduction(bundle: Bundle, format_: ExportFormat) -> str:
    if format_ == "merged-lm":
        return f"The language model of the multimodal assistant '{bundle.info.name}', made with mmllm."
    layer, cls_token = bundle.profile.vision.feature_layer, bundle.profile.vision.cls_token
    return (
        f"A multimodal assistant made with mmllm: text and images in, text out. Its features are the outputs of CLIP's "
        f"block {layer}, {bundle.info.n_patches} an image, {'with' if cls_token else 'without'} the CLS token."
    )


def _parts_table(bundle: Bundle, format_: ExportFormat, origins: dict[str, Origin]) -> str:
    rows = []
    for part in _PARTS[format_]:
        origin = origins.get(part)
        if origin is None:
            rows.append((part, _WHAT[part], "trained with this bundle", "the publisher's to choose"))
            continue
        name = f"[{origin.name}](https://huggingface.co/{origin.repo})" if origin.repo else origin.name
        rows.append((part, _WHAT[part], name, origin.licence or "**not known**: ask whoever made it"))
    return _table(("part", "what it does", "from", "licence"), rows)


def _merging(merged: MergedAdapter) -> Iterator[str]:
    if merged.quantization == "none" and merged.adapter_sha256 is None:
        return
    adapter = f"adapter with sha256 `{merged.adapter_sha256}`" if merged.adapter_sha256 else "no adapter"
    yield (
        f"## Merging\n\nThe LM of bundle '{merged.bundle}' was held in {merged.quantization} quantization, with "
        f"{adapter}. Method: {merged.method}; written in {merged.dtype}."
    )


def _data_table(bundle: Bundle) -> str:
    if not bundle.info.data:
        return "None recorded."
    return _table(("data set", "sha256"), [(name, f"`{digest}`") for name, digest in bundle.info.data.items()])


def _scores(bundle: Bundle) -> dict[str, Scores]:
    """Scores by when they were taken: before, after, baseline."""
    return {when: scores_from_json(kinds) for when, kinds in bundle.info.metrics.get("accuracy", {}).items() if kinds}


def _metrics(bundle: Bundle) -> Iterator[str]:
    rows: list[tuple[Any, ...]] = []
    for when, scores in _scores(bundle).items():
        rows += [(f"accuracy {when} training", kind, s.asked, f"{s.accuracy:.1%}") for kind, s in scores.items()]
    if rows:
        yield "## Metrics\n\nExact match on held-out questions.\n\n" + _table(("", "kind", "asked", "found"), rows)


def _eval_results(bundle: Bundle) -> Iterator["EvalResult"]:
    from huggingface_hub import EvalResult

    for kind, score in _scores(bundle).get("after", {}).items():
        yield EvalResult(
            task_type="visual-question-answering",
            dataset_type=next(iter(bundle.info.data), "unknown"),
            dataset_name=next(iter(bundle.info.data), "unknown"),
            metric_type="accuracy",
            metric_name="accuracy" if kind == OVERALL else f"accuracy ({kind})",
            metric_value=round(score.accuracy, 4),
        )


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
