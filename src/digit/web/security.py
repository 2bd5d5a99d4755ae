"""What stands before page and API: name of the server, password, pages of other web sites, size of requests."""

from __future__ import annotations

import asyncio
import base64
import hmac
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from digit.web.jobs import Refused
from digit.web.schema import Limits

BODY_SECONDS = 60.0
"""A request must have arrived within this time."""
DISCARDED_BYTES = 256 << 20
"""Of a request that is too large, read and thrown away, for a client that is cut off does not read the refusal."""
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'self'"
DOCS_POLICY = POLICY.replace("'self';", "'self' 'unsafe-inline';", 1)  # Swagger UI starts with an inline script
LATER = {"Retry-After": "2"}
BY_STATUS = {401: {"WWW-Authenticate": 'Basic realm="digit", charset="UTF-8"'}, 429: LATER, 503: LATER}


def error_response(error: Exception, status: int | None = None, headers: Any = None) -> Response:
    """An error in the documented shape."""
    status = status or (error.status if isinstance(error, Refused) else 400)
    return JSONResponse({"error": str(error)[:2000]}, status, {**BY_STATUS.get(status, {}), **(headers or {})})


def middleware(limits: Limits, auth: tuple[str, str] | None, hosts: tuple[str, ...] | None) -> list[Middleware]:
    """From the outermost on; for the arguments see :func:`digit.web.app.make_app`. The server answers to its own names,
    so that no other web site can point its name at it.
    """
    return [
        Middleware(Guard, limits=limits, auth=auth),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts or ["*"]), www_redirect=False),
    ]


class Guard:
    """Refuses what it must, reads a request's body, within limits, before anything else sees it, and sets headers."""

    def __init__(self, app: ASGIApp, limits: Limits, auth: tuple[str, str] | None = None) -> None:
        self.app, self.limits = app, limits
        self.password = None if auth is None else base64.b64encode(":".join(auth).encode())
        self.held = 0
        """Bytes of the bodies of all requests that are not answered yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, wrong_host = Headers(scope=scope), False
        parts: list[bytes] = []

        async def replay() -> Message:
            return body.pop() if body else await receive()

        async def sending(message: Message) -> None:
            nonlocal wrong_host
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                # TrustedHostMiddleware alone answers with plain text
                wrong_host = message["status"] == 400 and sent.get("content-type", "").startswith("text/plain")
                sent["content-security-policy"] = DOCS_POLICY if scope["path"] == "/docs" else POLICY
                sent.update({"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"})
            if not wrong_host:
                await send(message)

        try:
            problem = self._refusal(headers, scope["method"]) or await self._read(receive, parts)
            body: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
            await (error_response(problem) if problem else self.app)(scope, replay, sending)
            if wrong_host:
                name = f"This server is not called '{headers.get('host', '')}'; use the address that it printed."
                await error_response(Refused(name, 403))(scope, receive, send)
        finally:
            self.held -= sum(map(len, parts))

    def _refusal(self, headers: Headers, method: str) -> Refused | None:
        """Of a wrong password, and of what the page of another web site sends; programs send neither of its headers."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if self.password is not None:
            right = hmac.compare_digest(given.strip().encode(), self.password)
            if kind.lower() != "basic" or not right:
                return Refused("This server asks for a user and a password.", 401)
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        at_home = not origin or origin.partition("://")[2] == headers.get("host")
        if method in ("GET", "HEAD") or (site in ("same-origin", "none") if site else at_home):
            return None
        return Refused("Requests from the pages of other web sites are not served.", 403)

    async def _read(self, receive: Receive, parts: list[bytes]) -> Refused | None:
        """Fill ``parts`` with the body; or the reason why not."""
        try:
            return await asyncio.wait_for(self._read_all(receive, parts), BODY_SECONDS)
        except asyncio.TimeoutError:
            return Refused("The request did not arrive in time.", 408)

    async def _read_all(self, receive: Receive, parts: list[bytes]) -> Refused | None:
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
