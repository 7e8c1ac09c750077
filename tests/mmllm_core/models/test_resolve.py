"""Hub sources: always a commit, whatever was asked for."""

from typing import Any

import pytest

from mmllm_core.errors import WeightsError
from mmllm_core.models.resolve import pin
from tests.mmllm_core.interop.test_push import hub  # noqa: F401, a fixture


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_a_branch_or_tag_becomes_the_commit_that_it_stands_for(revision: str | None, hub: Any) -> None:  # noqa: F811
    source = pin("owner/model", revision)
    assert source.repo == "owner/model"
    assert source.revision == "1" * 40


def test_a_commit_stands_for_itself_without_a_network() -> None:
    assert pin("owner/model", "a" * 40).revision == "a" * 40


def test_a_hub_that_does_not_answer_is_one_named_error(hub: Any) -> None:  # noqa: F811
    hub.refusal = 500
    with pytest.raises(WeightsError, match="owner/model") as caught:
        pin("owner/model", "main")
    assert "\n" not in str(caught.value)
