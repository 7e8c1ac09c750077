"""Embedding computes exactly what is missing, on real Ray Data with a tiny random CLIP."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.local import local_ray, quieten
from mmllm_core.config import PathSource, VisionConfig
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.errors import FeatureStoreError, TrainingError
from mmllm_core.models.home import features_folder
from mmllm_core.vision import ClipEncoder, decode_image
from train_jobs.embed_images import EmbedOptions, embed_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    quieten()
    with local_ray():
        yield


@pytest.fixture(scope="module")
def encoder(tiny_clip: Callable[..., Path]) -> ClipEncoder:
    weights = tiny_clip()
    return ClipEncoder(VisionConfig(source=PathSource(path=weights)), weights)


def save_images(folder: Path, n: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return paths


def key(encoder: ClipEncoder, path: Path) -> str:
    return encoder.key(decode_image(path.read_bytes(), 10_000))


def weights(encoder: ClipEncoder) -> Path:
    source = encoder.config.source
    assert isinstance(source, PathSource)
    return source.path


def test_a_run_that_was_cut_short_is_finished_by_the_next(encoder: ClipEncoder, tmp_path: Path) -> None:
    paths = save_images(tmp_path / "images", 12)
    first = [decode_image(path.read_bytes(), 10_000) for path in paths[:5]]
    marked = np.full((5, encoder.n_patches, encoder.d_vision), 0.5, np.float16)
    FeatureStore(features_folder()).write([encoder.key(image) for image in first], marked)
    done = embed_images(iter(paths), encoder.config, weights(encoder), EmbedOptions(workers=2, batch=4))
    assert (done.new, done.stored, done.broken) == (7, 5, ())
    store = FeatureStore(features_folder())
    assert len(store) == 12
    assert np.array_equal(store.get(key(encoder, paths[0])), marked[0]), "what was stored is left as it is"
    computed = encoder.encode([decode_image(paths[8].read_bytes(), 10_000)])[0]
    np.testing.assert_allclose(store.get(key(encoder, paths[8])), computed, atol=2e-2)


def test_equal_pictures_are_encoded_once_across_workers(encoder: ClipEncoder, tmp_path: Path) -> None:
    paths = save_images(tmp_path / "images", 3)
    copies = [tmp_path / f"copy{i}.png" for i in range(45)]
    for i, copy in enumerate(copies):
        copy.write_bytes(paths[i % 3].read_bytes())
    done = embed_images(copies, encoder.config, weights(encoder), EmbedOptions(workers=2, batch=2))
    assert (done.new, done.stored) == (3, 42)
    rows = [len(np.load(path, mmap_mode="r")) for path in Path(features_folder()).glob("*.npy")]
    assert sum(rows) == 3


def test_damaged_features_are_computed_again(encoder: ClipEncoder, tmp_path: Path) -> None:
    paths = save_images(tmp_path / "images", 4)
    assert embed_images(paths, encoder.config, weights(encoder)).new == 4
    expected = FeatureStore(features_folder()).get(key(encoder, paths[0]))
    for array in Path(features_folder()).glob("*.npy"):
        data = bytearray(array.read_bytes())
        data[128] ^= 1  # in the first row
        array.write_bytes(data)
    damaged = FeatureStore(features_folder()).missing([key(encoder, path) for path in paths], read=True)
    assert 0 < len(damaged) < 4
    assert embed_images(paths, encoder.config, weights(encoder), EmbedOptions(verify=False)).new == 0
    assert embed_images(paths, encoder.config, weights(encoder)).new == len(damaged)
    store = FeatureStore(features_folder())
    assert store.missing([key(encoder, path) for path in paths], read=True) == []
    np.testing.assert_allclose(store.get(key(encoder, paths[0])), expected, atol=2e-2)


def test_a_broken_image_stops_the_run_or_is_left_out_and_told(encoder: ClipEncoder, tmp_path: Path) -> None:
    paths = save_images(tmp_path / "images", 2)
    (tmp_path / "broken.png").write_bytes(b"no image")
    mixed = [paths[0], tmp_path / "broken.png", paths[1], tmp_path / "absent.png"]
    with pytest.raises(TrainingError, match=r"(broken|absent)\.png: ") as caught:
        embed_images(mixed, encoder.config, weights(encoder))
    assert "\n" not in str(caught.value)
    done = embed_images(mixed, encoder.config, weights(encoder), EmbedOptions(skip_broken=True))
    assert done.new + done.stored == 2
    assert [problem.partition(": ")[0] for problem in done.broken] == [
        str(tmp_path / "absent.png"),
        str(tmp_path / "broken.png"),
    ]


def test_a_store_at_a_url_is_written_by_several_workers(
    encoder: ClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMLLM_FEATURES", f"file://{tmp_path}/elsewhere")
    paths = save_images(tmp_path / "images", 9)
    options = EmbedOptions(workers=2, batch=2)
    assert embed_images(paths, encoder.config, weights(encoder), options).new == 9
    assert len(FeatureStore(tmp_path / "elsewhere")) == 9


def test_no_images_are_no_work(encoder: ClipEncoder) -> None:
    assert embed_images([], encoder.config, weights(encoder)).new == 0


def test_a_store_that_cannot_be_used_is_refused_before_any_work(
    encoder: ClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMLLM_FEATURES", "s3:/one-slash")
    with pytest.raises(FeatureStoreError, match="two slashes"):
        embed_images(save_images(tmp_path / "images", 1), encoder.config, weights(encoder))
