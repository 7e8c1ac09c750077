"""What answers in one replica of the LM, under which model name, and how another bundle takes its place.

A bundle that comes is loaded beside the one that answers. When it is ready, requests that come take it; those that are
on their way end on what they began with, and after the last of them it is let go. Does not know prompts or HTTP.
"""

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mmllm_core.engine.protocol import Engine, EngineLoad
from mmllm_core.errors import ConfigError
from mmllm_core.model import MultimodalLM
from serve_apps.config import PhiConfig
from serve_apps.phi_engine import start_engine
from serve_apps.served_bundles import ServedBundle


@dataclass(eq=False)
class Voice:
    """What answers under one name."""

    model: MultimodalLM
    engine: Engine
    n_image_tokens: int
    users: int = 0
    retired: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nobody uses it any more and nobody will."""
    replaced: bool = False

    @contextmanager
    def used(self) -> Iterator["Voice"]:
        """Keep it for as long as the block runs."""
        self.users += 1
        try:
            yield self
        finally:
            self.users -= 1
            self._check()

    def replace(self) -> None:
        """Say that nobody will begin to use it."""
        self.replaced = True
        self._check()

    def _check(self) -> None:
        if self.replaced and not self.users:
            self.retired.set()


class Voices:
    """The voices of a replica; loads the first as it is made.

    Args:
        bundles: by model name; the first is the one that is asked for where no name is given.

    Raises:
        BundleError, WeightsError, ConfigError, ExportError, EngineError: the first cannot be loaded.
    """

    def __init__(self, bundles: Mapping[str, ServedBundle], config: PhiConfig):
        self._bundles = dict(bundles)
        self._config = config
        self._letting_go: set[asyncio.Task[None]] = set()
        torch.set_num_threads(config.n_threads)
        with ThreadPoolExecutor(1) as starting:  # its team of threads ends with it: the engine's shall be the only one
            self._voice = starting.submit(self._start, next(iter(bundles.values()))).result()
        torch.set_num_threads(1)  # of the threads that embed prompts
        self._engines = [self._voice.engine]

    @property
    def bundles(self) -> dict[str, ServedBundle]:
        """What is served, by model name."""
        return dict(self._bundles)

    async def of(self, model: str) -> Voice:
        """The voice of a model name; the first for an empty one."""
        return self._voice

    async def change(self, bundles: Mapping[str, ServedBundle]) -> None:
        """Let other bundles answer, under names that there are; what fails leaves all as it was.

        Raises:
            ConfigError: a name that is not served.
            BundleError, WeightsError, ExportError, EngineError: a bundle cannot be loaded.
        """
        if unknown := sorted(bundles.keys() - self._bundles.keys()):
            raise ConfigError(f"model '{unknown[0]}' is not served: choose one of {', '.join(self._bundles)}")
        changed = {name: bundle for name, bundle in bundles.items() if bundle != self._bundles[name]}
        for name, bundle in changed.items():
            with ThreadPoolExecutor(1) as starting:
                voice = await asyncio.wrap_future(starting.submit(self._start, bundle))
            self._engines.append(voice.engine)
            old, self._voice = self._voice, voice
            self._bundles[name] = bundle
            old.replace()
            task = asyncio.create_task(self._let_go(old))
            self._letting_go.add(task)
            task.add_done_callback(self._letting_go.discard)

    def load(self) -> EngineLoad:
        """How busy all engines are together; of their memory, the fullest."""
        loads = [engine.load() for engine in self._engines]
        return EngineLoad(
            sum(load.waiting for load in loads),
            sum(load.running for load in loads),
            sum(load.tokens_in_flight for load in loads),
            max(load.kv_use for load in loads),
        )

    def health(self) -> None:
        """Raise `EngineError` if the engine that takes requests cannot serve any more."""
        self._voice.engine.health()

    def shutdown(self) -> None:
        """End all engines."""
        for engine in self._engines:
            engine.shutdown()

    def _start(self, bundle: ServedBundle) -> Voice:
        opened = bundle.open()
        model, engine = start_engine(opened, self._config)
        return Voice(model, engine, model.connector.n_tokens(opened.info.n_patches))

    async def _let_go(self, voice: Voice) -> None:
        await voice.retired.wait()
        self._engines.remove(voice.engine)
        await asyncio.to_thread(voice.engine.shutdown)
