"""What every route shares when it cannot answer: OpenAI's error body for unknown paths, methods and failures.

Does not know what the routes do.
"""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve_apps.access import OPEN_PATHS
from serve_apps.http_body import error_response, failure_of
from serve_apps.openai_replies import Failure, Json

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

ERROR_SCHEMA: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
"""OpenAI's error body."""

_ERRORS = {
    "400": "Something in the request is wrong; `param` names it.",
    "401": "The API key is missing, unknown or expired.",
    "403": "The request comes from a page of another origin, or the key may not do this.",
    "404": "There is no such path, model or object.",
    "405": "The path is there, and takes other methods.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "Too many requests; `retry-after` says when to come back.",
    "431": "Headers and URL are too large.",
    "500": "A failure that was logged.",
    "503": "A part of the assistant is starting or restarting.",
    "504": "The answer took longer than a request may take.",
}


def answer_errors(app: FastAPI) -> None:
    """Say errors of routes in OpenAI's format."""

    @app.exception_handler(HTTPException)
    async def explain(_: Request, error: HTTPException) -> Response:
        return error_response(Failure(error.status_code, str(error.detail), None), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def name_the_field(_: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        param = ".".join(str(part) for part in problem["loc"][1:]) or None
        return error_response(Failure(400, f"'{param}': {problem['msg']}", "invalid_request", param))

    @app.exception_handler(Exception)
    async def admit(request: Request, error: Exception) -> Response:
        return error_response(failure_of(error, request))


def answer_unknown_paths(app: FastAPI) -> None:
    """Below /v1 nothing falls through to the chat page, whose answers no API client understands.

    To be called when all other routes are there.
    """

    @app.api_route("/v1/{rest:path}", methods=_METHODS, include_in_schema=False)
    async def nothing_here(request: Request) -> Response:
        offered = sorted({method for route in app.routes for method in _methods_at(route, request)})
        what = f"{request.method} {request.url.path} is not offered"
        if offered:
            failure = Failure(405, f"{what}: there is {' and '.join(offered)}", "method_not_allowed")
            return error_response(failure, {"allow": ", ".join(offered)})
        return error_response(Failure(404, what, "not_found"))


def _methods_at(route: Any, request: Request) -> set[str]:
    """Methods that a route takes at a request's path, if it is not of its own method."""
    match, _ = route.matches(request.scope)
    return set(getattr(route, "methods", None) or ()) if match == Match.PARTIAL else set()


def describe(app: FastAPI, schemas: Json) -> None:
    """Complete the OpenAPI description: parts of bodies that are parsed by hand, keys, and errors.

    To be called when all routes are there.
    """
    described = app.openapi()
    components = described.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas | {"Error": ERROR_SCHEMA})
    components["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
    of_errors = {
        status: {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in _ERRORS.items()
    }
    described["paths"]["/readyz"]["get"]["responses"]["503"] = {"description": "A part does not answer."}
    for path, operations in described["paths"].items():
        for operation in operations.values():
            responses = operation.setdefault("responses", {})
            responses.pop("422", None)  # FastAPI's own, which is never sent
            if path in OPEN_PATHS:
                responses.setdefault("431", of_errors["431"])
                continue
            operation["security"] = [{"ApiKey": []}, {}]  # none where the service has no keys
            for status, response in of_errors.items():
                responses.setdefault(status, response)
