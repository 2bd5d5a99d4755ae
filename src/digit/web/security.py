"""What stands before page and API: size of requests, password, name of the server, pages of other web sites."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
from typing import Any

from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from digit.web.jobs import Refused
from digit.web.schema import Limits

BODY_SECONDS = 60.0
"""A request must have arrived within this time."""
DISCARDED_BYTES = 256 << 20
"""Of a request that is too large, read and thrown away, for a client that is cut off does not read the refusal."""
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'self'"
DOCS_POLICY = POLICY.replace("'self';", "'self' 'unsafe-inline';", 1)  # Swagger UI starts with an inline script


def error_response(error: Exception, status: int | None = None, headers: Any = None) -> Response:
    """An error in the documented shape."""
    status = status or (error.status if isinstance(error, Refused) else 400)
    again = {"Retry-After": "2"} if status in (429, 503) else {}
    return JSONResponse({"error": str(error)[:2000]}, status, {**again, **(headers or {})})


def middleware(limits: Limits, auth: tuple[str, str] | None, hosts: tuple[str, ...] | None) -> list[Middleware]:
    """From the outermost on.

    Args:
        limits: of a request.
        auth: (user, password) asked by HTTP Basic, or None for everybody.
        hosts: names of the server, so that no other web site can point its own name at it; None for any.
    """
    asking = {"WWW-Authenticate": 'Basic realm="digit", charset="UTF-8"'}
    password = Middleware(
        AuthenticationMiddleware,
        backend=Password(*auth or ("", "")),
        on_error=lambda _, error: error_response(error, 401, asking),
    )
    return [
        Middleware(ResponseShape),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts or ["*"]), www_redirect=False),
        *([password] if auth else []),
        Middleware(RequestGuard, limits=limits),
    ]


class Password(AuthenticationBackend):
    """HTTP Basic with one user."""

    def __init__(self, user: str, password: str) -> None:
        self._secret = f"{user}:{password}".encode()

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        """The user, if the password is right."""
        kind, _, given = conn.headers.get("authorization", "").partition(" ")
        try:
            right = kind.lower() == "basic" and hmac.compare_digest(base64.b64decode(given), self._secret)
        except (binascii.Error, ValueError):
            right = False
        if not right:
            raise AuthenticationError("This server asks for a user and a password.")
        return AuthCredentials(), SimpleUser("user")


class ResponseShape:
    """Security headers on every response, and the documented shape for TrustedHostMiddleware's plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        refused = False

        async def sending(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                refused = message["status"] == 400 and headers.get("content-type", "").startswith("text/plain")
                policy = DOCS_POLICY if scope["path"] == "/docs" else POLICY
                headers.update({**HEADERS, "content-security-policy": policy})
            if not refused:
                await send(message)

        await self.app(scope, receive, sending)
        if refused:
            host = Headers(scope=scope).get("host", "")
            error = Refused(f"This server is not called '{host}'; use the address that it printed.", 403)
            await error_response(error)(scope, receive, send)


class RequestGuard:
    """Reads a request's body, within limits, before anything else sees it.

    Args:
        app: what is guarded.
        limits: bytes of a body, and of all bodies that are held at one time.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.held = 0
        """Bytes of the bodies of all requests that are not answered yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parts: list[bytes] = []
        try:
            problem = _from_other_site(Headers(scope=scope), scope["method"])
            if problem is None:
                try:
                    problem = await asyncio.wait_for(self._read(receive, parts), BODY_SECONDS)
                except asyncio.TimeoutError:
                    problem = Refused("The request did not arrive in time.", 408)
            body: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

            async def replay() -> Message:
                return body.pop() if body else await receive()

            await (self.app if problem is None else error_response(problem))(scope, replay, send)
        finally:
            self.held -= sum(map(len, parts))

    async def _read(self, receive: Receive, parts: list[bytes]) -> Refused | None:
        size, more, problem = 0, True, None
        while more and size < DISCARDED_BYTES:
            message = await receive()
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size > self.limits.body_bytes:
                most = f"files of up to {self.limits.upload_mb} MiB"
                problem = problem or Refused(f"The request is larger than what is accepted here: {most}.", 413)
            elif self.held + len(part) > self.limits.memory_mb << 20:
                problem = problem or Refused("The server's memory for requests is full. Try again in a moment.", 429)
            if problem is None:
                parts.append(part)
                self.held += len(part)
        return problem


def _from_other_site(headers: Headers, method: str) -> Refused | None:
    """Refuse what the page of another web site sends; programs send neither header."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    same = site in ("same-origin", "none") if site else not origin or origin.partition("://")[2] == headers.get("host")
    if method in ("GET", "HEAD") or same:
        return None
    return Refused("Requests from the pages of other web sites are not served.", 403)
