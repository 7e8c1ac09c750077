"""The door of the HTTP side: who may come in, how often, and in what shape a request may be.

A pure ASGI middleware, so streams pass through it piece by piece. Every route is behind it, whoever adds one; only
`/healthz`, `/health` and `/readyz` are open. It writes `mmllm.caller` into the scope, which `caller_of` reads. Below
`/v1` a key is given as `Authorization: Bearer`; elsewhere (the chat page, the API's description, metrics) as the
password of HTTP Basic too, for which browsers ask.

Without keys the service is for this machine alone: requests must name a loopback host, and pages of other origins are
turned away, so that no web page that somebody looks at here can use it. Does not know bodies or models' answers.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_apps.access_config import AccessConfig, is_loopback, require_keys_unless_loopback
from serve_apps.api_keys import ApiKey, KeyRing
from serve_apps.credentials import presented_key
from serve_apps.haproxy import require_proxy
from serve_apps.http_body import error_response
from serve_apps.openai_replies import Failure
from serve_apps.passage import GuardedBody, Passage
from serve_apps.rate_limit import RateLimiter
from serve_apps.ray_process import is_connected
from serve_apps.request_record import record_in

if TYPE_CHECKING:
    from serve_apps.config import ServeConfig

OPEN_PATHS = frozenset({"/health", "/healthz", "/readyz"})
"""What may be asked without a key."""


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Args:
        key: None where no keys are asked for.
    """

    key: ApiKey | None
    limiter: RateLimiter

    @property
    def owner(self) -> str:
        """The key's id, or ""."""
        return self.key.id if self.key else ""

    def allowed(self, models: Sequence[str]) -> list[str]:
        """Of models, those that the caller may ask for; others are refused as if they did not exist."""
        return [model for model in models if self.key is None or self.key.models is None or model in self.key.models]

    def spend(self, tokens: int) -> None:
        """Count what a request took; the door does, by what routes wrote into its `RequestRecord`."""
        if self.key:
            self.limiter.spend(self.key, tokens)


def caller_of(request: Request) -> Caller:
    """Who sent a request that came through the door."""
    caller: Caller = request.scope["mmllm.caller"]
    return caller


def guard(app: FastAPI, config: "ServeConfig") -> None:
    """Put the door before all routes of an app, which Serve's proxies have to listen for already.

    Raises:
        ConfigError: the file of keys cannot be used, or there is none and others can reach the proxies, or these are
            not those that the config names.
    """
    require_keys_unless_loopback(_served_on(), config.access)
    require_proxy(config)
    ring = KeyRing(config.access.keys_file) if config.access.keys_file else None  # now, for middlewares are made later
    app.add_middleware(Door, config=config, ring=ring)
    if config.access.cors_origins:  # before the door: a browser asks beforehand, and without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.access.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # clients add their own; no cookie of ours goes along
            expose_headers=["*"],
        )


