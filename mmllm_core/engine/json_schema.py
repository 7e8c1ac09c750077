"""What is refused of a JSON schema before a grammar is made of it: what has no answer, or would cost too much.

Does not know grammars or tokens.
"""

import json
from typing import Any

from mmllm_core.errors import SchemaError

MAX_DEPTH = 64
"""Of lists and objects within each other: making a grammar takes far longer than in proportion."""
MAX_PROPERTIES = 200
"""Of all objects together, for the same reason: 1,500 in one object, all optional, took a minute."""
_ROUNDS = 20
_FIELD = "response_format"


def require_answerable(schema: str) -> None:
    """Refuse a schema.

    Raises:
        SchemaError: it is not JSON, is nested too deeply, has too many properties, refers to what is not in it, or
            needs itself within itself without end, so that no answer would ever be whole.
    """
    try:
        root = json.loads(schema)
    except (ValueError, RecursionError):
        raise _refused("the schema is not valid JSON") from None
    depth, properties = _extent(root)
    if depth > MAX_DEPTH:
        raise _refused(f"the schema is nested more than {MAX_DEPTH} deep")
    if properties > MAX_PROPERTIES:
        raise _refused(f"the schema has {properties} properties, and at most {MAX_PROPERTIES} are allowed")
    try:
        is_finite = _Finite(root).has_answer()
    except RecursionError:
        raise _refused("the schema's parts refer to each other in too long a row") from None
    if not is_finite:
        raise _refused("the schema needs itself within itself: no answer would ever be whole")


def _extent(root: Any) -> tuple[int, int]:
    """How deep lists and objects lie in each other, and how many properties there are; counted level by level."""
    depth, properties, level = 0, 0, [root]
    while level:
        properties += sum(len(_items(value.get("properties"))) for value in level if isinstance(value, dict))
        level = [item for value in level for item in _items(value)]
        depth += bool(level)
    return depth, properties


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return _list(value)


class _Finite:
    """Finds the schemas that have a finite answer: those that need no other, and then those that need only these."""

    def __init__(self, root: Any):
        self._root = root
        self._finite: set[int] = set()
        self._visited: set[int] = set()

    def has_answer(self) -> bool:
        """Whether the root has one."""
        for _ in range(_ROUNDS):
            known = len(self._finite)
            self._visited.clear()
            if self._visit(self._root):
                return True
            if len(self._finite) == known:
                break
        return False

    def _visit(self, schema: Any) -> bool:
        if not isinstance(schema, dict) or id(schema) in self._finite:
            return True
        if id(schema) in self._visited:  # within itself, or looked at in this round
            return False
        self._visited.add(id(schema))
        if is_finite := self._look(schema):
            self._finite.add(id(schema))
        return is_finite

    def _look(self, schema: dict[str, Any]) -> bool:
        needed = list(_list(schema.get("allOf")))
        if "$ref" in schema:
            needed.append(self._target(schema["$ref"]))
        properties = schema.get("properties")
        if isinstance(properties, dict):
            needed += [properties[name] for name in _list(schema.get("required")) if _is_key(name, properties)]
        least = schema.get("minItems")
        if isinstance(least, int) and least > 0:
            needed += [schema.get("items"), *_list(schema.get("prefixItems"))]
        found = [self._visit(part) for part in needed]  # all of them: what they refer to is looked up
        for name in ("anyOf", "oneOf"):
            if choices := [self._visit(part) for part in _list(schema.get(name))]:
                found.append(any(choices))
        return all(found)

    def _target(self, reference: Any) -> Any:
        if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
            raise _refused("a schema may refer to its own parts alone: '#/$defs/...'")
        value = self._root
        for step in reference.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(value, dict) or name not in value:
                raise _refused("the schema refers to a part that it does not have")
            value = value[name]
        return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_key(name: Any, properties: dict[str, Any]) -> bool:
    return isinstance(name, str) and name in properties


def _refused(reason: str) -> SchemaError:
    return SchemaError(f"'{_FIELD}': not a JSON schema that answers can keep to: {reason}", _FIELD)
