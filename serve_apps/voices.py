"""What answers in one replica of the LM, under which model name, and how another bundle takes its place.

A bundle that comes is loaded beside the one that answers. When it is ready, requests that come take it; those that are
on their way end on what they began with, and after the last of them it is let go. Does not know prompts or HTTP.
"""

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch

from mmllm_core.bundle import Bundle
from mmllm_core.engine.lora import LoraAdapter
from mmllm_core.engine.protocol import Engine, EngineLoad
from mmllm_core.errors import ConfigError
from mmllm_core.model import MultimodalLM
from serve_apps.config import PhiConfig
from serve_apps.phi_engine import SharedBase, start_engine, start_shared
from serve_apps.servable import require_reloadable, require_servable
from serve_apps.served_bundles import Base, ServedBundle, base_of, require_base


@dataclass(eq=False)
class Voice:
    """What answers under one name."""

    model: MultimodalLM
    engine: Engine
    n_image_tokens: int
    adapter: LoraAdapter | None = None
    namespace: str = ""
    """Keeps apart what bundles computed in one engine."""
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


@dataclass(eq=False)
class _Held:
    """A voice in memory; who holds this sees it replaced."""

    voice: Voice


class Voices:
    """The voices of a replica; loads the first as it is made.

    A single bundle has an engine of its own, its adapter merged. Several (`PhiConfig.adapters`) share one engine, in
    which every request has its bundle's adapter; their adapters and connectors are loaded when they are asked for, and
    Serve is told which are here, so that it sends requests where their bundle is (`ray.serve.multiplexed`).

    Args:
        first: the first bundle, opened.
        bundles: by model name; the first is the one that is asked for where no name is given.

    Raises:
        BundleError, WeightsError, ConfigError, ExportError, EngineError: the first cannot be loaded.
    """

    def __init__(self, first: Bundle, bundles: Mapping[str, ServedBundle], config: PhiConfig):
        self._bundles = dict(bundles)
        self._first = next(iter(bundles))
        self._config = config
        self._letting_go: set[asyncio.Task[None]] = set()
        self._shared: SharedBase | None = None
        self._held: WeakValueDictionary[str, _Held] = WeakValueDictionary()
        self.base: Base = base_of(first)
        """What every bundle that is served here shares."""
        torch.set_num_threads(config.n_threads)
        with ThreadPoolExecutor(1) as starting:  # its team of threads ends with it: the engine's shall be the only one
            if config.adapters:
                self._shared = starting.submit(start_shared, first, config).result()
            self._only = _Held(starting.submit(self._voice, first).result())
        torch.set_num_threads(1)  # of the threads that embed prompts
        self._engines = [self._only.voice.engine]
        if config.adapters:
            from ray.serve import multiplexed

            async def load(
                model: str,
            ) -> _Held:  # Serve keeps what it holds on the function: a bound method takes nothing
                return await self._loaded(model)

            self._load = multiplexed(max_num_models_per_replica=config.adapters_in_memory)(load)

    @property
    def bundles(self) -> dict[str, ServedBundle]:
        """What is served, by model name."""
        return dict(self._bundles)

    async def of(self, model: str) -> Voice:
        """The voice of a model name; the first for an empty one.

        Raises:
            BundleError, ConfigError: its bundle cannot be loaded.
        """
        if self._shared is None or not model:
            return self._only.voice
        held: _Held = await self._load(model)
        return held.voice

    async def change(self, bundles: Mapping[str, ServedBundle]) -> None:
        """Let other bundles answer, under names that there are; what fails leaves all as it was.

        Raises:
            ConfigError: a name that is not served.
            BundleError, WeightsError, ExportError, EngineError: a bundle cannot be loaded.
        """
        if unknown := sorted(bundles.keys() - self._bundles.keys()):
            raise ConfigError(f"model '{unknown[0]}' is not served: choose one of {', '.join(self._bundles)}")
        changed = {name: bundle for name, bundle in bundles.items() if bundle != self._bundles[name]}
        if changed:
            require_reloadable(self._config)
        voices = {}
        for name, bundle in changed.items():
            with ThreadPoolExecutor(1) as starting:
                voices[name] = await asyncio.wrap_future(starting.submit(self._start, bundle))
        torch.set_num_threads(1)  # as an engine starts it has its own number, which later threads would take over
        for name, voice in voices.items():
            self._bundles[name] = changed[name]
            held = self._only if name == self._first else self._held.get(name)
            if held is None:
                continue
            old, held.voice = held.voice, voice
            if voice.engine is not old.engine:
                self._engines.append(voice.engine)
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
        self._only.voice.engine.health()

    def shutdown(self) -> None:
        """End all engines."""
        for engine in self._engines:
            engine.shutdown()

    async def _loaded(self, model: str) -> _Held:
        held = self._only
        if model != self._first:
            bundle = None
            while bundle != self._bundles[model]:  # it may change meanwhile
                bundle = self._bundles[model]
                held = _Held(await asyncio.to_thread(self._start, bundle))
        self._held[model] = held
        return held

    def _start(self, bundle: ServedBundle) -> Voice:
        opened = bundle.open()
        require_servable(opened, self._config)
        require_base(self.base, self._first, opened)
        return self._voice(opened)

    def _voice(self, bundle: Bundle) -> Voice:
        adapter = None
        if self._shared is None:
            model, engine = start_engine(bundle, self._config)
        else:
            engine = self._shared.engine
            model, adapter = self._shared.load(bundle)
        namespace = ServedBundle.of(bundle).sha256 or ""
        return Voice(model, engine, model.connector.n_tokens(bundle.info.n_patches), adapter, namespace)

    async def _let_go(self, voice: Voice) -> None:
        await voice.retired.wait()
        self._engines.remove(voice.engine)
        await asyncio.to_thread(voice.engine.shutdown)
