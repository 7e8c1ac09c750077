"""Schemas that no answer can keep to are refused before a grammar is made of them."""

import json
from typing import Any

import pytest

from mmllm_core.engine.json_schema import MAX_DEPTH, MAX_PROPERTIES, require_answerable
from mmllm_core.errors import SchemaError

LINK = {"type": "object", "properties": {"next": {"$ref": "#/$defs/link"}}, "required": ["next"]}


def nested(depth: int) -> Any:
    value: Any = {"type": "string"}
    for _ in range(depth):
        value = {"items": value}
    return value


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#"}, "within itself"),
        ({"allOf": [{"$ref": "#"}]}, "within itself"),
        ({"anyOf": [{"$ref": "#"}]}, "within itself"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "within itself"),
        ({"$defs": {"link": LINK}, "$ref": "#/$defs/link"}, "within itself"),
        ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "within itself"),
        ({"$ref": "file:///etc/passwd"}, "own parts alone"),
        ({"$ref": "http://169.254.169.254/"}, "own parts alone"),
        (
            {"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(1_500)}, "$ref": "#/$defs/a0"},
            "too long a row",
        ),
        ({"$ref": 3}, "own parts alone"),
        ({"$ref": "#/$defs/a"}, "does not have"),
        (nested(MAX_DEPTH + 1), "nested"),
        ({"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES + 1)}}, "properties"),
        ({"anyOf": [{"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES // 2)}}] * 3}, "properties"),
    ],
)
def test_a_schema_without_an_answer_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        require_answerable(json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "string"},
        {"$defs": {"a": {"type": "string"}}, "$ref": "#/$defs/a"},
        {"$defs": {"link": LINK | {"required": []}}, "$ref": "#/$defs/link"},
        {"anyOf": [{"type": "array", "minItems": 1, "items": {"$ref": "#"}}, {"type": "null"}]},
        {"type": "array", "items": {"$ref": "#"}},
        {  # what was in progress when it was asked for has an answer all the same
            "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]}, "b": {"$ref": "#/$defs/a"}},
            "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        },
        {"$defs": {"a/b": {"type": "null"}}, "$ref": "#/$defs/a~1b"},
        nested(MAX_DEPTH - 2),
        {"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES)}},
    ],
)
def test_a_schema_that_ends_somewhere_is_taken(schema: Any) -> None:
    require_answerable(json.dumps(schema))
