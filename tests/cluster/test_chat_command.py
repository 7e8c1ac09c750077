"""`mmllm chat` as a person and as a shell use it, against the real API in this process: REPL, pipes and exit codes."""

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmllm_core.bundle import Bundle
from mmllm_core.engine.protocol import EngineChunk
from serve_apps.config_files import load_serve_config
from serve_apps.in_process import serving_in_process
from serve_apps.phi_app import PhiDeployment
from serve_apps.prompt import Prompt
from serve_apps.served_bundles import ServedBundle
from tests.serve_apps.conftest import bundle, recorded_speech, wav
from tests.waiting import wait_for

__all__ = ["bundle"]  # a fixture

SPOKEN = "something, never do it for free"


class LeisurelyPhi(PhiDeployment):
    """The real LM, which may be told to wait before each piece, so that there is time to stop it."""

    pause_s = 0.0
    answering = 0
    pieces = 0

    async def generate(self, prompt: Prompt) -> AsyncGenerator[EngineChunk, None]:
        self.answering += 1
        try:
            async for chunk in super().generate(prompt):
                yield chunk
                self.pieces += 1
                await asyncio.sleep(self.pause_s)
        finally:
            self.answering -= 1


@dataclass(frozen=True)
class Served:
    url: str
    phi: LeisurelyPhi


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[Served]:
    settings = {"ui": False, "phi.kv_cache_bytes": 60_000_000, "phi.stream_interval_s": 0}
    config = load_serve_config("embedded", settings)
    phi = LeisurelyPhi({bundle.info.name: ServedBundle.of(bundle)}, config.phi)
    with serving_in_process(bundle, config, phi) as url:
        yield Served(url, phi)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a dot.png"
    Image.new("RGB", (48, 48), "red").save(path)
    return path


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "advice.mp3"
    path.write_bytes(recorded_speech())
    return path


def command(served: Served | None, *arguments: str) -> list[str]:
    where = ["--base-url", served.url] if served else []
    return [sys.executable, "-m", "cluster.cli", "chat", *where, "--max-tokens", "24", "--temperature", "0", *arguments]


def run(served: Served | None, *arguments: str, piped: str | bytes = b"") -> subprocess.CompletedProcess[str]:
    given = piped.encode() if isinstance(piped, str) else piped
    done = subprocess.run(command(served, *arguments), input=given, capture_output=True, timeout=120, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.lengthy
def test_what_is_piped_in_is_the_question_or_follows_it(served: Served) -> None:
    asked = run(served, "Hello there")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.strip()
    assert "\x1b" not in asked.stdout
    assert run(served, piped="Hello there\n").stdout == asked.stdout
    assert run(served, "Hello\n\nthere").stdout == run(served, "Hello", piped="there\n").stdout != asked.stdout


def test_what_was_heard_is_told_beside_the_answer(served: Served, picture: Path, recording: Path) -> None:
    done = run(served, "--image", str(picture), "--audio", str(recording))
    assert done.returncode == 0
    assert done.stderr.startswith('heard: "')
    assert SPOKEN in done.stderr
    assert done.stdout.strip()
    assert SPOKEN not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "piped", "code", "named"),
    [
        (["hi", "--model", "nobody"], b"", 1, "model 'nobody' is not served: choose one of tiny"),
        (["hi", "--image", "none.png"], b"", 1, "none.png: cannot be read: No such file"),
        ([], b"", 2, "Nothing to ask"),
        (["hi", "--max-tokens", "0"], b"", 2, "--max-tokens"),
        (["hi"], b"\xff\xfe\x00", 1, "no text in UTF-8"),
        (["word " * 3000], b"", 1, "the assistant refused"),
    ],
    ids=["a model", "a file", "nothing", "an option", "no text", "too long"],
)
def test_what_is_wrong_is_named_and_told_by_the_exit_code(
    served: Served, arguments: list[str], piped: bytes, code: int, named: str
) -> None:
    done = run(served, *arguments, piped=piped)
    assert (done.returncode, done.stdout) == (code, "")
    assert named in " ".join(done.stderr.split())


