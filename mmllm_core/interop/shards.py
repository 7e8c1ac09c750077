"""Named tensors -> safetensors shards and their index, as Hugging Face models are stored.

In: tensors one at a time. Out: `model-00001.safetensors` and so on, and `model.safetensors.index.json`. At most a
shard's bytes are held. Does not know models.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

SHARD_BYTES = 1_000_000_000


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors into an existing folder; no two may share memory."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(_shards(tensors), start=1):
        file = f"model-{i:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard
