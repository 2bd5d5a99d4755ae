"""Page, API and guard put together, and the server that the command starts."""

from __future__ import annotations

import logging
import secrets
import threading
from pathlib import Path
from typing import Any

from digit.clustering.patches import FILE, Atlas
from digit.core.errors import DigitError, require
from digit.pipeline.pipeline import DigitPipeline
from digit.web.limits import Desk
from digit.web.service import Service

log = logging.getLogger("digit")
LOCAL = ("127.0.0.1", "localhost", "::1")


def open_atlas(folder: Path, pipe: DigitPipeline) -> Atlas | None:
    """The atlas of a model folder, if it has one."""
    path = folder / "codebook" / FILE
    return (
        Atlas(path, pipe.tokenizer)
        if path.is_file() and pipe.encoder is not None and pipe.codebook is not None
        else None
    )


def make_app(
    service: Service,
    auth: tuple[str, str] | None = None,
    hosts: tuple[str, ...] | None = None,
    desk: Desk | None = None,
) -> Any:
    """The whole as an ASGI application.

    Args:
        service: the model.
        auth: (user, password), or None for everybody.
        hosts: names the server answers to; None for any.
        desk: the worker and its waiting room; None makes one with the service's limits.

    Raises:
        MissingPackageError: Gradio is not installed.
    """
    gr = require("gradio", "web", "digit serve")
    fastapi = require("fastapi", "web", "digit serve")
    from digit.web.api import api_routes
    from digit.web.guard import Guard
    from digit.web.page import build_page, look_of_page

    desk = desk or Desk(service.limits)
    app = fastapi.FastAPI(title="digit", docs_url=None, redoc_url=None, openapi_url=None)
    app.router.routes.extend(api_routes(service, desk))
    page = build_page(service, desk)
    page.state_session_capacity = service.limits.sessions
    app = gr.mount_gradio_app(
        app, page, path="/", show_error=False, ssr_mode=False, run_history=False, **look_of_page()
    )
    return Guard(app, service.limits, desk.budget, auth, hosts)


def serve(app: Any, host: str, port: int, share: bool = False) -> None:
    """Serve until interrupted.

    Args:
        app: see :func:`make_app`.
        host, port: where.
        share: also reach out to Gradio's tunnel, which gives a public address for some days.

    Raises:
        DigitError: the port is taken, the address is not this machine's, or there is no tunnel.
    """
    uvicorn = require("uvicorn", "web", "digit serve")

    class Server(uvicorn.Server):  # type: ignore[misc,name-defined]
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            name = f"[{host}]" if ":" in host else host
            print(f"Serving on http://{name}:{place}  (stop with Ctrl+C)", flush=True)
            if share:
                threading.Thread(target=_share, args=(place,), daemon=True).start()

    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
    try:
        socket = config.bind_socket()
    except SystemExit as error:  # which uvicorn raises after it has said why
        raise DigitError(
            f"Port {port} of {host} cannot be used; is another server running? Choose one with --port."
        ) from error
    place = socket.getsockname()[1]
    Server(config).run(sockets=[socket])


def _share(port: int) -> None:
    """Open the tunnel to a server that answers."""
    try:
        from gradio.networking import setup_tunnel

        address = setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
        print(f"Public address: {address}", flush=True)
    except Exception as error:
        log.error("No public address could be had (%s). The local one works on.", error)
