"""easy-VQA: captions, kinds, conversations, and the stream that earlier runs trained on."""

import hashlib
import json
from itertools import islice
from pathlib import Path

import pytest

from mmllm_core.config import DataConfig, EasyVqaData
from mmllm_core.conversation import Message, TextPart
from mmllm_core.data import easy_vqa
from mmllm_core.data.mixture import training_samples
from mmllm_core.errors import WeightsError

ROWS = [
    ["what color is the shape?", "blue", 0],
    ["is there not a circle?", "no", 0],
    ["is there a triangle?", "no", 0],
    ["does the image not contain a red shape?", "yes", 0],
    ["is no triangle present?", "yes", 1],
    ["is there a red shape?", "yes", 1],
    ["what shape is present?", "rectangle", 2],
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "questions.json").write_text(json.dumps(ROWS))
    return tmp_path


def test_captions_follow_from_answers_and_what_they_affirm(data: Path) -> None:
    captions = [image.caption for image in easy_vqa.load_split(data, "train")]
    assert captions == ["a blue circle", None, None]


def test_kinds_are_told_by_the_answer(data: Path) -> None:
    kinds = [q.kind for image in easy_vqa.load_split(data, "test") for q in image.questions]
    assert kinds == ["colour", "yes/no", "yes/no", "yes/no", "yes/no", "yes/no", "shape"]


def test_training_conversations_pass_every_image_each_epoch(data: Path) -> None:
    rows = list(islice(easy_vqa.training_rows(data, EasyVqaData(questions_per_image=2, caption_share=0.5), seed=3), 9))
    for epoch in range(3):
        assert {Path(row["images"][0]).stem for row in rows[3 * epoch : 3 * epoch + 3]} == {"0", "1", "2"}
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert sum(part["type"] == "image" for message in row["messages"] for part in message["parts"]) == 1


def test_held_out_questions_are_a_fixed_draw(data: Path) -> None:
    assert easy_vqa.held_out_questions(data, 3, seed=1) == easy_vqa.held_out_questions(data, None, seed=1)[:3]


def test_a_folder_without_the_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"questions\.json"):
        easy_vqa.load_split(tmp_path, "train")


RECORDED = json.loads((Path(__file__).parent / "easy_vqa_stream.json").read_text(encoding="utf-8"))
"""Made by the code that trained the first bundles: a seed must go on giving the same conversations."""
CONFIGS = {
    "embedded-instruct": EasyVqaData(questions_per_image=6, caption_share=0.1, balance_kinds=False),
    "balanced": EasyVqaData(questions_per_image=8, caption_share=0.5),
}


@pytest.mark.lengthy
@pytest.mark.parametrize("name", CONFIGS)
def test_a_seed_gives_the_conversations_that_it_always_gave(name: str, usual_packages: None) -> None:
    samples = training_samples(DataConfig(sources=(CONFIGS[name],)), RECORDED[name]["seed"])
    texts = [
        "\n".join([s.id.removeprefix("easy-vqa/"), s.images[0].name, *(_text(m) for m in s.messages)])
        for s in islice(samples, 9000)  # more than two epochs
    ]
    assert [text.split("\n") for text in texts[:3]] == RECORDED[name]["first"]
    assert hashlib.sha256("\n\n".join(texts).encode()).hexdigest() == RECORDED[name]["sha256_of_9000"]


def _text(message: Message) -> str:
    parts = [part.text if isinstance(part, TextPart) else "<image>" for part in message.parts]
    return f"{message.role}: {' | '.join(parts)}"
