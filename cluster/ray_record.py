"""The Rays that commands of this user started and that run now: where each is, and the token that it asks for.

`rays/NAME/` in the home folder, one for each: `token`, locked by the process whose Ray it is, and `ray.json` as soon as
it can be joined. Only this user can read them. What a process that was killed left behind is known by its lock and
removed. Knows nothing of what a Ray does.
"""

import fcntl
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmllm_core.errors import EnvironmentLack
from mmllm_core.models.home import home

_VARIABLES = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
_LOOPBACK = {"127.0.0.1", "localhost"}


@dataclass(frozen=True)
class RunningRay:
    """A Ray that can be joined."""

    address: str
    """`HOST:PORT`."""
    command: str
    """The command line that started it."""
    token_file: Path
    pid: int
    """Of the process whose Ray it is: it ends with this."""
    dashboard: str | None = None
    """URL of its dashboard, where the Jobs API answers, if it has one."""


class Publish(Protocol):
    """Says where a Ray is, so that others can join it."""

    def __call__(self, address: str, dashboard: str | None = None) -> None:
        """Take `HOST:PORT`, and the URL of its dashboard."""


def token_is_named() -> bool:
    """Whether the environment says itself how to authenticate to Ray."""
    return bool(os.environ.keys() & _VARIABLES)


@contextmanager
def recording() -> Iterator[Publish]:
    """Have the Ray that the block starts ask for a token of its own; what is kept of it goes with the block.

    Yields:
        What is told where that Ray is.

    Raises:
        EnvironmentLack: the home folder cannot be written.
    """
    folder = home() / "rays" / f"{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Aside until it is locked, for whoever finds it without a lock removes it.
        made = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        lock = os.open(made / "token", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(lock, secrets.token_hex(32).encode())
        fcntl.flock(lock, fcntl.LOCK_EX)
        made.rename(folder)
    except OSError as error:
        raise EnvironmentLack(
            f"{folder}: cannot be written ({error.strerror or error}): free space or set MMLLM_HOME"
        ) from error

    def publish(address: str, dashboard: str | None = None) -> None:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        said = {"address": address, "command": command, "pid": os.getpid(), "dashboard": dashboard}
        aside = folder / "ray.json.new"
        aside.write_text(json.dumps(said), encoding="utf-8")
        aside.rename(folder / "ray.json")

    try:
        with showing_token(folder / "token"):
            yield publish
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def showing_token(file: Path) -> Iterator[None]:
    """Let this process and those it starts show Ray the token in a file; only where `token_is_named` is false."""
    from ray._raylet import AuthenticationTokenLoader, Config

    def reread() -> None:
        # Ray reads the environment as it is imported, and a token once.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)})
    reread()
    try:
        yield
    finally:
        for name in _VARIABLES:
            os.environ.pop(name, None)
        reread()


def find_running(address: str | None) -> RunningRay | None:
    """The Ray of ours at an address, or the only one; None if there is none.

    Raises:
        EnvironmentLack: no address is given and several run; the message names them.
    """
    running = running_rays()
    if address is not None:
        return next((ray for ray in running if _is_at(ray, address)), None)
    if len(running) > 1:
        named = ", ".join(f"RAY_ADDRESS={ray.address} ({ray.command})" for ray in running)
        raise EnvironmentLack(f"{len(running)} Rays run here: choose one with {named}")
    return next(iter(running), None)


def running_rays() -> list[RunningRay]:
    """All of this home that can be joined."""
    found = []
    for folder in sorted((home() / "rays").glob("[!.]*")):
        try:
            if _is_left_behind(folder):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                said = json.loads((folder / "ray.json").read_text(encoding="utf-8"))
                found.append(RunningRay(**said, token_file=folder / "token"))
        except FileNotFoundError:  # it cannot be joined yet, or no longer
            continue
    return found


def _is_left_behind(folder: Path) -> bool:
    with (folder / "token").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _is_at(ray: RunningRay, address: str) -> bool:
    host, _, port = address.rpartition(":")
    return address == ray.address or (host in _LOOPBACK and port == ray.address.rpartition(":")[2])
