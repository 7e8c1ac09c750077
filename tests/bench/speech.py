"""Speech as it is served against openai-whisper, on the same clips and weights.

    python -m tests.bench.speech [--clips DIR] [--rounds 3] [--threads 2] [--out speech.json]

Three ways: `served` is `Transcriber` as the embedded profile has it (faster-whisper in int8, short windows first);
`exchanged` is the same with openai-whisper as its engine; `openai-whisper` is `whisper.transcribe` with its defaults,
as a plain program calls it. Clips are sentences and short questions spoken by Piper and eSpeak, sentences in one long
clip, and what DIR holds: `NAME.wav` with what is said in `NAME.txt`. Ways take turns clip by clip, so that other work
slows all alike; of several rounds a clip's fastest counts. Out: seconds, real-time factors, ratios and word
error rates (after Whisper's own normalisation of English), as a table and JSON.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mmllm_core.audio import SAMPLE_RATE, Transcriber, decode_audio
from mmllm_core.audio.openai_whisper_engine import load_openai_whisper
from mmllm_core.evaluation.speech_synthesis import EspeakSpeaker, PiperSpeaker
from mmllm_core.evaluation.wer import word_error_rate
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from tests.spoken_sentences import SENTENCES, joined_recordings, recordings

QUESTIONS = (
    "What color is the rectangle?",
    "Is there a red circle?",
    "How many people are in the picture?",
    "What shape is that?",
    "Where is the station?",
    "Tell me about this picture.",
    "No, thank you.",
    "Good morning.",
)
Waveform = NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """What is said, and its sound at 16 kHz."""

    kind: str
    text: str
    waveform: Waveform

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.waveform.size / SAMPLE_RATE


def spoken_clips(folder: Path | None) -> list[Clip]:
    """All clips, by kind."""
    clips = [Clip("piper", text, waveform) for text, waveform in zip(SENTENCES, recordings(), strict=True)]
    piper, espeak = PiperSpeaker(seed=3), EspeakSpeaker(seed=1)
    clips += [Clip("piper", text, decode_audio(piper.speak(text, text), 60)) for text in QUESTIONS]
    clips += [Clip("espeak", text, decode_audio(espeak.speak(text, text), 60)) for text in (*SENTENCES, *QUESTIONS)]
    espeak.close()
    clips.append(Clip("long", " ".join(SENTENCES), joined_recordings()))
    for file in sorted(folder.glob("*.wav")) if folder else []:
        text = file.with_suffix(".txt").read_text(encoding="utf-8")
        clips.append(Clip("given", text, decode_audio(file.read_bytes(), 1800)))
    return clips


def ways(threads: int) -> dict[str, Callable[[Waveform], str]]:
    """How clips are heard."""
    import torch
    import whisper

    audio = load_profile("embedded").audio
    weights = resolve(audio.source)
    exchanged = audio.model_validate(audio.model_dump() | {"engine": "openai-whisper", "compute_type": "float32"})
    transcribers = {
        "served": Transcriber(audio, weights, threads=threads),
        "exchanged": Transcriber(exchanged, weights, threads=threads),
    }
    torch.set_num_threads(threads)
    reference = load_openai_whisper(weights, "cpu")

    def plain(waveform: Waveform) -> str:
        return str(whisper.transcribe(reference, waveform, fp16=False)["text"])

    def of(name: str) -> Callable[[Waveform], str]:
        return lambda waveform: transcribers[name].transcribe(waveform).text

    return {name: of(name) for name in transcribers} | {"openai-whisper": plain}


def measure(clips: list[Clip], rounds: int, threads: int) -> dict[str, Any]:
    """Hear every clip in every way."""
    hear = ways(threads)
    for one in hear.values():
        one(clips[0].waveform)  # warms up
    fastest = {name: [float("inf")] * len(clips) for name in hear}
    heard: dict[str, list[str]] = {name: [""] * len(clips) for name in hear}
    for _ in range(rounds):
        for i, clip in enumerate(clips):
            for name, one in hear.items():
                began = time.perf_counter()
                heard[name][i] = one(clip.waveform)
                fastest[name][i] = min(fastest[name][i], time.perf_counter() - began)
    found: dict[str, Any] = {}
    for kind in ("all", "short", *dict.fromkeys(clip.kind for clip in clips)):
        chosen = [i for i, clip in enumerate(clips) if kind in ("all", clip.kind, "short" if clip.seconds < 30 else "")]
        length = sum(clips[i].seconds for i in chosen)
        found[kind] = {"clips": len(chosen), "seconds_of_sound": round(length, 1), "ways": {}}
        for name in hear:
            seconds = sum(fastest[name][i] for i in chosen)
            errors = word_error_rate([clips[i].text for i in chosen], [heard[name][i] for i in chosen])
            found[kind]["ways"][name] = {
                "seconds": round(seconds, 2),
                "real_time_factor": round(seconds / length, 4),
                "times_openai_whisper": round(sum(fastest["openai-whisper"][i] for i in chosen) / seconds, 2),
                "word_error_rate": round(errors.rate, 4),
                "errors": vars(errors),
            }
        rates = {name: way["word_error_rate"] for name, way in found[kind]["ways"].items()}
        found[kind]["more_errors"] = rates["served"] - rates["openai-whisper"]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="folder of NAME.wav and NAME.txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = measure(spoken_clips(options.clips), options.rounds, options.threads)
    table = Table("clips", "way", "seconds", "real-time factor", "times openai-whisper", "word error rate")
    for kind, row in found.items():
        for name, way in row["ways"].items():
            numbers = (way["seconds"], way["real_time_factor"], way["times_openai_whisper"])
            title = f"{kind} ({row['clips']}, {row['seconds_of_sound']} s)"
            table.add_row(title, name, *map(str, numbers), f"{way['word_error_rate']:.1%}")
        table.add_section()
    Console(width=110).print(table)
    result = {"found": found, "threads": options.threads, "machine": platform.processor() or platform.machine()}
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