class Door:
    """The middleware.

    Args:
        ring: the keys that open it; None where none are asked for.
    """

    def __init__(self, app: ASGIApp, config: "ServeConfig", ring: KeyRing | None):
        self._app = app
        self._access = config.access
        self._limits = config.limits
        self._ring = ring
        self._limiter = RateLimiter(config.ingress.max_replicas)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "websockets are not offered"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = _path_within(scope)
        is_api = path == "/v1" or path.startswith("/v1/")
        passage = Passage(send, is_head=scope["method"] == "HEAD")
        try:
            self._require_small_headers(scope)
            if path not in OPEN_PATHS:
                self._admit(scope, is_api, passage)
        except Refusal as refusal:
            record_in(scope).error = refusal.failure.code
            await error_response(refusal.failure, refusal.headers)(scope, receive, passage.send)
            return
        if passage.is_head:
            scope["method"] = "GET"
        max_bytes = None if is_api else self._limits.max_body_bytes  # routes of the API count for themselves
        body = GuardedBody(receive, passage, self._limits.body_timeout_s, max_bytes)
        try:
            with suppress(ClientDisconnect):  # who left, or was refused, is told nothing more
                await self._app(scope, body.receive, passage.send)
        finally:
            if caller := scope.get("mmllm.caller"):
                record = record_in(scope)
                caller.spend(record.prompt_tokens + record.completion_tokens)

    def _require_small_headers(self, scope: Scope) -> None:
        n_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        n_bytes += len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if n_bytes > self._limits.max_header_bytes:
            message = f"headers and URL are larger than the {self._limits.max_header_bytes} bytes that are allowed"
            raise Refusal(Failure(431, message, "headers_too_large"))

    def _admit(self, scope: Scope, is_api: bool, passage: Passage) -> None:
        headers = Headers(scope=scope)
        if self._ring is None:
            _require_local(headers, self._access)
            caller = Caller(None, self._limiter)
        else:
            caller = Caller(self._holder(self._ring, headers, is_api), self._limiter)
        if caller.key and is_api:
            verdict = self._limiter.admit(caller.key)
            passage.headers |= verdict.headers
            if verdict.lacking:
                message = (
                    f"your key has no {verdict.lacking} left this minute: try again in {verdict.retry_after_s} seconds"
                )
                raise Refusal(Failure(429, message, "rate_limit_exceeded", retry_after_s=verdict.retry_after_s))
        scope["mmllm.caller"] = caller
        record_in(scope).key = caller.owner

    def _holder(self, ring: KeyRing, headers: Headers, is_api: bool) -> ApiKey:
        given = presented_key(headers.get("authorization", ""), or_password=not is_api)
        if not is_api and not _is_of_us(headers, self._access):  # browsers send passwords along, whoever makes them ask
            raise Refusal(Failure(403, "pages of other origins may not use this page", "forbidden_origin"))
        challenge = {"www-authenticate": "Bearer" if is_api else 'Basic realm="mmllm: any name, your key as password"'}
        if not given:
            message = "no API key was given: send the header 'Authorization: Bearer KEY'"
            raise Refusal(Failure(401, message, "invalid_api_key"), challenge)
        key = ring.find(given)
        if key is None:
            raise Refusal(Failure(401, "this API key is not known here", "invalid_api_key"), challenge)
        if key.has_expired:
            raise Refusal(Failure(401, "this API key has expired: ask for a new one", "invalid_api_key"), challenge)
        return key


class Refusal(Exception):
    """A request that is turned away at the door."""

    def __init__(self, failure: Failure, headers: dict[str, str] | None = None):
        super().__init__(failure.message)
        self.failure = failure
        self.headers = headers or {}


def _served_on() -> str | None:
    """The host that Serve's proxies listen on, whatever our config says: a Serve config file has its own.

    Serve alone has proxies; an app that runs by itself is as its config says, which was checked with the config.
    """
    if not is_connected():
        return None
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    host: str | None = client.http_config.host if client else None
    return host


def _path_within(scope: Scope) -> str:
    """The path below where the app is mounted, as its router sees it."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _require_local(headers: Headers, access: AccessConfig) -> None:
    """Turn away what a page of another origin sent, under its own name (CORS) or under ours (DNS rebinding)."""
    host = _split(f"//{headers.get('host', '')}").hostname or ""
    if not is_loopback(host):
        message = "without API keys this service answers to 127.0.0.1 and localhost alone: set access.keys_file"
        raise Refusal(Failure(403, message, "forbidden_host"))
    if not _is_of_us(headers, access):
        message = "pages of other origins may not use this service: name them in access.cors_origins"
        raise Refusal(Failure(403, message, "forbidden_origin"))


def _split(url: str) -> SplitResult:
    """The parts of a URL that may be no URL at all, and is nobody's then."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _is_of_us(headers: Headers, access: AccessConfig) -> bool:
    """Whether no page asks, or one of this service or of an origin that may."""
    origin = headers.get("origin")
    return origin is None or _split(origin).netloc == headers.get("host") or origin in access.cors_origins
