"""What the page says of who answers, and examples that work with it; by the profile that the API names."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.processing_utils import save_file_to_cache, save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image, ImageDraw

from serve_apps.chat_page.messages import Message

_MEDIA = Path(gr.__file__).parent / "media_assets"  # pictures and recordings that come with Gradio
_SPEECH = ("audio/heath_ledger.mp3", "Is this good advice?")
_SENSES = "CLIP sees and Whisper hears for it."
_ABOUT = {
    "embedded": (
        f"{_SENSES} It is small, for trying things out.\n\n"
        "It **can** tell shape and colour of one simple drawing, understand clear English speech, and answer short "
        "everyday questions. It **cannot** read text in pictures, tell what a photo shows, count, calculate or know "
        "the news, and it is often wrong."
    ),
    "phi": (
        f"{_SENSES} It describes photos and drawings, understands speech, and answers at length. Answers can be wrong."
    ),
}
_OTHERWISE = "Ask in words, with pictures or with recordings, as far as it sees and hears. Answers can be wrong."


def about(model: str, profile: str) -> str:
    """Who answers, in Markdown, and what can be asked of it."""
    return f"### What shall we look at?\n\n**{model}** answers. {_ABOUT.get(_family(profile), _OTHERWISE)}"


def examples(profile: str) -> list[Message]:
    """Questions `{"text", "files"}` that this profile answers well; the files lie where visitors' do."""
    match _family(profile):
        case "embedded":
            return [
                {"text": "what color is the shape?", "files": [_drawing()]},
                {"text": "What is the capital of France?", "files": []},
                *_media(_SPEECH),
            ]
        case "phi":
            photo = ("images/tower.jpg", "What is in this photo?")
            return [*_media(photo), {"text": "Why is the sky blue?", "files": []}, *_media(_SPEECH)]
    return [{"text": "Why is the sky blue?", "files": []}]


def _family(profile: str) -> str:
    return profile.partition("-")[0]


def _drawing() -> str:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).polygon([(32, 8), (58, 54), (6, 54)], fill="blue")
    path: str = save_pil_to_cache(picture, get_upload_folder(), name="drawing", format="png")
    return path


def _media(example: tuple[str, str]) -> list[Message]:
    name, text = example
    file = _MEDIA / name
    return [{"text": text, "files": [save_file_to_cache(file, get_upload_folder())]}] if file.is_file() else []
