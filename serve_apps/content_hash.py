"""What names bytes by their content, without holding up the event loop."""

import asyncio
import hashlib

_AT_ONCE = 128_000
"""Bytes whose hash takes no longer than handing them to a thread."""


async def content_hash(data: bytes) -> str:
    """sha256 of bytes, hex."""
    return _sha256(data) if len(data) <= _AT_ONCE else await asyncio.to_thread(_sha256, data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
