"""The API key in an `Authorization` header. Does not know which keys there are."""

import base64
import binascii


def presented_key(authorization: str, *, or_password: bool = False) -> str:
    """The key that a header presents, or "".

    Args:
        authorization: the header's value, `Bearer KEY`.
        or_password: whether `Basic` will do, with the key as password and any name: so do browsers ask for it.
    """
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if not (or_password and scheme.lower() == "basic"):
        return ""
    try:
        return base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
