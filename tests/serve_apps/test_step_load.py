"""A step of load on each modality, on real Serve: its replicas follow, the others stay, and no request is lost."""

from pathlib import Path

import pytest

from tests.bench.autoscaling import measure, summary

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_the_loaded_modality_scales_and_returns_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMLLM_HOME", "")  # so that it is put back: a home of the tiny bundle's own is set meanwhile
    monkeypatch.delenv("MMLLM_HOME")
    at_rest = {"vision": 0, "audio": 0, "text": 1}
    steps = summary(measure(tmp_path, up_to=2))
    assert [step["step"] for step in steps] == list(at_rest)
    for step in steps:
        loaded = step["step"]
        assert step["failed"] == 0
        assert step["requests"] > 0
        assert step["at_rest"] == at_rest[loaded]
        most = step["most_replicas"]
        assert most[loaded] >= 2
        assert {name: n for name, n in most.items() if name != loaded} == {
            name: n for name, n in at_rest.items() if name != loaded
        }
