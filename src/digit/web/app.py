"""The service over HTTP: the JSON API, its OpenAPI page at /docs, and the static page.

A request whose ``Accept`` names ``text/event-stream`` gets server-sent events: "progress" while it is worked on, then
one "result" or "error". Any answer that is not 200 is a :class:`~digit.web.schema.Problem`; 429 says that the server is
full and worth asking again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, TypeAdapter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from digit.core.config import from_dict
from digit.core.errors import DigitError, require
from digit.web import schema
from digit.web.jobs import Job, JobQueue, Refused
from digit.web.security import error_response, middleware
from digit.web.service import Service

log = logging.getLogger("digit")
STATIC = Path(__file__).parent / "static"
EVENTS = "text/event-stream"
CLIENT_LEFT = 499
FAILED = "The server failed at this request; its log says why."
LOCAL = ("127.0.0.1", "localhost", "[::1]")
T = TypeVar("T")


def make_app(service: Service, auth: tuple[str, str] | None = None, hosts: tuple[str, ...] | None = None) -> FastAPI:
    """The ASGI application over a model; ``auth`` is (user, password) asked by HTTP Basic, or None for everybody, and
    ``hosts`` are the names the server answers to, None for any.
    """
    queue = JobQueue(service.limits.waiting, service.limits.seconds)
    app = FastAPIOffline(
        title="digit",
        description=__doc__,
        redoc_url=None,
        middleware=middleware(service.limits, auth, hosts),
        exception_handlers=dict.fromkeys((DigitError, HTTPException, Exception), _answer_error),
        responses={"4XX": {"model": schema.Problem}, "5XX": {"model": schema.Problem}},
    )
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "page.html")

    @app.get("/health", summary="Whether the server is alive")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": queue.active}

    @app.get("/api/model")
    async def model() -> schema.About:
        """The model, and what can be asked of it."""
        return service.about().model_copy(update={"waiting": queue.active})

    @app.get("/api/clusters/{number:int}")
    async def cluster(number: int) -> schema.Cluster:
        """What a cluster looks like."""
        return service.cluster(number)

    def post(path: str, body_type: type[T], answer: type[BaseModel], work: Callable[[T, Job], BaseModel]) -> None:
        content = {"application/json": {"schema": TypeAdapter(body_type).json_schema()}}

        async def endpoint(request: Request) -> Response:
            body = from_dict(body_type, await _json_object(request), "The request")
            return await _respond(request, queue.submit(lambda job: work(body, job)))

        app.post(
            path,
            response_model=answer,
            summary=(body_type.__doc__ or "").strip().rstrip("."),
            operation_id=work.__name__,
            openapi_extra={"requestBody": {"required": True, "content": content}},
        )(endpoint)

    post("/api/generate", schema.Generate, schema.Images, service.generate)
    post("/api/tokenize", schema.Tokenize, schema.Tokenization, service.tokenize)
    post("/api/stability", schema.Stability, schema.Changed, service.stability)
    post("/api/edit", schema.Edit, schema.Images, service.edit)
    return app


def _answer_error(request: Request, error: Exception) -> Response:
    """An answer in the documented shape, whatever went wrong."""
    if not isinstance(error, HTTPException):
        return error_response(error if isinstance(error, DigitError) else Refused(FAILED, 500))
    path = request.url.path
    sentences = {
        404: f"There is nothing at {path}; see /docs for what there is.",
        405: f"{path} does not take {request.method}; see /docs for what it takes.",
    }
    text = sentences.get(error.status_code, str(error.detail))
    return error_response(Refused(text), error.status_code, error.headers)


async def _json_object(request: Request) -> dict[str, Any]:
    """The body, whatever its content type says."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refused("The request is not JSON; expected an object.") from error
    if not isinstance(body, dict):
        raise Refused(f"The request is a JSON {type(body).__name__}; expected an object.")
    return body


async def _respond(request: Request, job: Job) -> Response:
    """The job's result, or its events where the client asks for them."""
    job.watcher = asyncio.ensure_future(_cancel_when_left(request, job))
    if EVENTS in request.headers.get("accept", ""):
        return StreamingResponse(_stream(job), media_type=EVENTS, headers={"Cache-Control": "no-store"})
    answer = Response(status_code=CLIENT_LEFT)
    async for kind, value in job.events():
        if kind != "progress":
            answer = error_response(_for_client(value)) if kind == "error" else JSONResponse(value.model_dump())
    return answer


async def _cancel_when_left(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _stream(job: Job) -> AsyncIterator[str]:
    """Server-sent events."""
    async for kind, value in job.events():
        data = schema.Problem(error=str(_for_client(value))) if kind == "error" else value
        yield f"event: {kind}\ndata: {data.model_dump_json()}\n\n"


def _for_client(error: Exception) -> Exception:
    if isinstance(error, DigitError):
        return error
    log.error("A request failed.", exc_info=error)
    return Refused(FAILED, 500)


def serve(app: FastAPI, host: str, port: int, share: bool = False) -> None:
    """Serve until interrupted; ``share`` also reaches out to Gradio's tunnel, which gives a public address for some
    days. DigitError: the port is taken, or the address is not this machine's.
    """
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
    try:
        socket = config.bind_socket()
    except SystemExit as error:  # which uvicorn raises after it has said why
        raise DigitError(
            f"Port {port} of {host} cannot be used; is another server running? Choose one with --port."
        ) from error
    socket.listen()  # who asks before the loop runs is answered when it does
    place = socket.getsockname()[1]
    print(f"Serving on http://{f'[{host}]' if ':' in host else host}:{place}  (stop with Ctrl+C)", flush=True)
    if share:
        threading.Thread(target=_share, args=(place,), daemon=True).start()
    uvicorn.Server(config).run(sockets=[socket])


def _share(port: int) -> None:
    networking = require("gradio.networking", "share", "--share")
    try:
        address = networking.setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
        print(f"Public address: {address}", flush=True)
    except Exception as error:
        log.error("No public address could be had (%s). The local one works on.", error)
