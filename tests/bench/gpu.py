"""What a GPU makes of training, decoding and seeing, at real shapes with random weights.

    python -m tests.bench.gpu [qlora] [lora] [engine] [clip] [--device cuda] [--shape phi-4-mini]
    python -m tests.bench.gpu --device cpu --shape tiny     # that it runs; its figures are kept nowhere

Needs torch, transformers and peft. `qlora` (NF4, as `phi-instruct` trains) needs bitsandbytes besides, and where that
is missing says so and leaves `lora`, the same on bfloat16 weights. It runs our loss, adapter and engine, and CLIP's
tower by open_clip where that is installed; without, transformers' of the same shape.

Out: JSON by shape, and a record under `tests/bench/results/` that `make bench` takes (`--keep`). MFU is the model's own
operations over the peak of the device's data sheet (`train_jobs.throughput` has the formula and its sources,
`train_jobs.accelerators` the peaks and theirs); a frozen weight costs 4 operations a token, not 6. `of_published` sets
tokens a second beside torchtune's 2,413 of a Llama 3.1 8B QLoRA on an RTX 4090 (README of github.com/pytorch/torchtune,
packed to 2,048, compiled), scaled by parameters and peak.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mmllm_core.engine.protocol import EngineRequest, SamplingParams
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.language import add_adapter
from mmllm_core.loss import summed_cross_entropy
from tests.bench.records import Record, at_path, commit, this_machine, today, versions
from tests.bench.registry import by_name
from tests.phi4_mini import PHI4_MINI
from train_jobs.accelerators import GPUS, peak_flops
from train_jobs.throughput import ModelWork

PUBLISHED = {"tokens_per_s": 2413.0, "parameters": 8.03e9, "gpu": "RTX-4090"}
"""torchtune's README, "Memory and training speed": Llama 3.1 8B, QLoRA, batches of 2 x 2,048."""
WARM_UP = 2


@dataclass(frozen=True)
class Adapter:
    """What `add_adapter` reads of a `LoraConfig`, for machines without pydantic; values as in `phi-instruct`."""

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.05
    layers: int | None = None
    target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Shape:
    """Sizes of everything that is run."""

    lm: dict[str, Any]
    rows: int
    """Of a training batch, at most; halved as long as memory does not do."""
    length: int
    steps: int
    requests: int
    prompt: int
    answer: int
    vision: dict[str, Any]
    """As transformers' CLIPVisionConfig names it."""
    images: int
    """Of a batch."""
    adapter: Adapter = field(default_factory=Adapter)


_TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP_TINY = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
SHAPES = {
    "phi-4-mini": Shape(
        PHI4_MINI, 8, 2048, 10, 32, 128, 128, {**_CLIP_L, "image_size": 336, "patch_size": 14}, images=64
    ),
    "tiny": Shape(
        {**_TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        2,
        32,
        4,
        4,
        16,
        8,
        {**_CLIP_TINY, "image_size": 32, "patch_size": 8},
        images=4,
        adapter=Adapter(rank=4, alpha=8),
    ),
}


def build_lm(shape: Shape, device: str) -> Any:
    """A frozen Phi-3 in bfloat16 with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("phi3", **shape.lm)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return lm.eval().requires_grad_(False)


def quantize(lm: Any, device: str) -> None:
    """Put NF4 layers in the place of a block's linear ones, as `load_language_model` has transformers do."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(lm.model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear:
                continue
            settings = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.bfloat16}
            packed = Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                device="meta",
                **settings,
            )
            weight = layer.weight.data.to("cpu" if device == "cpu" else device)
            packed.weight = Params4bit(weight, requires_grad=False, module=packed, **settings).to(device)
            setattr(parent, name, packed)
    lm.is_loaded_in_4bit = True  # peft looks here


