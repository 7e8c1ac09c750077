"""Forms with one file (`multipart/form-data`), read within bounds.

In: a request. Out: a `Form`, or an error that names the field. Bytes are counted while they come in; what is large lies
in a temporary file until it is whole. Does not know what forms are for.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from mmllm_core.errors import BadInput
from serve_apps.http_body import bounded_body

MAX_FIELDS = 32
MAX_FIELD_BYTES = 8192
OVERHEAD_BYTES = 64_000
"""Of a form beside its file: boundaries, headers and short fields."""

_CHARSET = re.compile(r""";\s*charset\s*=\s*("[^"]*"|[^;]*)""", re.IGNORECASE)


@dataclass(frozen=True)
class Form:
    """What a form held.

    Args:
        file: the bytes of the field `file`.
        filename: as the client called it; never to be used as a path.
        fields: the other fields, each once.
        lists: fields that may be given several times, by their names without `[]`.
    """

    file: bytes
    filename: str
    fields: Mapping[str, str]
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)


async def read_form(request: Request, max_file_bytes: int, known: Collection[str], lists: Collection[str] = ()) -> Form:
    """Read a form whose one file is in the field `file`.

    Args:
        known: names of the other fields that there may be.
        lists: names of those that there may be several of; clients write `name[]` or `name`.

    Raises:
        BadInput: not such a form, or a field that is missing, unknown, given twice, too long, or not text.
        BodyTooLarge: the form is larger than a file of `max_file_bytes` makes it.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise BadInput("the body must be a form: send it as multipart/form-data")
    async with aclosing(bounded_body(request, max_file_bytes + OVERHEAD_BYTES)) as pieces:
        headers = Headers({"content-type": _CHARSET.sub("", kind)})  # UTF-8, whatever else is asked for
        parser = MultiPartParser(headers, pieces, max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise BadInput(f"the form cannot be read: {_reason(error)}") from None
    try:
        fields: dict[str, str] = {}
        several: dict[str, list[str]] = {}
        for name, value in form.multi_items():
            if name == "file":
                continue
            if (plain := name.removesuffix("[]")) in lists and isinstance(value, str):
                several.setdefault(plain, []).append(value)
                continue
            if name not in known or isinstance(value, UploadFile):
                raise BadInput(f"'{_shown(name)}': this field is unknown", _shown(name))
            if name in fields:
                raise BadInput(f"'{name}': this field is given twice", name)
            fields[name] = value
        files = form.getlist("file")
        if len(files) != 1 or not isinstance(files[0], UploadFile):
            raise BadInput("'file': expected one file, with a name", "file")
        data = await files[0].read()
        if len(data) > max_file_bytes:
            raise BadInput(f"'file': {len(data)} bytes, and at most {max_file_bytes} are allowed", "file")
        return Form(data, files[0].filename or "", fields, several)
    finally:
        await form.close()


def _reason(error: MultiPartException) -> str:
    """What is wrong with a form, in our own words."""
    if "Too many" in error.message:
        return f"at most one file and {MAX_FIELDS} other fields are allowed"
    if "maximum size" in error.message:
        return f"a field besides the file is longer than {MAX_FIELD_BYTES} bytes"
    return "it is not a valid multipart body"


def _shown(name: str) -> str:
    return name[:64]
