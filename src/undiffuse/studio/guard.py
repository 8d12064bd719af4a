"""What every request has to pass: only our own page, opened by the printed address, reaches the server.

A page of another site can send requests to this machine, and by DNS rebinding under a name of its own. So the Host must
be one of ours (a browser always sends the name in its address bar), the Origin too, and everything but the files of the
page needs the token of the printed address, which no other site can read.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from undiffuse.errors import ConfigError, UndiffuseError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_HEADER = b"x-studio-token"
MAX_JSON_BYTES, MAX_IMAGE_BYTES = 64 << 10, 32 << 20
MAX_BUFFERED_BYTES = 96 << 20
"""Bytes of the bodies that arrive at one time."""
BODY_SECONDS = 10.0
"""The time in which a body must have arrived."""
IMAGES = "/api/images"
IMAGE_TYPES = (
    "application/octet-stream",
    "image/png",
    "image/jpeg",
    "image/webp",
    "image/bmp",
    "image/tiff",
    "image/gif",
)
PROXY_HEADERS = {b"forwarded", b"x-forwarded-host", b"x-forwarded-for", b"x-forwarded-proto", b"x-original-url"}
METHODS = ("GET", "HEAD", "POST")


class RefusedError(Exception):
    """A request that gets ``status`` and one line."""

    def __init__(
        self, status: int, code: str, cause: str, fix: str = "Open the address that undiffuse studio printed"
    ) -> None:
        self.status, self.error = status, ConfigError(code, "request", cause, fix)
        super().__init__(str(self.error))


class Guard:
    """``app`` behind the checks, with security headers on every response."""

    def __init__(self, app: App, port: int, token: str, policy: str) -> None:
        self.app, self.token, self.policy = app, token.encode(), policy
        self.buffered = 0
        self.hosts = {f"127.0.0.1:{port}".encode(), f"localhost:{port}".encode()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        reply = self._with_headers(send)
        try:
            self.check(scope)
            receive = await self._body(scope, receive)
        except RefusedError as refused:
            await send_error(reply, refused.status, refused.error)
            return
        await self.app(scope, receive, reply)

    def check(self, scope: Scope) -> None:
        """Raises `RefusedError` unless the request comes from our own page, with the token where one is needed."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts = headers.get(b"host", [])
        if len(hosts) != 1:
            raise RefusedError(400, "HOST", f"it has {len(hosts)} Host headers")
        if hosts[0] not in self.hosts:
            raise RefusedError(403, "HOST", "its Host is not this server")
        if headers.keys() & PROXY_HEADERS:
            raise RefusedError(403, "PROXY", "it came through a proxy")
        if any(origin != b"http://" + hosts[0] for origin in headers.get(b"origin", [])):
            raise RefusedError(403, "ORIGIN", "it comes from another page")
        if any(site not in (b"same-origin", b"none") for site in headers.get(b"sec-fetch-site", [])):
            raise RefusedError(403, "ORIGIN", "it comes from another site")
        if scope["method"] not in METHODS:
            raise RefusedError(405, "METHOD", f"the method {scope['method']!r} is not supported")
        path: str = scope["path"]
        if not path.startswith("/"):
            raise RefusedError(400, "PATH", "its path does not begin with /")
        if path == "/api" or path.startswith("/api/"):
            tokens = headers.get(TOKEN_HEADER, [])
            if len(tokens) != 1 or not hmac.compare_digest(tokens[0], self.token):
                raise RefusedError(403, "TOKEN", "it does not have the token of this server")
        if scope["method"] == "POST":
            kinds = IMAGE_TYPES if path == IMAGES else ("application/json",)
            given = [v.split(b";")[0].strip().lower().decode("latin-1") for v in headers.get(b"content-type", [])]
            if len(given) != 1 or given[0] not in kinds:
                raise RefusedError(415, "TYPE", f"its content is not {kinds[0]}", "Send that type")

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """``receive`` that replays the body, which has arrived whole, in time and within the limit."""
        limit = 0 if scope["method"] != "POST" else MAX_IMAGE_BYTES if scope["path"] == IMAGES else MAX_JSON_BYTES
        declared = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
        if any(not value.isdigit() or len(value) > 15 or int(value) > limit for value in declared):
            raise _too_large(limit)
        if scope["method"] != "POST" and not declared:
            return receive
        try:
            body = await asyncio.wait_for(self._read(receive, limit), BODY_SECONDS)
        except TimeoutError:
            raise RefusedError(408, "SLOW", "its content did not arrive in time", "Send it again") from None
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return waiting.pop() if waiting else await receive()

        return replay

    async def _read(self, receive: Receive, limit: int) -> bytes:
        """The whole body. Raises `RefusedError` as soon as it is longer than ``limit``, or too much arrives at once."""
        parts, size = [], 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedError(400, "DISCONNECTED", "it ended before its content", "Send it again")
                part = message.get("body", b"")
                parts.append(part)
                size += len(part)
                self.buffered += len(part)
                if size > limit:
                    raise _too_large(limit)
                if self.buffered > MAX_BUFFERED_BYTES:
                    raise RefusedError(503, "BUSY", "too many bytes arrive at one time", "Send it again later")
                if not message.get("more_body", False):
                    return b"".join(parts)
        finally:
            self.buffered -= size
            parts.clear()  # the traceback of a refusal would keep them

    def _with_headers(self, send: Send) -> Send:
        extra = [
            (b"content-security-policy", self.policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"cache-control", b"no-store"),
        ]

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        return sending


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, "TOO_LARGE", f"its content has more than {limit:,} bytes", "Send less")


async def send_error(send: Send, status: int, error: UndiffuseError) -> None:
    """One line as JSON."""
    await send_json(send, status, {"error": str(error)})


async def send_json(send: Send, status: int, content: Mapping[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if status in (408, 413, 503) else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
