"""The service as JSON: what ``digit serve`` answers to programs.

    GET  /api/model            what the model is and what may be asked
    POST /api/generate         {"labels": ["cat", 3], "num": 4, "seed": 0, ...}         -> pictures
    POST /api/tokenize         {"image": "<base64>"}                                    -> tokens and reconstructions
    POST /api/stability        {"image": "<base64>", "snr": 25}                         -> tokens that change under
    noise POST /api/edit             {"image": "<base64>", "cells": [0, 1], "num": 2, ...}    -> pictures
    GET  /api/clusters/NUMBER  what a cluster looks like

An answer that is not 200 is ``{"error": "<sentences for people>"}``; 429 says that the server is full and worth asking
again.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.core.images import encode_png
from digit.web.limits import Desk, Gone, Refused, Visit
from digit.web.service import Edit, Flips, Generate, Look, Pictures, Service, Shake
from digit.web.uploads import read_picture

log = logging.getLogger("digit")
Answer = dict[str, Any]
CLIENT_LEFT = 499


def api_routes(service: Service, desk: Desk) -> list[Route]:
    """The routes of the API."""
    api = _Api(service)

    def post(path: str, work: Callable[[Answer, Visit], Answer]) -> Route:
        async def endpoint(request: Request) -> Response:
            wish = _object(await request.body())
            return await _answer(request, desk, lambda visit: work(wish, visit))

        return Route(path, guarded(endpoint), methods=["POST"])

    async def model(_: Request) -> Response:
        return JSONResponse({**service.describe(), "waiting": desk.inside})

    async def cluster(request: Request) -> Response:
        number = int(request.path_params["number"])
        return await _answer(request, desk, lambda _: api.cluster(number))

    return [
        Route("/api/model", guarded(model), methods=["GET"]),
        Route("/api/clusters/{number:int}", guarded(cluster), methods=["GET"]),
        post("/api/generate", api.generate),
        post("/api/tokenize", api.tokenize),
        post("/api/stability", api.stability),
        post("/api/edit", api.edit),
    ]


class _Api:
    """From a JSON object to a JSON object."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def generate(self, wish: Answer, visit: Visit) -> Answer:
        return _pictures(self.service.generate(from_dict(Generate, wish, "The request"), visit))

    def tokenize(self, wish: Answer, visit: Visit) -> Answer:
        picture = self._image(wish)
        inside = self.service.look(picture, from_dict(Look, wish, "The request"), visit)
        return {
            "semantic": None if inside.semantic is None else inside.semantic.tolist(),
            "vq": None if inside.vq is None else inside.vq.tolist(),
            "grids": {space: list(grid) for space, grid in self.service.grids.items()},
            "picture": to_base64(picture),
            "vqgan": inside.vqgan and to_base64(inside.vqgan),
            "full": inside.full and to_base64(inside.full),
        }

    def stability(self, wish: Answer, visit: Visit) -> Answer:
        picture = self._image(wish)
        shaken = self.service.shake(picture, from_dict(Shake, wish, "The request"), visit)
        return {
            "realised_snr": shaken.realised_snr if math.isfinite(shaken.realised_snr) else None,
            "picture": to_base64(shaken.picture),
            "flips": {space: _flips(flips) for space, flips in shaken.flips.items()},
        }

    def edit(self, wish: Answer, visit: Visit) -> Answer:
        picture = self._image(wish)
        return _pictures(self.service.edit(picture, from_dict(Edit, wish, "The request"), visit))

    def cluster(self, number: int) -> Answer:
        patches = [to_base64(Image.fromarray(patch)) for patch in self.service.cluster(number)]
        return {"cluster": number, "patches": patches}

    def _image(self, wish: Answer) -> Image.Image:
        text = wish.pop("image", None)
        if not isinstance(text, str):
            raise Refused("'image' is missing; expected base64 of a picture file.")
        return read_picture(text, self.service.image_size, self.service.limits)


def to_base64(picture: Image.Image) -> str:
    """A picture as base64 of a PNG file."""
    return base64.b64encode(encode_png(picture)).decode()


def _pictures(made: Pictures) -> Answer:
    tokens = made.tokens
    return {
        "pictures": [to_base64(image) for image in made.images],
        "labels": [None if label < 0 else label for label in made.labels],
        "semantic": None if tokens.semantic is None else tokens.semantic.tolist(),
        "vq": None if tokens.vq is None else tokens.vq.tolist(),
        "sha256": tokens.sha256(),
    }


def _flips(flips: Flips) -> Answer:
    return {"count": len(flips.places), "of": len(flips.before), "share": flips.share, "places": flips.places}


def _object(body: bytes) -> Answer:
    try:
        wish = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused("The request is not JSON; expected an object.") from error
    if not isinstance(wish, dict):
        raise Refused(f"The request is a JSON {type(wish).__name__}; expected an object.")
    return wish


def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Turn errors that are meant for people into answers."""

    async def safe(request: Request) -> Response:
        try:
            return await endpoint(request)
        except DigitError as error:
            return refusal(error)
        except Exception:
            log.exception("A request to %s failed.", request.url.path)
            return JSONResponse({"error": "The server failed at this request; its log says why."}, 500)

    return safe


def refusal(error: DigitError) -> Response:
    """The answer that tells an error."""
    status = error.status if isinstance(error, Refused) else 400
    return JSONResponse({"error": str(error)}, status, headers={"Retry-After": "2"} if status in (429, 503) else None)


async def _answer(request: Request, desk: Desk, work: Callable[[Visit], Answer]) -> Response:
    """Do the work, unless the client leaves before it is done."""
    task = asyncio.ensure_future(desk.run(work))
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(task.result())
    except Gone:
        return Response(status_code=CLIENT_LEFT)
    finally:
        task.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