def train(shape: Shape, device: str, *, nf4: bool) -> dict[str, Any]:
    """Steps of a LoRA adapter on whole rows of random tokens, as many rows at a time as memory has room for."""
    lm = build_lm(shape, device)
    n_parameters = sum(weight.numel() for weight in lm.parameters())
    if nf4:
        quantize(lm, device)
    adapted: Any = add_adapter(lm, shape.adapter)  # type: ignore[arg-type]
    causal = adapted.get_base_model()
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.to(torch.bfloat16)  # as DeepSpeed makes of peft's float32
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device != "cpu")
    work = ModelWork.of(SimpleNamespace(causal_lm=causal, connector=nn.Identity()))  # type: ignore[arg-type]
    adapted.train()

    def step(rows: int) -> float:
        ids = torch.randint(1, shape.lm["vocab_size"], (rows, shape.length), device=device)  # (b, t)
        hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state  # (b, t, d_model)
        targets = ids[:, 1:].flatten()  # (n,)
        loss = summed_cross_entropy(causal.lm_head, hidden[:, :-1].flatten(0, 1), targets) / len(targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device

    rows, taken, losses = shape.rows, [], []
    while len(taken) < shape.steps + WARM_UP:
        began = time.perf_counter()
        try:
            losses.append(step(rows))
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise
            rows, taken, losses = rows // 2, [], []
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            continue
        taken.append(time.perf_counter() - began)
    seconds = statistics.median(taken[WARM_UP:])
    tokens = rows * shape.length
    flops = work.step_flops(tokens, shape.length, rows * (shape.length - 1))
    peak = peak_flops(device, "bfloat16")
    found = {
        "weights": "NF4" if nf4 else "bfloat16",
        "parameters": n_parameters,
        "trained": sum(weight.numel() for weight in trained),
        "rows": rows,
        "length": shape.length,
        "step_s": seconds,
        "tokens_per_s": tokens / seconds,
        "flops_per_step": flops,
        "peak_flops": peak,
        "mfu": flops / seconds / peak if peak else None,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else None,
        "losses": losses,
    }
    if peak:
        scaled = PUBLISHED["tokens_per_s"] * PUBLISHED["parameters"] / n_parameters  # type: ignore[operator]
        scaled *= peak / GPUS[str(PUBLISHED["gpu"])].flops
        found |= {"published_scaled_tokens_per_s": scaled, "of_published": tokens / seconds / scaled}
    return found


def decode(shape: Shape, device: str) -> dict[str, Any]:
    """Tokens a second of our engine, and of `generate` on a static batch, on the same prompts."""
    rates = {
        "tokens_per_s": rate_of_engine(shape, device),
        "generate_tokens_per_s": rate_of_generate(shape, device),
    }
    return rates | {
        "requests": shape.requests,
        "prompt_tokens": shape.prompt,
        "answer_tokens": shape.answer,
        "of_generate": rates["tokens_per_s"] / rates["generate_tokens_per_s"],
    }


def prompts_of(shape: Shape, run: int) -> torch.Tensor:
    """Random tokens (n, t); none begins like another, so nothing was computed before."""
    chance = torch.Generator().manual_seed(run)
    return torch.randint(1, shape.lm["vocab_size"], (shape.requests, shape.prompt), generator=chance)


def rate_of_engine(shape: Shape, device: str) -> float:
    """All requests at a time, in streams of their own."""
    on_cpu = device == "cpu"
    engine = TransformersEngine(
        build_lm(shape, device),  # its own: on CPUs it lays the weights out anew
        build_tokenizer(shape.lm["vocab_size"]),
        context_length=shape.prompt + shape.answer + 16,
        kv_cache_bytes=50_000_000 if on_cpu else 4_000_000_000,
        max_sequences=shape.requests,
        step_tokens=256 if on_cpu else 2048,
    )
    sampling = SamplingParams(max_tokens=shape.answer, min_tokens=shape.answer)

    async def ask(i: int, ids: list[int]) -> int:
        request = EngineRequest(str(i), token_ids=tuple(ids), sampling=sampling)
        return sum([len(chunk.token_ids) async for chunk in engine.generate(request)])

    async def ask_all(run: int) -> int:
        return sum(await asyncio.gather(*(ask(i, ids) for i, ids in enumerate(prompts_of(shape, run).tolist()))))

    try:
        return rate_of(lambda run: asyncio.run(ask_all(run)), device)
    finally:
        engine.shutdown()


def rate_of_generate(shape: Shape, device: str) -> float:
    """All requests as one batch."""
    lm, n = build_lm(shape, device), shape.answer

    @torch.inference_mode()
    def answer(run: int) -> int:
        ids = prompts_of(shape, run).to(device)  # (n, t)
        told = {"min_new_tokens": n, "max_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        return int(lm.generate(ids, attention_mask=torch.ones_like(ids), **told)[:, shape.prompt :].numel())

    return rate_of(answer, device)


def build_tokenizer(vocabulary: int) -> Any:
    """One that knows as many words as the LM has tokens; the engine turns tokens into text as it goes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i} ": i for i in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0 ")), eos_token="w0 ", unk_token="w0 "
    )


def see(shape: Shape, device: str) -> dict[str, Any]:
    """Images a second through CLIP's tower, from pixels that are on the device."""
    side = shape.vision["image_size"]
    tower, dtype, built = build_tower(shape, device)
    pixels = torch.randn(shape.images, 3, side, side, device=device, dtype=dtype)  # (b, 3, h, w)

    @torch.inference_mode()
    def encode(_: int) -> int:
        tower(pixels)
        return len(pixels)

    return {"images_per_s": rate_of(encode, device), "batch": shape.images, "dtype": str(dtype), "tower": built}


def build_tower(shape: Shape, device: str) -> tuple[Any, torch.dtype, str]:
    """open_clip's tower, which serving runs, or transformers' of the same shape; and which it is."""
    torch.manual_seed(0)
    dtype = torch.float16 if device != "cpu" else torch.float32
    values = shape.vision
    if find_spec("open_clip"):
        from open_clip.model import _build_vision_tower

        sizes = {"image_size": values["image_size"], "patch_size": values["patch_size"], "width": values["hidden_size"]}
        sizes |= {
            "layers": values["num_hidden_layers"],
            "head_width": values["hidden_size"] // values["num_attention_heads"],
        }
        return _build_vision_tower(64, sizes).to(device, dtype).eval(), dtype, "open_clip"
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**values)).to(device, dtype).eval(), dtype, "transformers"


