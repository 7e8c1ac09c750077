"""CLIP's replica on real Serve: what is computed, and what is computed once."""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ray import serve

from mmllm_core.bundle import Bundle
from mmllm_core.errors import BadInput, ImageError
from serve_apps.clip_app import ClipDeployment
from serve_apps.config_files import load_serve_config
from serve_apps.embeddings import TypedText
from serve_apps.upload import Upload
from tests.serve_apps.conftest import image_uri
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

CONFIG = load_serve_config("embedded").clip


def upload(colour: str, kind: str = "png", param: str = "p") -> Upload:
    return Upload(base64.b64decode(image_uri(colour, kind=kind).partition(",")[2]), param)


MakeClip = Callable[..., Any]


@pytest.fixture(scope="module")
def make_clip(bundle: Bundle, serve_port: int) -> MakeClip:
    """Deploy CLIP alone with changed settings, counting what it decodes and encodes; the same settings once."""

    class Counting(ClipDeployment):
        def __init__(self, *args: Any):
            super().__init__(*args)
            self._counts = {"decoded": 0, "encoded": 0}
            encode, decode = self._encoder.encode_pixels, self._reader._decode

            def encode_pixels(pixels: Any) -> Any:
                self._counts["encoded"] += len(pixels)
                return encode(pixels)

            def decode_one(upload: Upload) -> Any:
                self._counts["decoded"] += 1
                return decode(upload)

            self._encoder.encode_pixels, self._reader._decode = encode_pixels, decode_one  # type: ignore[method-assign]

        def counts(self) -> dict[str, int]:
            """What was done since this was last asked."""
            told, self._counts = self._counts, {"decoded": 0, "encoded": 0}
            return told

        def held(self) -> int:
            """Requests whose images are known and not encoded yet."""
            return sum(request.begun for request in self._work._held)

    made: dict[str, Any] = {}

    def build(**settings: Any) -> Any:
        name = "-".join(["clip", *settings])
        if name not in made:
            config = CONFIG.model_copy(update=settings)
            options = {"max_ongoing_requests": 32, "ray_actor_options": {"num_cpus": 0.1}}
            clip = serve.deployment(Counting, name="Clip", **options).bind(bundle.folder, config)
            made[name] = serve.run(clip, name=name, route_prefix=None)
        made[name].counts.remote().result()
        return made[name]

    return build


def counts(clip: Any) -> tuple[int, int]:
    """Images decoded and encoded since they were last counted."""
    told = clip.counts.remote().result()
    return told["decoded"], told["encoded"]


def encoded(clip: Any, *uploads: Upload) -> Any:
    return clip.encode.remote(uploads).result()


def test_requests_that_bring_one_image_at_once_encode_it_once(make_clip: MakeClip) -> None:
    clip = make_clip(cache_bytes=0, batch_wait_s=0.5)  # so that nothing but the flight can share
    coming = [clip.encode.remote((upload("red"), upload("red", "bmp"))) for _ in range(8)]
    found = [one.result() for one in coming]
    assert counts(clip)[1] == 1
    assert all(np.array_equal(one, found[0]) for one in found)
    assert np.array_equal(found[0][0], found[0][1])


def test_the_one_who_began_may_leave(make_clip: MakeClip) -> None:
    clip = make_clip(cache_bytes=0, batch_wait_s=3)  # all are held until then
    first = clip.encode.remote((upload("blue"),))
    wait_for(lambda: clip.held.remote().result() == 1, "the first")
    others = [clip.encode.remote((upload("blue"),)) for _ in range(3)]
    wait_for(lambda: clip.held.remote().result() == 4, "the others")
    first.cancel()
    assert len([one.result() for one in others]) == 3
    assert counts(clip)[1] == 1
    with pytest.raises(BaseException, match=r"(?i)cancel"):
        first.result()


def test_bytes_that_came_before_are_not_decoded_again(make_clip: MakeClip) -> None:
    clip = make_clip()
    assert np.array_equal(encoded(clip, upload("red")), encoded(clip, upload("red")))
    assert counts(clip) == (1, 1)
    encoded(clip, upload("red", "bmp"))  # other bytes, the same picture
    assert counts(clip) == (1, 0)


def test_features_that_were_forgotten_are_computed_from_the_bytes(make_clip: MakeClip) -> None:
    clip = make_clip(cache_bytes=0, batch_wait_s=0.5)
    assert np.array_equal(encoded(clip, upload("lime")), encoded(clip, upload("lime")))
    assert counts(clip) == (2, 2)


def test_a_broken_image_names_its_own_field_each_time(make_clip: MakeClip) -> None:
    clip = make_clip()
    for param in ("a", "b"):
        with pytest.raises(Exception, match="could not be read") as caught:
            encoded(clip, upload("red"), Upload(b"no image", param))
        assert isinstance(caught.value.cause, ImageError)  # type: ignore[attr-defined]
        assert caught.value.cause.param == param  # type: ignore[attr-defined]


def test_what_is_seen_comes_with_the_key_of_the_feature_store(make_clip: MakeClip, bundle: Bundle) -> None:
    clip = make_clip()
    [seen] = clip.see.remote((upload("red"),)).result()
    assert seen.key.endswith(bundle.info.feature_fingerprint)
    assert np.array_equal(seen.features, encoded(clip, upload("red"))[0])


def test_texts_and_images_are_embedded_together_and_a_long_text_is_named(make_clip: MakeClip) -> None:
    clip = make_clip()
    found = clip.embed.remote((TypedText("red", "t"), upload("red"), TypedText("a red circle", "t"))).result()
    assert found.vectors.shape == (3, 32)
    assert found.tokens == 3 + 17 + 5  # 32 px in patches of 8, and CLS
    with pytest.raises(Exception, match="longer than the 14 tokens") as caught:
        clip.embed.remote((upload("red"), TypedText("red " * 40, "input.1"))).result()
    assert isinstance(caught.value.cause, BadInput)  # type: ignore[attr-defined]
    assert caught.value.cause.param == "input.1"  # type: ignore[attr-defined]
