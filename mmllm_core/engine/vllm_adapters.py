"""LoRA adapters in vLLM's words: one that all requests have, or one of each request's own. Does not know sequences."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from mmllm_core.engine.lora import LoraAdapter
    from mmllm_core.engine.protocol import EngineRequest

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM can be started for."""


class VllmAdapters:
    """What vLLM is told of adapters.

    Args:
        common: folder of one, in peft's format, that every request has.
        rank: the largest rank of adapters that requests may have of their own; None if they have none.
        most: of those, how many vLLM holds at a time.
    """

    def __init__(self, common: Path | None, rank: int | None, most: int):
        self.takes_own = rank is not None
        self.settings: dict[str, Any] = {}
        self._common: Any = None
        self._n = 0
        self._own: WeakKeyDictionary[LoraAdapter, Any] = WeakKeyDictionary()
        if common is not None:
            rank = json.loads((common / "adapter_config.json").read_text())["r"]
            self._common = self._told(common.name, common)
        if rank is not None:
            known = next(known for known in _RANKS if known >= rank)
            self.settings = {"enable_lora": True, "max_lora_rank": known}
            if self.takes_own:
                self.settings["max_loras"] = most

    def of(self, request: "EngineRequest") -> Any:
        """A request's adapter; vLLM tells adapters apart by their numbers, and each object has one of its own."""
        if request.adapter is None:
            return self._common
        if request.adapter not in self._own:
            self._own[request.adapter] = self._told(request.adapter.name, request.adapter.folder)
        return self._own[request.adapter]

    def _told(self, name: str, folder: Path) -> Any:
        from vllm.lora.request import LoRARequest

        self._n += 1
        return LoRARequest(f"{name}-{self._n}", self._n, str(folder))
