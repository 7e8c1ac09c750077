"""Places in which a feature store can lie: a folder, memory, and a server that speaks S3."""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ENCODER = "0123456789abcdef"


def key(name: str, encoder: str = ENCODER) -> str:
    """A feature key as `ClipEncoder.key` makes it."""
    return f"{name}-{encoder}"


def features(n: int, seed: int = 0) -> np.ndarray:
    """Random features, float16 (n, 5, 8)."""
    return np.random.default_rng(seed).normal(size=(n, 5, 8)).astype(np.float16)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a moto server. Its own packages do not go with our pins, so it lives in another environment."""
    program = os.environ.get("MMLLM_TEST_MOTO_SERVER") or shutil.which("moto_server")
    if program is None:
        pytest.skip("no moto_server: install moto[server] elsewhere and name it in MMLLM_TEST_MOTO_SERVER")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://{address}/moto-api/", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        bucket = urllib.request.Request(f"http://{address}/bucket", method="PUT")
        urllib.request.urlopen(bucket, timeout=5)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own in a bucket."""
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}?endpoint_override={s3_server}&scheme=http&region=us-east-1"


@pytest.fixture(params=["folder", "memory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty feature store's location, of each kind."""
    if request.param == "folder":
        return str(tmp_path / "features")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/features"
    return str(request.getfixturevalue("s3_url"))
