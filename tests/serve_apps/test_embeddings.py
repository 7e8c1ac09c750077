"""Embeddings over HTTP: images and texts in one space, with the client that callers use."""

import base64
import concurrent.futures
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from mmllm_core.bundle import Bundle
from tests.serve_apps.conftest import ServeHere, Service, data_uri, image_part, image_uri, text_part

pytestmark = pytest.mark.slow

WIDTH = 32


@pytest.fixture(scope="module")
def service(bundle: Bundle, serve_here: ServeHere, tmp_path_factory: pytest.TempPathFactory) -> Service:
    limits = {"limits.max_body_bytes": 2_000_000, "limits.max_embeddings": 20}
    return serve_here(bundle, {"files.folder": str(tmp_path_factory.mktemp("files"))} | limits)


def vectors(service: Service, given: Any, **fields: Any) -> "np.ndarray[Any, Any]":
    reply = service.client().embeddings.create(model=service.model, input=given, **fields)
    assert (reply.object, reply.model) == ("list", service.model)
    assert [row.index for row in reply.data] == list(range(len(reply.data)))
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 0
    return np.array([row.embedding for row in reply.data], dtype=np.float32)


def test_texts_and_images_are_unit_vectors_of_open_clips_own(service: Service, bundle: Bundle) -> None:
    import open_clip
    import torch
    from safetensors.torch import load_file

    found = vectors(service, ["a red circle", image_uri("red")])
    assert found.shape == (2, WIDTH)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    folder = bundle.weights(bundle.profile.vision.source)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    reference = open_clip.model.CLIP(**config).eval()
    reference.load_state_dict(load_file(folder / "open_clip_model.safetensors"), strict=False)
    pixels = bundle.load_vision().preprocess([Image.new("RGB", (64, 64), "red")])
    with torch.inference_mode():
        text = reference.encode_text(open_clip.SimpleTokenizer(context_length=16)(["a red circle"]), normalize=True)
        image = reference.encode_image(pixels, normalize=True)
    assert np.allclose(found, np.concatenate([text.numpy(), image.numpy()]), atol=1e-4)


def test_base64_and_floats_say_the_same(service: Service) -> None:
    # The client asks for base64 unless told otherwise, and decodes it.
    assert np.array_equal(vectors(service, "red"), vectors(service, ["red"], encoding_format="float"))
    body = {"model": service.model, "input": "red", "encoding_format": "base64"}
    raw = httpx.post(f"{service.base_url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), vectors(service, "red")[0])


def test_an_image_may_be_given_in_every_way(service: Service) -> None:
    client = service.client()
    id = client.files.create(file=("a.png", base64.b64decode(image_uri("blue").partition(",")[2])), purpose="vision").id
    ways = [
        image_uri("blue"),
        image_part(image_uri("blue")),
        id,
        image_part(id),
        {"type": "file", "file": {"file_id": id}},
    ]
    found = vectors(service, ways)
    assert np.allclose(found, found[0], atol=1e-5)
    assert np.allclose(vectors(service, image_part(id)), found[0], atol=1e-5)
    assert not np.allclose(vectors(service, image_uri("red")), found[0], atol=1e-3)


def test_what_looks_like_a_name_and_is_none_is_text(service: Service) -> None:
    texts = ["file-cabinet", "data: is plural", "https://example.com"]
    assert np.allclose(vectors(service, texts), vectors(service, [text_part(text) for text in texts]), atol=1e-6)


def test_order_holds_across_batches_of_many_callers(service: Service) -> None:
    colours = ["red", "blue", "lime", "black", "white"]
    alone = {colour: vectors(service, colour)[0] for colour in colours}
    seen = {colour: vectors(service, image_uri(colour))[0] for colour in colours}

    def ask(turn: int) -> None:
        order = colours[turn % 5 :] + colours[: turn % 5]
        mixed = [one for colour in order for one in (colour, image_uri(colour))]
        wanted = [one for colour in order for one in (alone[colour], seen[colour])]
        assert np.allclose(vectors(service, mixed), wanted, atol=1e-4)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(16)))


def test_dimensions_are_those_that_there_are(service: Service) -> None:
    assert vectors(service, "red", dimensions=WIDTH).shape == (1, WIDTH)
    with pytest.raises(openai.BadRequestError) as caught:
        vectors(service, "red", dimensions=16)
    assert caught.value.param == "dimensions"


def test_texts_count_their_tokens(service: Service) -> None:
    reply = service.client().embeddings.create(model=service.model, input=["red", "a red circle"])
    assert reply.usage.prompt_tokens == 3 + 5