def test_ctrl_c_ends_a_question_that_is_asked_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.phi, "pause_s", 0.2)
    asking = subprocess.Popen(
        command(served, "Hello there"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert asking.stdout is not None
    os.read(asking.stdout.fileno(), 1)
    asking.send_signal(signal.SIGINT)
    _, errors = asking.communicate(timeout=60)
    assert asking.returncode == 130
    assert b"Traceback" not in errors
    wait_for(lambda: served.phi.answering == 0, "the engine to be free", 30)


def test_who_reads_no_further_hears_no_complaint(served: Served) -> None:
    whole = subprocess.list2cmdline(command(served, "Hello there"))
    done = subprocess.run(
        ["bash", "-c", f"{whole} | true; echo ${{PIPESTATUS[0]}}"], stdin=subprocess.DEVNULL, capture_output=True
    )
    assert (done.stdout, done.stderr) == (b"141\n", b"")


class Terminal:
    """A process in a terminal of its own, and what is seen there."""

    def __init__(self, process: "subprocess.Popen[bytes]", fd: int):
        self._process = process
        self._fd = fd
        self.seen = ""

    def wait_for(self, wanted: str) -> str:
        """What is shown until then, without what only moves the cursor."""
        while True:
            text = re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])|\r", "", self.seen)
            if (at := text.find(wanted)) >= 0:
                self.seen = text[at + len(wanted) :]
                return text[:at]
            assert select.select([self._fd], [], [], 60)[0], f"{wanted!r} did not come after {text!r}"
            self.seen += os.read(self._fd, 65536).decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def say(self, line: str, wanted: str = "") -> None:
        """Type a line, and wait for what shall come of it and for the next prompt."""
        self.type(line + "\r")
        self.wait_for(wanted or line)
        self.wait_for("\nyou ")

    def leave(self) -> int:
        self.type("\x04")
        with suppress(OSError):  # the other end is closed
            while os.read(self._fd, 65536):
                pass
        return self._process.wait(timeout=30)


@contextmanager
def terminal(served: Served, home: Path) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 240, 0, 0))
    environment = os.environ | {
        "MMLLM_HOME": str(home),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "COLUMNS": "240",
    }
    process = subprocess.Popen(command(served), env=environment, preexec_fn=lambda: os.login_tty(theirs))
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_conversation_in_a_terminal(served: Served, picture: Path, recording: Path, tmp_path: Path) -> None:
    saved, told = tmp_path / "talk.json", tmp_path / "talk.md"
    with terminal(served, tmp_path) as screen:
        screen.wait_for("tiny at http")
        screen.wait_for("\nyou ")
        screen.say("/help", "/image FILE")
        screen.say("/nonsense", "/nonsense is no command")
        screen.say("/image none.png", "none.png: cannot be read")
        screen.say(f"/image {recording}", "is a sound: send it as a recording")
        screen.say(f"/image '{picture}'", "a dot.png goes along")
        screen.say("what color is it?")
        screen.say(f"/audio {recording}", "advice.mp3 goes along")
        screen.say("good advice?", SPOKEN)
        screen.say("why?")
        screen.say("/model", "* tiny")
        screen.say("/model gpt", "model 'gpt' is not served")
        screen.say(f"/save {saved}", "saved to")
        screen.say(f"/save {told}", "saved to")
        screen.say(f"/save {saved}", "cannot be written: File exists")
        screen.say("/reset", "a new conversation")
        screen.say("/save other.json", "nothing to save")
        assert screen.leave() == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    kinds = [[part["type"] for part in message["content"]] for message in messages[::2]]
    assert kinds == [["image_url", "text"], ["input_audio", "text"], ["text"]]
    assert all(message["content"] for message in messages[1::2])
    assert "*image: a dot.png*\n\nwhat color is it?" in told.read_text()
    assert told.read_text().count(SPOKEN) == 1  # the third request sent the recording again


def test_ctrl_c_stops_the_answer_and_one_goes_on(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(served, tmp_path) as screen:
        screen.wait_for("you ")
        monkeypatch.setattr(served.phi, "pause_s", 0.5)
        before = served.phi.pieces
        screen.type("Hello there\r")
        wait_for(lambda: served.phi.pieces > before, "more of the answer", 30)
        screen.type("\x03")
        screen.wait_for("(stopped)")
        wait_for(lambda: served.phi.answering == 0, "the engine to be free", 30)
        monkeypatch.setattr(served.phi, "pause_s", 0.0)
        screen.wait_for("you ")
        screen.type("half a line\x03")
        screen.wait_for("you ")
        screen.say("And now?")
        assert screen.leave() == 0
    history = (tmp_path / "chat_history").read_text()
    assert "+Hello there\n" in history
    assert "half a line" not in history
    assert (tmp_path / "chat_history").stat().st_mode & 0o077 == 0
    with terminal(served, tmp_path) as screen:
        screen.wait_for("you ")
        screen.type("\x1b[A\x1b[A\r")
        screen.wait_for("Hello there")
        screen.wait_for("you ")
        assert screen.leave() == 0


@pytest.mark.parametrize(
    ("content", "option", "named"),
    [
        (b"", "image", "empty"),
        (b"hello", "image", "neither an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "image", "could not be read"),
        (b"hello", "audio", "nor a sound"),
        (b"RIFF\0\0\0\0WAVEnothing", "audio", "could not be decoded"),
        (wav(np.zeros(0)), "audio", "no samples"),
    ],
)
def test_a_file_that_nobody_could_use_is_named_before_anything_is_sent(
    content: bytes, option: str, named: str, tmp_path: Path
) -> None:
    from cluster.attachment import Attachment
    from mmllm_core.errors import BadInput

    path = tmp_path / "thing.bin"
    path.write_bytes(content)
    kind: Any = option
    with pytest.raises(BadInput, match=named) as caught:
        Attachment.read(path, kind)
    assert str(path) in str(caught.value)
