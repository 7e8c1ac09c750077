"""Sentences that differ, and recordings of them by Piper, for tests and measurements of hearing."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from mmllm_core.audio import SAMPLE_RATE, decode_audio
from mmllm_core.evaluation.speech_synthesis import PiperSpeaker

SENTENCES = (
    "The baker came down at half past two and put her hand on the side of the oven.",
    "Outside, a fox crossed the square without hurrying.",
    "A boat that travels uphill enters the empty chamber and the gates are closed behind it.",
    "Nothing is pumped, and the weight of the water does all of the work.",
    "My grandmother kept her buttons in a tin that had once held biscuits.",
    "The train to the coast leaves from platform nine every morning.",
    "She opened the window because the kitchen was full of smoke.",
    "Three children were building a dam across the stream.",
    "The doctor asked him to breathe in slowly and hold his breath.",
    "Most of the apples had fallen before anybody came to pick them.",
    "He paid for the tickets and forgot to take his change.",
    "The library is closed on Sundays and on public holidays.",
    "It rained so hard that the road to the village was under water.",
    "Please leave your wet boots beside the door.",
    "The old clock in the hall has been wrong for twenty years.",
    "Nobody could remember who had planted the tree.",
)


@cache
def recordings() -> tuple[NDArray[np.float32], ...]:
    """Each sentence as float32 (n_samples,) at 16 kHz."""
    speaker = PiperSpeaker()
    return tuple(decode_audio(speaker.speak(text, text), 60) for text in SENTENCES)


def joined_recordings(pause_s: tuple[float, ...] = (0.3, 1.0, 2.5)) -> NDArray[np.float32]:
    """All sentences, one after another, with pauses of each length in turn."""
    parts = []
    for i, recording in enumerate(recordings()):
        parts += [recording, np.zeros(int(pause_s[i % len(pause_s)] * SAMPLE_RATE), dtype=np.float32)]
    return np.concatenate(parts)
