"""The API is as it is described: schemathesis makes requests of `/openapi.json`, and checks replies against it.

A few dozen examples an operation; `MMLLM_TEST_EXAMPLES=1000` makes more.
"""

import os

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode

from mmllm_core.bundle import Bundle
from tests.serve_apps.conftest import ServeHere, Service

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("MMLLM_TEST_EXAMPLES", "30"))
OPERATIONS = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/audio/transcriptions"),
    ("POST", "/v1/audio/translations"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("DELETE", "/v1/files/{file_id}"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
)
"""All of them: one that is new has to be added here."""
load_all_checks()
WANTED = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


@pytest.fixture(scope="module")
def described(bundle: Bundle, serve_here: ServeHere, tmp_path_factory: pytest.TempPathFactory) -> Service:
    files = {"folder": str(tmp_path_factory.mktemp("files"))}
    return serve_here(bundle, {"limits.default_max_tokens": 4, "files": files})


def test_every_operation_is_listed(described: Service) -> None:
    paths = httpx.get(f"{described.base_url}/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, operations in paths.items() for method in operations} == set(OPERATIONS)


def test_keys_and_errors_are_described(described: Service) -> None:
    api = httpx.get(f"{described.base_url}/openapi.json").json()
    assert api["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
    chat = api["paths"]["/v1/chat/completions"]["post"]
    assert {"ApiKey": []} in chat["security"]
    assert {"400", "401", "404", "408", "413", "429", "503", "504"} <= set(chat["responses"])
    assert "422" not in chat["responses"]
    assert "security" not in api["paths"]["/healthz"]["get"]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_replies_are_as_they_are_described(described: Service, method: str, path: str) -> None:
    api = schemathesis.openapi.from_url(f"{described.base_url}/openapi.json")
    operation = api[path][method]
    cases = operation.as_strategy(GenerationMode.POSITIVE)
    if method == "POST":
        cases = st.one_of(cases, operation.as_strategy(GenerationMode.NEGATIVE))

    @given(cases)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def replies(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = described.model  # others are refused before anything happens
            for field in ("max_tokens", "max_completion_tokens"):  # or it would be talking all day
                if isinstance(case.body.get(field), int):
                    case.body[field] = min(case.body[field], 4)
        case.call_and_validate(checks=CHECKS.get_by_names(list(WANTED)), timeout=60)

    replies()
