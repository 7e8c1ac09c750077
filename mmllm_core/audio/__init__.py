"""Sound -> text: bounded decoding to a 16 kHz waveform, and Whisper by either of two engines.

Does not know conversations or HTTP; a transcript becomes part of one elsewhere.
"""

from mmllm_core.audio.decode import SAMPLE_RATE, decode_audio
from mmllm_core.audio.transcriber import Transcriber, Transcription
from mmllm_core.audio.transcript import Segment, SpeechTask, Transcript, Word

__all__ = [
    "SAMPLE_RATE",
    "Segment",
    "SpeechTask",
    "Transcriber",
    "Transcript",
    "Transcription",
    "Word",
    "decode_audio",
]
