"""Questions of one's own: a file in LLaVA's format, each of whose answers is the right one to the question before it.

Does not know how questions are asked.
"""

from pathlib import Path

from mmllm_core.conversation import TextPart
from mmllm_core.data.conversation_file import file_rows, tell_format
from mmllm_core.data.rows import sample_of
from mmllm_core.data.sample import Question
from mmllm_core.errors import DataError
from mmllm_core.evaluation.accuracy import OVERALL


def file_questions(file: Path, images: Path | None = None) -> list[Question]:
    """All questions of a file, in its order; each is asked by itself, whatever stood before it in its row.

    Args:
        images: folder that the file's image names start from; the file's own if None.

    Raises:
        DataError: the file cannot be read, is not in LLaVA's format, or has a row with no image or several.
    """
    if tell_format(file) != "llava":
        raise DataError(f"{file}: is not in LLaVA's format, whose rows have 'image' and 'conversations'")
    questions = []
    for row in file_rows(file, "llava"):
        sample = sample_of(row, source=file.stem, images=images or file.absolute().parent)
        if len(sample.images) != 1:
            raise DataError(f"{file}: row {row['id']}: has {len(sample.images)} images, and a question is about one")
        turns = [m for m in sample.messages if m.role != "system"]
        for i, (asked, answered) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            text, right = (
                " ".join(part.text for part in turn.parts if isinstance(part, TextPart)) for turn in (asked, answered)
            )
            questions.append(Question(f"{sample.id}-{i}", sample.images[0], text, right, OVERALL))
    return questions