BAD: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "no input": ({"input": None}, 400, "input"),
    "an empty list": ({"input": []}, 400, "input"),
    "an empty text": ({"input": ""}, 400, "input.0"),
    "spaces": ({"input": ["red", "  "]}, 400, "input.1"),
    "a number": ({"input": 3}, 400, "input"),
    "token ids": ({"input": [1, 2, 3]}, 400, "input"),
    "lists of token ids": ({"input": [[1, 2], [3]]}, 400, "input"),
    "null": ({"input": [None]}, 400, "input.0"),
    "too many": ({"input": ["red"] * 21}, 400, "input"),
    "a text that is too long": ({"input": ["red", "word " * 30]}, 400, "input.1"),
    "a word without end": ({"input": "x" * 150_000}, 400, "input.0"),
    "more text than any request may hold": ({"input": ["x" * 150_000] * 2}, 400, "input"),
    "bytes that are no image": ({"input": [data_uri(b"no image")]}, 400, "input.0"),
    "a data URI that is not base64": ({"input": "data:image/png;base64,@@@"}, 400, "input.0"),
    "an image of too many pixels": ({"input": ["red", image_uri(size=(12_000, 4_000))]}, 400, "input.1"),
    "a dot": ({"input": image_uri(size=(1, 1))}, 400, "input.0"),
    "an unknown kind": ({"input": [{"type": "video"}]}, 400, "input.0.type"),
    "a part without a kind": ({"input": [{"text": "red"}]}, 400, "input.0.type"),
    "an image without a URL": ({"input": [{"type": "image_url", "image_url": {}}]}, 400, "input.0.image_url.url"),
    "an image elsewhere": ({"input": [image_part("https://example.com/a.png")]}, 400, "input.0"),
    "a file that is nobody's": ({"input": "file-" + "0" * 32}, 404, "input.0"),
    "a file that is a path": ({"input": [{"type": "file", "file": {"file_id": "../x"}}]}, 404, "input.0"),
    "sound": ({"input": [{"type": "input_audio", "input_audio": {}}]}, 400, "input.0.type"),
    "another format": ({"encoding_format": "int8"}, 400, "encoding_format"),
    "no dimensions": ({"dimensions": 0}, 400, "dimensions"),
    "dimensions in words": ({"dimensions": "many"}, 400, "dimensions"),
    "endless dimensions": ({"dimensions": 10**30}, 400, "dimensions"),
    "an unknown model": ({"model": "text-embedding-3-small"}, 404, "model"),
    "a model that is a number": ({"model": 3}, 400, "model"),
    "an unknown field": ({"inputs": "red"}, 400, "inputs"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_embedded_names_its_field(service: Service, case: str) -> None:
    changes, status, param = BAD[case]
    body = {"model": service.model, "input": "red"} | changes
    reply = httpx.post(f"{service.base_url}/v1/embeddings", json=body, timeout=60)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert "Traceback" not in reply.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"input": NaN}', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(service: Service, body: bytes) -> None:
    assert httpx.post(f"{service.base_url}/v1/embeddings", content=body).status_code == 400


def test_a_body_that_is_too_large_is_refused(service: Service) -> None:
    body = {"model": service.model, "input": "x" * 2_100_000}
    assert httpx.post(f"{service.base_url}/v1/embeddings", json=body).status_code == 413


def test_a_bundle_without_a_text_tower_embeds_images_alone(
    bundle: Bundle, serve_here: ServeHere, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    from mmllm_core.bundle import save_bundle
    from mmllm_core.vision_tower import save_vision

    source = bundle.weights(bundle.profile.vision.source)
    encoder = bundle.load_vision()
    save_vision(encoder.tower, source, tmp_path / "clip")  # as training the tower on leaves it
    lm_config = AutoConfig.from_pretrained(bundle.weights(bundle.profile.language.source))
    from mmllm_core.vision import ClipEncoder

    fingerprint = ClipEncoder(bundle.profile.vision, tmp_path / "clip").fingerprint
    info = bundle.info.model_copy(update={"name": "tiny-blind-to-words", "feature_fingerprint": fingerprint})
    other = save_bundle(
        info, bundle.load_connector(lm_config), bundle.tokenizer, vision_weights=tmp_path / "clip", make_latest=False
    )
    service = serve_here(other, {"files": None})
    assert vectors(service, image_uri()).shape == (1, WIDTH)
    with pytest.raises(openai.BadRequestError, match="no text tower") as caught:
        vectors(service, [image_uri(), "red"])
    assert caught.value.param == "input.1"
    with pytest.raises(openai.NotFoundError):
        service.client().files.list()
    with pytest.raises(openai.BadRequestError, match="files are not kept"):
        vectors(service, "file-" + "0" * 32)