def rate_of(work: Callable[[int], int], device: str, rounds: int = 3) -> float:
    """How many things a second `work(round)` does, by the median of its rounds after one that warms up."""
    rates = []
    for run in range(rounds + 1):
        began = time.perf_counter()
        done = work(run)
        if device != "cpu":
            torch.cuda.synchronize()
        rates.append(done / (time.perf_counter() - began))
    return statistics.median(rates[1:])


PARTS: dict[str, Callable[[Shape, str], dict[str, Any]]] = {
    "qlora": lambda shape, device: train(shape, device, nf4=True),
    "lora": lambda shape, device: train(shape, device, nf4=False),
    "engine": decode,
    "clip": see,
}


def measure(parts: list[str], shape: Shape, device: str) -> dict[str, Any]:
    """All parts that this machine can run, and why it cannot run the others."""
    found: dict[str, Any] = {}
    for name in parts:
        if name == "qlora" and find_spec("bitsandbytes") is None:
            found[name] = {"left_out": "bitsandbytes is not installed; 'lora' is the same on bfloat16 weights"}
        else:
            try:
                found[name] = PARTS[name](shape, device)
            except torch.cuda.OutOfMemoryError as error:
                found[name] = {"left_out": f"memory does not do: {error}".splitlines()[0]}
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def keep(printed: dict[str, Any], seconds: float) -> str:
    """Write the record that `RESULTS.md` is made of; the file."""
    (bench,) = by_name(["gpu"])
    figures = {f.path: value for f in bench.figures if (value := at_path(printed, f.path)) is not None}
    command = " ".join(["python", "-m", bench.module, *sys.argv[1:]])
    record = Record("gpu", "full", today(), this_machine(), figures, versions(), commit(), command, round(seconds, 1))
    return str(record.save())


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="phi-4-mini")
    parser.add_argument(
        "--keep", action="store_true", help="write a record for RESULTS.md: a whole run at the real shape"
    )
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"nothing is called '{min(unknown)}': choose of {', '.join(PARTS)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch sees; --device cpu --shape tiny tries the program")
    if options.keep and (options.device == "cpu" or options.shape == "tiny" or options.parts):
        parser.error("--keep: only a whole run at the real shape on a GPU is kept")
    began = time.monotonic()
    printed = {options.shape: measure(options.parts or list(PARTS), SHAPES[options.shape], options.device)}
    if options.keep:
        print(f"kept: {keep(printed, time.monotonic() - began)}", file=sys.stderr)
    print(json.dumps(printed | {"machine": this_machine(), "versions": versions()}))


if __name__ == "__main__":
    main()
