"""Random reads of stored features against computing them, side by side.

In: an image size and a vision tower (random weights: what it computes costs the same). Out: a table and JSON: seconds
for each image of both, their ratio, and what checking every row adds to a read. Computing starts at the decoded image,
as a read does: both sides have decoded it to know its key.

    python -m tests.bench.bench_features                   # the embedded CLIP: 64 px, patch 8, width 96, 3 blocks
    python -m tests.bench.bench_features --tower vit-b-32  # ViT-B/32, 224 px
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from mmllm_core.config import PathSource, VisionConfig
from mmllm_core.data.feature_location import open_location
from mmllm_core.data.feature_shards import INDEX, ShardIndex, read_index, row_checksum
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.data.shard_rows import RowReader
from mmllm_core.vision import CLIP_CONFIG, CLIP_WEIGHTS, ClipEncoder

TOWERS: dict[str, dict[str, Any]] = {
    "embedded": {"image_size": 64, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32},
    "vit-b-32": {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12, "head_width": 64},
}
MERGE = {"embedded": 4, "vit-b-32": 1}
SHARD = 128
"""Images of a shard, as `embed_images` writes them."""


def build_encoder(tower: str, folder: Path) -> ClipEncoder:
    """A CLIP with random weights in open_clip's layout; features are the merged patches and CLS."""
    from open_clip.model import _build_vision_tower
    from safetensors.torch import save_file

    torch.manual_seed(0)
    built = _build_vision_tower(64, TOWERS[tower])
    save_file({f"visual.{name}": tensor for name, tensor in built.state_dict().items()}, folder / CLIP_WEIGHTS)
    values = {"model_cfg": {"embed_dim": 64, "vision_cfg": TOWERS[tower]}, "preprocess_cfg": {}}
    (folder / CLIP_CONFIG).write_text(json.dumps(values), encoding="utf-8")
    vision = VisionConfig(source=PathSource(path=folder), merge=MERGE[tower], cls_token=True)
    return ClipEncoder(vision, folder)


def read_indexes(location: str) -> list[ShardIndex]:
    """All that a store lists."""
    place = open_location(location)
    return [read_index(place, f.name.removesuffix(INDEX)) for f in place.list() if f.name.endswith(INDEX)]


def seconds_each(work: Callable[[], object], n: int, clock: Callable[[], float], repeats: int = 3) -> float:
    """Median seconds for one of the `n` things that `work` does."""
    taken = []
    for _ in range(repeats):
        start = clock()
        work()
        taken.append((clock() - start) / n)
    return statistics.median(taken)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tower", choices=sorted(TOWERS), default="embedded")
    parser.add_argument("--store", help="a folder or URL; by default a folder that is removed afterwards")
    parser.add_argument("--stored", type=int, default=5_000, help="images in the store")
    parser.add_argument("--reads", type=int, default=10_000, help="random reads")
    parser.add_argument("--computed", type=int, default=512, help="images to compute, in batches")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cpu-time", action="store_true", help="one thread's processor time: for a busy machine")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    rng = np.random.default_rng(0)

    with tempfile.TemporaryDirectory() as scratch:
        encoder = build_encoder(options.tower, Path(scratch))
        size = TOWERS[options.tower]["image_size"]
        pictures = [Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)) for _ in range(options.batch)]
        location = options.store or f"{scratch}/features"
        keys = [f"{i:064x}-{encoder.fingerprint}" for i in range(options.stored)]
        shape = (encoder.n_patches, encoder.d_vision)
        store = FeatureStore(location)
        for start in range(0, len(keys), SHARD):
            part = keys[start : start + SHARD]
            store.write(part, rng.normal(size=(len(part), *shape)).astype(np.float16))

        opening = seconds_each(lambda: FeatureStore(location), 1, clock)
        store = FeatureStore(location, cache_bytes=10**11)
        wanted = [keys[i] for i in rng.integers(0, len(keys), options.reads)]
        reader = RowReader(open_location(location))
        rows = {key: (shard, row) for shard in read_indexes(location) for row, key in enumerate(shard.keys)}
        places = [rows[key] for key in wanted]

        def read() -> None:
            for key in wanted:
                found = store.get(key)
                assert found is not None
                found.sum(dtype=np.float32)  # a view that nobody touches would cost nothing

        def read_unchecked() -> None:
            for shard, row in places:
                np.frombuffer(reader.read(shard, row), "<f2").reshape(shape).sum(dtype=np.float32)

        def compute() -> None:
            for _ in range(0, options.computed, options.batch):
                encoder.encode(pictures)

        read()  # and map
        compute()  # and warm up
        computing = seconds_each(compute, options.computed, clock)
        reading = seconds_each(read, options.reads, clock)
        unchecked = seconds_each(read_unchecked, options.reads, clock)
        data = rng.bytes(int(np.prod(shape)) * 2)
        checksum = seconds_each(lambda: [row_checksum(data) for _ in range(options.reads)], options.reads, clock)

    result = {
        "tower": options.tower,
        "shape": shape,
        "stored": options.stored,
        "reads": options.reads,
        "clock": "cpu" if options.cpu_time else "wall",
        "threads": torch.get_num_threads(),
        "compute_us": computing * 1e6,
        "read_us": reading * 1e6,
        "read_unchecked_us": unchecked * 1e6,
        "checksum_us": checksum * 1e6,
        "open_ms": opening * 1e3,
        "ratio": computing / reading,
    }
    table = Table("", "for each image", box=None, padding=(0, 2))
    table.add_row(f"computing, batches of {options.batch}", f"{computing * 1e6:,.1f} us")
    table.add_row(f"reading, {options.reads:,} at random, checked", f"{reading * 1e6:,.1f} us")
    table.add_row("the same reads unchecked", f"{unchecked * 1e6:,.1f} us")
    table.add_row("the checksum alone", f"{checksum * 1e6:,.2f} us")
    table.add_row(f"opening the store of {options.stored:,}, once", f"{opening * 1e3:,.1f} ms")
    console = Console()
    console.print(table, highlight=False)
    console.print(f"reading is {computing / reading:.1f} times faster than computing", highlight=False)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
