"""Hosts of a network on one machine: network namespaces whose links meet at a bridge, each with processes of its own.

A host sees its own network, processes, host name, shared memory and temporary folder, and the machine's other files,
as hosts do that mount one folder. Its link can be cut and mended; it can be ended, all at once. Wants root, and a
network, mount and process namespace around it that ends with it (`ISOLATED`).
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import psutil

ISOLATED = ["unshare", "--pid", "--fork", "--mount-proc", "--net", "--kill-child"]
"""Command prefix: what follows, and every host that it makes, ends when it ends, and leaves nothing behind."""

BRIDGE, NETWORK = "hosts", "10.77.0"


def lay_cable() -> None:
    """Make the bridge that all hosts are linked to, with this namespace on it as `.1`."""
    Path("/run/netns").mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "hosts", "/run/netns")
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", BRIDGE, "type", "bridge")
    _run("ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")


class Host:
    """One host, linked to the bridge from the beginning.

    Args:
        number: the last part of its address, above 1.
    """

    def __init__(self, number: int, folder: Path):
        self.name, self.address = f"host{number}", f"{NETWORK}.{number}"
        self._link = f"link{number}"
        self._log = folder / f"{self.name}.log"
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _run("ip", "link", "set", self._link, "master", BRIDGE, "up")
        for words in ("link set lo up", "link set eth0 up", f"address add {self.address}/24 dev eth0"):
            _run("ip", "-n", self.name, *words.split())
        self._names = folder / f"{self.name}.hosts"
        self._names.write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n", encoding="utf-8")
        self._init: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Start its first process, in which nothing runs yet."""
        prepare = (
            f"hostname {self.name} && mount --bind {self._names} /etc/hosts && "
            "mount -t tmpfs shm /dev/shm && mkdir -p /tmp/ray && mount -t tmpfs tmp /tmp/ray && "
            "echo booted && exec sleep infinity"
        )
        namespaces = ("unshare", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "--kill-child")
        self._init = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *namespaces, "sh", "-c", prepare], stdout=subprocess.PIPE
        )
        assert self._init.stdout
        if self._init.stdout.readline() != b"booted\n":
            raise RuntimeError(f"{self.name} did not boot")

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Run a command on it."""
        enter = ["nsenter", "--target", str(self._first()), "--net", "--mount", "--pid", "--uts", "--ipc"]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*enter, f"--wdns={os.getcwd()}", *command],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def cut(self) -> None:
        """Nothing passes between it and the others; nobody is told."""
        _run("ip", "link", "set", self._link, "down")

    def mend(self) -> None:
        """Everything passes again."""
        _run("ip", "link", "set", self._link, "up")

    def end(self) -> None:
        """As if its plug were pulled: the link falls, and every process is gone."""
        assert self._init
        self.cut()
        self._init.kill()
        self._init.wait()
        self._init = None

    def command_lines(self, word: str = "") -> list[str]:
        """Of its processes, those with a word in them."""
        if self._init is None:
            return []
        found = []
        mine = _process_namespace(self._first())
        for process in psutil.process_iter():
            try:
                if _process_namespace(process.pid) == mine:
                    found.append(" ".join(process.cmdline()))
            except (psutil.Error, OSError):
                continue
        return [line for line in found if word in line]

    def _first(self) -> int:
        assert self._init
        (first,) = psutil.Process(self._init.pid).children()
        return first.pid

    def said(self) -> str:
        """What its commands have printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")


def _process_namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")


def _run(*command: Any) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
