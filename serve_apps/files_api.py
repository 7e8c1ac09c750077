"""OpenAI's files API: upload an image or a sound once, and use it by its id.

In: forms and queries. Out: OpenAI's file objects. What is uploaded is seen or heard at once, so what cannot be used is
refused here and nothing of it stays. Does not know how files lie on disk.
"""

import asyncio
from typing import Literal, get_args
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from mmllm_core.errors import BadInput
from serve_apps.access import caller_of
from serve_apps.file_store import FileStore, NewFile, OwnedFiles
from serve_apps.files_config import FilesConfig
from serve_apps.media_kind import media_kind
from serve_apps.multipart import Form, read_form
from serve_apps.openai_body import Body, validated
from serve_apps.openai_replies import Json
from serve_apps.perception import Perceiver
from serve_apps.stored_file import FileRecord, Purpose, file_missing
from serve_apps.upload import Upload

EXPIRES_ANCHOR, EXPIRES_SECONDS = "expires_after[anchor]", "expires_after[seconds]"
MAX_FILENAME_CHARS = 255
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


class ListQuery(Body):
    """What part of a list is wanted."""

    limit: int = Field(default=10_000, ge=1, le=10_000, strict=False)
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    purpose: Purpose | None = None


class FilesApi:
    """The files of whoever asks."""

    def __init__(self, config: FilesConfig, perceiver: Perceiver):
        self._config = config
        self._store = FileStore(config)
        self._perceiver = perceiver

    def of(self, request: Request) -> OwnedFiles:
        """The files of a request's owner."""
        return self._store.of(caller_of(request).owner)

    async def upload(self, request: Request) -> Response:
        """Take a file in, once it has been seen or heard.

        Raises:
            BadInput: the form or the file cannot be used, or there is no room; nothing of it is kept.
        """
        form = await read_form(request, self._config.max_file_bytes, ("purpose", EXPIRES_ANCHOR, EXPIRES_SECONDS))
        purpose, seconds = _purpose(form), _seconds(form)
        kind = media_kind(form.file, "file")
        if purpose == "vision" and kind != "image":
            raise BadInput("'purpose': 'vision' is for images: upload a sound as 'user_data'", "purpose")
        await asyncio.to_thread(self._store.make_room, len(form.file))
        perceived = await self._perceiver.examine(kind, Upload(form.file, "file"))
        new = NewFile(form.file, _shown_name(form.filename), purpose, kind, perceived, seconds)
        stored = await asyncio.to_thread(self.of(request).add, new)
        return JSONResponse(_file_object(stored.record))

    async def list(self, request: Request) -> Response:
        """List files, the newest first unless asked otherwise."""
        query = validated(ListQuery, dict(request.query_params))
        records = await asyncio.to_thread(self.of(request).list)
        records = [r for r in records if query.purpose in (None, r.purpose)]
        if query.order == "desc":
            records.reverse()
        if query.after is not None:
            places = [i for i, record in enumerate(records) if record.id == query.after]
            if not places:
                raise file_missing(query.after, "after")
            records = records[places[0] + 1 :]
        shown = records[: query.limit]
        body: Json = {
            "object": "list",
            "data": [_file_object(record) for record in shown],
            "first_id": shown[0].id if shown else None,
            "last_id": shown[-1].id if shown else None,
            "has_more": len(records) > len(shown),
        }
        return JSONResponse(body)

    async def get(self, request: Request, id: str) -> Response:
        """Describe a file."""
        stored = await asyncio.to_thread(self.of(request).get, id)
        return JSONResponse(_file_object(stored.record))

    async def content(self, request: Request, id: str) -> Response:
        """The bytes as they were uploaded, as something to save and never to show: they are a stranger's."""
        stored = await asyncio.to_thread(self.of(request).get, id)
        headers = {
            "content-disposition": f"attachment; filename*=UTF-8''{quote(stored.record.filename, safe='')}",
            "x-content-type-options": "nosniff",
            "content-security-policy": "sandbox",
        }
        data = await asyncio.to_thread(stored.content)
        return Response(data, media_type="application/octet-stream", headers=headers)

    async def delete(self, request: Request, id: str) -> Response:
        """Delete a file and all that was computed of it."""
        await asyncio.to_thread(self.of(request).delete, id)
        return JSONResponse({"id": id, "object": "file", "deleted": True})


def _file_object(record: FileRecord) -> Json:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": int(record.created_at),
        "expires_at": None if record.expires_at is None else int(record.expires_at),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
    }


def _purpose(form: Form) -> Purpose:
    given = form.fields.get("purpose")
    for purpose in _PURPOSES:
        if given == purpose:
            return purpose
    raise BadInput(f"'purpose': expected one of {', '.join(_PURPOSES)}", "purpose")


def _seconds(form: Form) -> float | None:
    anchor, seconds = form.fields.get(EXPIRES_ANCHOR), form.fields.get(EXPIRES_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise BadInput("'expires_after.anchor': expected 'created_at'", "expires_after.anchor")
    if seconds is None or not seconds.isascii() or not seconds.isdecimal() or not 0 < len(seconds) < 10:
        raise BadInput("'expires_after.seconds': expected a whole number of seconds", "expires_after.seconds")
    if int(seconds) == 0:
        raise BadInput("'expires_after.seconds': expected at least one second", "expires_after.seconds")
    return float(seconds)


def _shown_name(filename: str) -> str:
    """A name to show: of a path the last part, without what does not print."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in last if c.isprintable())[:MAX_FILENAME_CHARS] or "file"
