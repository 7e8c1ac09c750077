"""The routes of files and embeddings, and what the API's description says of them.

Knows paths and bodies' shapes; what is done, `FilesApi` and the assistant know.
"""

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve_apps.embedding_protocol import EmbeddingRequest
from serve_apps.files_api import EXPIRES_ANCHOR, EXPIRES_SECONDS, FilesApi
from serve_apps.http_body import answered
from serve_apps.openai_replies import Json

_FORM: Json = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "An image or a sound."},
        "purpose": {"type": "string", "enum": ["vision", "user_data", "assistants"]},
        EXPIRES_ANCHOR: {"type": "string", "enum": ["created_at"]},
        EXPIRES_SECONDS: {"type": "integer", "minimum": 1},
    },
}
_LIST = [
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 10_000}},
    {
        "name": "after",
        "in": "query",
        "schema": {"type": "string"},
        "description": "The id that the list goes on after.",
    },
    {"name": "order", "in": "query", "schema": {"type": "string", "enum": ["asc", "desc"]}},
    {"name": "purpose", "in": "query", "schema": {"type": "string"}},
]


def add_file_routes(app: FastAPI, files: FilesApi, timeout_s: float) -> None:
    """Add `/v1/files`."""
    form = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}

    @app.post("/v1/files", openapi_extra=form)
    async def upload_file(request: Request) -> Response:
        """Upload an image or a sound once, to be used by its id."""
        return await answered(request, files.upload(request), timeout_s)

    @app.get("/v1/files", openapi_extra={"parameters": _LIST})
    async def list_files(request: Request) -> Response:
        """List your files."""
        return await answered(request, files.list(request), timeout_s)

    @app.get("/v1/files/{file_id}")
    async def get_file(request: Request, file_id: str) -> Response:
        """Describe a file."""
        return await answered(request, files.get(request, file_id), timeout_s)

    @app.get("/v1/files/{file_id}/content")
    async def get_file_content(request: Request, file_id: str) -> Response:
        """Download a file."""
        return await answered(request, files.content(request, file_id), timeout_s)

    @app.delete("/v1/files/{file_id}")
    async def delete_file(request: Request, file_id: str) -> Response:
        """Delete a file."""
        return await answered(request, files.delete(request, file_id), timeout_s)


def add_embedding_route(app: FastAPI, embed: Callable[[Request], Awaitable[Response]], timeout_s: float) -> Json:
    """Add `/v1/embeddings`.

    Returns:
        The parts of its body, for the API's description.
    """
    body = EmbeddingRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts: Json = body.pop("$defs")
    one = {"anyOf": [{"type": "string"}, body["properties"]["input"]["items"]]}
    body["properties"]["input"] = {"anyOf": [*one["anyOf"], {"type": "array", "minItems": 1, "items": one}]}
    content = {"application/json": {"schema": body}}

    @app.post("/v1/embeddings", openapi_extra={"requestBody": {"required": True, "content": content}})
    async def embeddings(request: Request) -> Response:
        """CLIP's vectors of images and texts, in one space."""
        return await answered(request, embed(request), timeout_s)

    return parts
