"""What the engine is told of a prompt's content tells images apart and nothing else."""

import numpy as np

from mmllm_core.conversation import IMAGE_TOKEN_ID
from serve_apps.phi_app import content_of

IMAGE = IMAGE_TOKEN_ID


def test_text_is_its_tokens() -> None:
    assert content_of([5, 6, 7], None, 2) == (5, 6, 7)


def test_images_are_named_by_their_features() -> None:
    one, other = np.random.default_rng(0).random((2, 3, 4)).astype(np.float16)
    ids = [5, IMAGE, IMAGE, 6, IMAGE, IMAGE]
    content = content_of(ids, np.stack([one, other]), 2)
    assert (content[0], content[3]) == (5, 6)
    assert len(set(content)) == 6
    assert all(key < 0 for key in (*content[1:3], *content[4:]))
    swapped = content_of(ids, np.stack([other, one]), 2)
    assert (swapped[1:3], swapped[4:]) == (content[4:], content[1:3])
    assert content_of(ids, np.stack([one, one]), 2)[4:] == content[1:3]
