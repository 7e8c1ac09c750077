"""A program that speaks with the eSpeak NG library: JSON lines in on stdin, WAV files out on stdout.

In: `{"text", "name", "words_per_minute", "pitch"}` on a line. Out: `{"bytes": n}` on a line and then n bytes of a mono
16-bit WAV file, or `{"error": ...}`. Knows the library's C interface (speak_lib.h of 1.52) and nothing of mmllm, which
starts it as a process of its own (`mmllm_core.evaluation.speech_synthesis`).

The library carries state from one sentence to the next (the flutter of a voice, its breath), so each sentence is spoken
in a fork of a process that has not spoken yet, from one seed: what comes out depends on the line alone.
"""

import ctypes
import io
import json
import os
import sys
import wave
from pathlib import Path
from typing import Any

_SYNCHRONOUS = 2  # audio goes to the callback, in the calling thread: a library with threads could not be forked
_RATE, _PITCH = 1, 3
_CHARACTERS, _UTF8 = 1, 1
_NO_SUCH_VOICE = 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def main() -> None:
    """Speak line after line until stdin ends."""
    library, sample_rate = _load()
    for line in sys.stdin:
        wanted = json.loads(line)
        samples, status = _speak_in_a_fork(library, wanted)
        data = b""
        if status == _NO_SUCH_VOICE:
            reply: dict[str, Any] = {"error": f"eSpeak NG has no voice '{wanted['name']}'"}
        elif status:
            reply = {"error": f"eSpeak NG failed (status {status}) at {wanted['text']!r}"}
        else:
            data = _wav(samples, sample_rate)
            reply = {"bytes": len(data)}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n" + data)
        sys.stdout.buffer.flush()


def _load() -> tuple[Any, int]:
    """The library, and the sample rate of all its voices in Hz."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Synth.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
        *(ctypes.c_void_p, ctypes.c_void_p),
    ]
    data = str(Path(espeakng_loader.get_data_path()).parent).encode()
    sample_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
    if sample_rate <= 0:
        raise SystemExit("eSpeak NG does not find its data: install espeakng-loader again")
    return library, sample_rate


def _speak_in_a_fork(library: Any, wanted: dict[str, Any]) -> tuple[bytes, int]:
    """The samples, int16 (n_samples,), and the exit status of the process that spoke."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as stream:
                status = _speak(library, wanted, stream)
        finally:
            os._exit(status)  # without what the parent has registered for its own exit
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        samples = stream.read()
    return samples, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _speak(library: Any, wanted: dict[str, Any], stream: io.BufferedWriter) -> int:
    def receive(samples: Any, n_samples: int, _: Any) -> int:
        if n_samples > 0:
            stream.write(ctypes.string_at(samples, 2 * n_samples))
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))
    if library.espeak_SetVoiceByName(wanted["name"].encode()) != 0:
        return _NO_SUCH_VOICE
    library.espeak_SetParameter(_RATE, wanted["words_per_minute"], 0)
    library.espeak_SetParameter(_PITCH, wanted["pitch"], 0)
    text = wanted["text"].encode()
    return int(library.espeak_Synth(text, len(text) + 1, 0, _CHARACTERS, 0, _UTF8, None, None))


def _wav(samples: bytes, sample_rate: int) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples)
    return stream.getvalue()


if __name__ == "__main__":
    main()
