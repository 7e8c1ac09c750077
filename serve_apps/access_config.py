"""Who may reach the service: a file of keys, and origins whose pages may call it.

Does not know keys (`serve_apps.api_keys`) or HTTP (`serve_apps.access`).
"""

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from mmllm_core.config import StrictModel
from mmllm_core.errors import ConfigError


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


class AccessConfig(StrictModel):
    """Access to every route but `/healthz`, `/health` and `/readyz`."""

    keys_file: Annotated[Path, AfterValidator(_absolute)] | None = None
    """YAML file of API keys, as `mmllm keys create` writes it; every ingress replica reads it, and reads it again when
    it changes. Without it nobody needs a key, which is allowed on a loopback address alone."""
    cors_origins: list[Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.:\[\]-]+$")]] = Field(default_factory=list)
    """Origins such as `https://chat.example.com` whose pages may call the API from a browser; none by default."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def require_keys_unless_loopback(host: str | None, access: AccessConfig) -> None:
    """Refuse to serve without keys where others could reach the service.

    Args:
        host: that HTTP is served on; None where it is not served.

    Raises:
        ConfigError: it is no loopback address, and there is no file of keys.
    """
    if access.keys_file is None and host is not None and not is_loopback(host):
        raise ConfigError(
            f"HTTP is served on {host}, which others can reach, and access.keys_file is not set: make a key with "
            "'mmllm keys create NAME --file keys.yaml' and name the file there, or serve on 127.0.0.1"
        )
