"""What stands before the page and the API: how large a request may be, who may ask, and from which web site."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from digit.web.api import refusal
from digit.web.limits import MIB, Budget, Limits, Refused, TooLarge

BODY_SECONDS = 60.0
"""A request must have arrived within this time."""
DROPPED_BYTES = 256 * MIB
"""Of a request that is too large, read and thrown away."""

PAGE = ("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/pwa_icon")
PAGE_BELOW = ("/api/", "/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
GRADIO = ("queue/join", "queue/data", "cancel", "reset", "startup-events", "info", "app_id", "theme.css")
"""What our page needs of Gradio. Its file server, uploads to disk, proxy and the rest stay closed."""

HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Forbidden(Refused):
    """Not from there."""

    status = 403


class Unknown(Refused):
    """No such address."""

    status = 404


class Guard:
    """An ASGI application around another.

    Args:
        app: what is guarded.
        limits: size of a request.
        budget: bytes that requests may hold together.
        auth: (user, password) asked by HTTP Basic, or None for everybody.
        hosts: names under which the server may be addressed, so that no other web site can point its own name here;
            None for any.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        budget: Budget,
        auth: tuple[str, str] | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        self.app, self.limits, self.budget, self.hosts = app, limits, budget, hosts
        self._secret = None if auth is None else f"{auth[0]}:{auth[1]}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, _with_headers(send))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if not self._knows(headers):
            asking = {"WWW-Authenticate": 'Basic realm="digit", charset="UTF-8"'}
            await JSONResponse({"error": "This server asks for a user and a password."}, 401, asking)(
                scope, receive, send
            )
            return
        try:
            self._check(scope, headers)
        except Refused as error:
            await _drop(receive)
            await refusal(error)(scope, receive, send)
            return
        with self.budget.hold() as take:
            try:
                body = await asyncio.wait_for(self._body(receive, take), BODY_SECONDS)
            except Refused as error:
                await refusal(error)(scope, receive, send)
            except asyncio.TimeoutError:
                await Response(status_code=408)(scope, receive, send)
            else:
                if body is not None:
                    await self.app(scope, _after(body, receive), send)

    def _knows(self, headers: Headers) -> bool:
        if self._secret is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        try:
            return kind.lower() == "basic" and hmac.compare_digest(base64.b64decode(given), self._secret)
        except (binascii.Error, ValueError):
            return False

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise Forbidden(f"This server is not called '{host}'; it answers to: {', '.join(sorted(self.hosts))}.")
        if scope["method"] not in ("GET", "HEAD") and _from_elsewhere(headers, host):
            raise Forbidden("Requests from the pages of other web sites are not served.")
        if not _is_open(scope["path"]):
            raise Unknown(f"There is nothing at {scope['path']}.")
        declared = headers.get("content-length", "0")
        self._check_size(int(declared) if declared.isdecimal() else 0)

    async def _body(self, receive: Receive, take: Callable[[int], None]) -> bytes | None:
        """The request's body; None if the client left while sending it."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(part)
            try:
                self._check_size(size)
                take(len(part))
            except Refused:
                if more:
                    await _drop(receive)
                raise
            parts.append(part)
            if not more:
                return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self.limits.body_bytes:
            raise TooLarge(
                f"The request is larger than what is taken here: files of up to {self.limits.upload_mb} MiB."
            )


async def _drop(receive: Receive) -> None:
    """Read what a refused client still sends, without keeping it: one that is cut off would not read the refusal."""

    async def read() -> None:
        dropped, more = 0, True
        while more and dropped < DROPPED_BYTES:
            message = await receive()
            dropped += len(message.get("body", b""))
            more = message.get("more_body", False)

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), BODY_SECONDS)


def _name(host: str) -> str:
    """A Host header without its port."""
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{host}").hostname or ""
    return ""


def _from_elsewhere(headers: Headers, host: str) -> bool:
    """Whether a page of another web site sends this; programs say neither."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("://")[2] != host


def _is_open(path: str) -> bool:
    below = path.removeprefix("/gradio_api/")
    return path in PAGE or path.startswith(PAGE_BELOW) or (below != path and below.rstrip("/") in GRADIO)


def _after(body: bytes, receive: Receive) -> Receive:
    """Hand out a body that was read already, then whatever comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message


def _with_headers(send: Send) -> Send:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return sending
