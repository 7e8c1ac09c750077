"""What all of OpenAI's API shares of requests: objects whose fields are known by name, and errors that name the field.

In: JSON, or values that were read of a form or a query. Out: a checked model, or a `BadInput`. Does not know which
fields there are.
"""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json

from mmllm_core.errors import BadInput
from serve_apps.limits import Limits

ModelT = TypeVar("ModelT", bound=BaseModel)


class Body(BaseModel):
    """An object of a request; unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def json_object(body: bytes, limits: Limits) -> dict[str, Any]:
    """A body that is a JSON object.

    Raises:
        BadInput: it is not, or would take far more memory than its size.
    """
    if body.count(b",") + body.count(b"[") + body.count(b"{") > limits.max_json_values:
        raise BadInput(f"the body holds more than {limits.max_json_values} values: send fewer")
    try:
        values = from_json(body, allow_inf_nan=False)  # which refuses what is nested more than 200 deep
    except ValueError as error:
        raise BadInput(f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadInput("the body must be a JSON object")
    return values


def validated(model: type[ModelT], values: dict[str, Any]) -> ModelT:
    """Values as a model.

    Raises:
        BadInput: something in them is missing, wrong or unknown; it names the first such field.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _bad_input(error.errors(include_url=False)[0]) from None


_REASONS = {
    "missing": "this field is required",
    "extra_forbidden": "this field is unknown",
    "none_required": "this field is not supported: leave it out",
    "union_tag_invalid": "unknown kind: send one of {expected_tags}",
    "union_tag_not_found": "this field is required",
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "list_type": "expected a list",
    "too_short": "expected at least one entry",
}
"""Problems that we say in our own words, by pydantic's name for them."""


def _bad_input(problem: ErrorDetails) -> BadInput:
    """What pydantic says of a body, in OpenAI's terms: the field and the reason."""
    location = list(problem["loc"])
    reason = _REASONS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    reason = reason.format(**problem.get("ctx", {})) if problem["type"] == "union_tag_invalid" else reason
    if location[0] == "messages" and len(location) > 4:
        del location[4]  # pydantic names the kind of part here, which is no field of the request
    elif location[0] == "input" and len(location) > 2:
        del location[2]
    elif location[0] == "response_format" and len(location) > 1:
        del location[1]
    elif location[0] == "stop":
        location, reason = ["stop"], "expected a string, or a list of at most 4, none of them empty"
    if problem["type"].startswith("union_tag"):
        location.append("type")
    param = ".".join(str(part) for part in location)
    return BadInput(f"'{param}': {reason}", param)
