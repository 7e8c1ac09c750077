"""The assistant in one process without Ray: for a Space, and wherever one process is enough.

In: a bundle and a serve config. Out: the HTTP API at a port of this machine. CLIP, Whisper and the LM are the classes
that Serve runs, and the routes with their checks and limits are the same; what a config says of replicas and scaling
has no meaning here. Does not know who asks.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from mmllm_core.bundle import Bundle
from serve_apps.assistant_app import Assistant
from serve_apps.clip_app import ClipDeployment
from serve_apps.config import ServeConfig
from serve_apps.local_handle import LocalHandle
from serve_apps.perception import Fingerprints
from serve_apps.phi_app import PhiDeployment
from serve_apps.servable import require_servable
from serve_apps.served_bundles import ServedBundle
from serve_apps.whisper_app import WhisperDeployment, require_hearing

_LEAVE_WITHIN_S = 5


@contextmanager
def serving_in_process(bundle: Bundle, config: ServeConfig, phi: Any = None) -> Iterator[str]:
    """Load a bundle and serve it at a free port of the config's host; all of it ends with the block.

    Args:
        phi: what answers, instead of a `PhiDeployment` of this process.

    Yields:
        The base URL, without `/v1`.

    Raises:
        BundleError, WeightsError, ConfigError, EngineError: the bundle cannot be loaded.
    """
    require_servable(bundle, config.phi)
    require_hearing(bundle, config.whisper)
    told = config.observability
    clip = ClipDeployment(bundle.folder, config.clip, told)
    whisper = WhisperDeployment(bundle.folder, config.whisper, told)
    name = bundle.info.name
    speaks = phi or PhiDeployment({name: ServedBundle.of(bundle)}, config.phi, told)
    try:
        clip_handle, whisper_handle, phi_handle = (LocalHandle(part) for part in (clip, whisper, speaks))
        fingerprints = Fingerprints.of(bundle, config.whisper)
        assistant = Assistant(
            clip_handle, whisper_handle, phi_handle, [name], config, fingerprints, bundle.profile.name
        )
        with _listening(assistant.app(), config.http.host) as url:
            yield url
    finally:
        speaks.shutdown()


@contextmanager
def _listening(app: FastAPI, host: str) -> Iterator[str]:
    with socket.create_server((host, 0)) as listener:  # who connects from now on waits until it is accepted
        port = listener.getsockname()[1]
        config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=_LEAVE_WITHIN_S)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
        thread.start()
        try:
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            server.should_exit = True
            thread.join()
