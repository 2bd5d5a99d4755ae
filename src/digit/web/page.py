"""The page: three tabs over the service, made with Gradio.

Pictures go to and fro inside the requests, as data URLs: nothing is written on the server's disk, and its memory holds
    a picture for
one request only. What needs the browser (dropping and painting, walking over cells, the history) is in ``page.js``.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from html import escape
from importlib import resources
from typing import Any

from PIL import Image

from digit.core.config import from_dict
from digit.core.errors import DigitError, require
from digit.web import markup
from digit.web.limits import Desk, Visit
from digit.web.service import Edit, Frame, Generate, Look, Pictures, Service, Shake
from digit.web.uploads import read_picture

NO_CLASS, ALL_CLASSES = -1, -2
DEFAULT_SNR = 25
PLAIN: dict[str, Any] = {"js_on_load": None, "apply_default_css": False}
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
"""Of every event: the desk does the queueing, and the page shows its own progress."""


def build_page(service: Service, desk: Desk) -> Any:
    """The page as ``gradio.Blocks``.

    Raises:
        MissingPackageError: Gradio is not installed.
    """
    gr = require("gradio", "web", "The page of digit serve")
    with gr.Blocks(analytics_enabled=False, fill_width=True, title=f"digit: {service.pipe.name}") as page:
        gr.HTML(_heading(service), **PLAIN)
        with gr.Tabs():
            with gr.Tab("Generate", elem_id="dg-tab-generate"):
                _generate_tab(gr, service, desk)
            with gr.Tab("Tokens", elem_id="dg-tab-tokens"):
                _tokens_tab(gr, service, desk)
            with gr.Tab("Edit", elem_id="dg-tab-edit"):
                _edit_tab(gr, service, desk)
    page.queue(max_size=desk.limits.waiting + 1, api_open=False)
    return page


def look_of_page() -> dict[str, Any]:
    """Theme, styles and script, as ``gradio.mount_gradio_app`` takes them; fonts are those of the visitor's system."""
    gr = require("gradio", "web", "The page of digit serve")
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    files = resources.files("digit") / "web"
    script, style = ((files / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    return {"theme": theme, "css": style, "head": f"<script>{script}</script>", "footer_links": []}


def _heading(service: Service) -> str:
    pipe = service.pipe
    grids = ", ".join(f"{rows} x {columns} {markup.SPACES[name]}" for name, (rows, columns) in service.grids.items())
    classes = f", {pipe.num_classes} classes" if pipe.num_classes else ""
    about = f"{pipe.name}: {service.image_size} px, {grids}{classes}"
    return f'<header class="dg-heading"><h1>digit</h1><p>{escape(about)}</p></header>'


# ---- from the desk to the page ---------------------------------------------------------------------------------------


async def stream(desk: Desk, work: Callable[[Visit], Any]) -> AsyncIterator[Any]:
    """Wait for a turn and do the work; its news, and then its result.

    A visitor who leaves, or presses Stop, closes this iterator, and with it the work.
    """
    news: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.ensure_future(desk.run(work, news.put_nowait))
    over = object()
    task.add_done_callback(lambda _: news.put_nowait(over))
    try:
        while (item := await news.get()) is not over:
            yield item
        yield task.result()
    finally:
        task.cancel()


async def pictures(service: Service, desk: Desk, work: Callable[[Visit], Pictures], seed: int, name: str = "") -> Any:
    """Show how pictures come about, and then the pictures; or why there are none."""
    waiting = max(0, desk.inside)
    yield markup.notice(f"Waiting: {waiting} before you." if waiting else "Starting.")
    try:
        async for item in stream(desk, work):
            yield (
                markup.filling(item, service) if isinstance(item, Frame) else markup.gallery(item, service, seed, name)
            )
    except DigitError as error:
        yield markup.notice(str(error), error=True)


# ---- generate --------------------------------------------------------------------------------------------------------


def _generate_tab(gr: Any, service: Service, desk: Desk) -> None:
    if not service.can_generate:
        gr.HTML(
            markup.notice("This model lacks a prior, a decoder or a VQGAN, so it cannot generate pictures."), **PLAIN
        )
        return
    defaults, most = service.defaults("prior"), service.limits.pictures
    with gr.Row(elem_classes="dg-row"):
        with gr.Column(scale=1, min_width=300):
            label = _class_box(gr, service, every=True)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
                count = gr.Slider(1, most, min(4, most), step=1, label="Pictures", min_width=150)
            go = gr.Button("Generate", variant="primary", elem_id="dg-go")
            with gr.Row():
                fresh = gr.Button("New seed", size="sm", min_width=70)
                other = gr.Button(
                    "Same seed, other class", size="sm", min_width=140, visible=service.pipe.num_classes > 1
                )
                stop = gr.Button("Stop", size="sm", min_width=50)
            guidance = gr.Slider(
                1, 10, defaults.cfg_scale, step=0.1, label="Guidance", info="1 is none", visible=service.can_guide
            )
            decoder, steps = _decoder_boxes(gr, service)
            with gr.Accordion("More", open=False):
                vocabulary = service.pipe.part("prior").config.vocab_size
                top_k = gr.Slider(
                    0, vocabulary, min(defaults.top_k, vocabulary), step=1, label="Top-k", info="0 keeps all tokens"
                )
                top_p = gr.Slider(0.05, 1, defaults.top_p, step=0.01, label="Top-p", info="1 keeps all tokens")
                warmth = gr.Slider(
                    0, 2, defaults.temperature, step=0.05, label="Temperature", info="0 takes the likeliest token"
                )
        with gr.Column(scale=3, min_width=300):
            stage = gr.HTML(markup.notice("Choose a class and press Generate."), **PLAIN, elem_id="dg-stage")
            gr.HTML('<div id="dg-history"></div>', js_on_load="window.digit.history(element)", apply_default_css=False)

    async def generate(
        label: int, seed: float, count: int, cfg: float, decoder: str, steps: int, k: int, p: float, warmth: float
    ) -> Any:
        labels = None if label == NO_CLASS else [label]
        if label == ALL_CLASSES:
            labels = list(range(service.pipe.num_classes))[: int(count)]
        values = {
            "labels": labels, "num": int(count), "seed": int(seed or 0), **_stage2(service, decoder, steps),
            "cfg_scale": cfg if service.can_guide and labels is not None else None, "top_k": int(k), "top_p": p, "temperature": warmth,
        }  # fmt: skip
        try:
            wish = from_dict(Generate, values, "The form")
        except DigitError as error:
            yield markup.notice(str(error), error=True)
            return
        async for html in pictures(service, desk, lambda visit: service.generate(wish, visit), wish.seed):
            yield html

    inputs = [label, seed, count, guidance, decoder, steps, top_k, top_p, warmth]
    events = [go.click(generate, inputs, stage, **QUIET)]
    new_seed = fresh.click(lambda: random.randrange(1_000_000), None, seed, **QUIET)
    events.append(new_seed.then(generate, inputs, stage, **QUIET))
    another = other.click(lambda now: _other_class(service, now), label, label, **QUIET)
    events.append(another.then(generate, inputs, stage, **QUIET))
    stop.click(lambda: markup.notice("Stopped."), None, stage, cancels=events, **QUIET)


def _other_class(service: Service, now: int) -> int:
    return random.choice([number for number in range(service.pipe.num_classes) if number != now])


def _class_box(gr: Any, service: Service, every: bool = False) -> Any:
    names = [(markup.class_title(service, number), number) for number in range(service.pipe.num_classes)]
    if every and names:
        names.append(("every class in turns", ALL_CLASSES))
    names.append(("no class", NO_CLASS))
    return gr.Dropdown(names, value=names[0][1], label="Class", filterable=len(names) > 12, visible=len(names) > 1)


def _decoder_boxes(gr: Any, service: Service) -> tuple[Any, Any]:
    """Which decoder, and the iterations of a masked one."""
    kinds = list(service.pipe.decoders) if service.pipe.space == "semantic" else []
    first = service.pipe.pick_decoder(None) if kinds else None
    masked = [kind for kind in kinds if service.pipe.decoders[kind].config.role == "masked"]
    decoder = gr.Radio(kinds, value=first, label="Decoder", visible=len(kinds) > 1)
    steps = gr.Slider(
        1, 32, service.defaults(masked[0] if masked else "prior").steps, step=1, label="Steps of the masked decoder",
        visible=first in masked,
    )  # fmt: skip
    decoder.change(lambda kind: gr.update(visible=kind in masked), decoder, steps, **QUIET)
    return decoder, steps


def _stage2(service: Service, kind: str, steps: int) -> dict[str, Any]:
    """The chosen decoder, and steps where it has some: a request refuses them of the others."""
    masked = kind in service.pipe.decoders and service.pipe.decoders[kind].config.role == "masked"
    return {"decoder": kind or None, "steps": int(steps) if masked else None}


# ---- tokens ----------------------------------------------------------------------------------------------------------


def _tokens_tab(gr: Any, service: Service, desk: Desk) -> None:
    with gr.Row(elem_classes="dg-row"):
        with gr.Column(scale=1, min_width=300):
            well = _well(gr, service, "tokens")
            noise = gr.Slider(
                0,
                40,
                DEFAULT_SNR,
                step=1,
                label="Noise: signal-to-noise ratio, dB",
                info="lower is noisier",
                elem_id="dg-noise",
            )
            flips = gr.HTML("", **PLAIN, elem_id="dg-flips")
        with gr.Column(scale=3, min_width=300):
            seen = gr.HTML(
                markup.notice("Drop a picture to see its tokens, and move the noise to see which of them flip."),
                **PLAIN,
                elem_id="dg-seen",
            )

    async def look(value: Any, snr: float) -> Any:
        yield value, markup.notice("Looking."), ""

        def work(visit: Visit) -> tuple[Any, str, str]:
            picture = _picture_of(service, value)
            inside = service.look(picture, Look(), visit)
            shaken = service.shake(picture, Shake(snr=snr), visit)
            return (
                {"picture": markup.data_url(picture)},
                markup.inside(picture, inside, service),
                markup.flips(shaken, service),
            )

        try:
            async for item in stream(desk, work):
                if not isinstance(item, Frame):
                    yield item
        except DigitError as error:
            yield {}, markup.notice(str(error), error=True), ""

    async def shake(value: Any, snr: float) -> Any:
        if not value or not value.get("picture"):
            return ""

        def work(visit: Visit) -> str:
            return markup.flips(service.shake(_picture_of(service, value), Shake(snr=snr), visit), service)

        try:
            return await desk.run(work)
        except DigitError as error:
            return markup.notice(str(error), error=True)

    well.upload(look, [well, noise], [well, seen, flips], **QUIET)
    noise.input(shake, [well, noise], flips, trigger_mode="always_last", **QUIET)


def _picture_of(service: Service, value: Any) -> Image.Image:
    """The picture in a well: a file just dropped, or the one it shows."""
    given = (value or {}).get("file") or (value or {}).get("picture")
    if not isinstance(given, str):
        raise DigitError("There is no picture yet: drop one first.")
    return read_picture(given, service.image_size, service.limits)


def _well(gr: Any, service: Service, name: str, grid: tuple[int, int] | None = None) -> Any:
    """A place for a picture: to drop, paste or choose one, and with a grid to paint cells on it."""
    return gr.HTML(
        {},
        html_template=f'<div class="dg-well-root" data-well="{name}"></div>',
        js_on_load="window.digit.well(element, trigger, props, watch)",
        apply_default_css=False,
        elem_id=f"dg-well-{name}",
        rows=grid[0] if grid else 0,
        columns=grid[1] if grid else 0,
        megabytes=service.limits.upload_mb,
    )


# ---- edit ------------------------------------------------------------------------------------------------------------


def _edit_tab(gr: Any, service: Service, desk: Desk) -> None:
    if not service.can_edit:
        gr.HTML(markup.notice("Editing needs a model with all its parts; this one lacks some."), **PLAIN)
        return
    rows, columns = service.grids[service.pipe.space]
    with gr.Row(elem_classes="dg-row"):
        with gr.Column(scale=1, min_width=300):
            well = _well(gr, service, "edit", (rows, columns))
            paint = gr.Button("Resample the painted cells", variant="primary", elem_id="dg-resample")
            with gr.Row():
                keep = gr.Slider(0, rows - 1, rows // 2, step=1, label="Rows to keep", min_width=150)
                extend = gr.Button("Extend the top rows", min_width=120, elem_id="dg-extend")
            label = _class_box(gr, service)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
                count = gr.Slider(
                    1, service.limits.pictures, min(4, service.limits.pictures), step=1, label="Results", min_width=150
                )
            decoder, steps = _decoder_boxes(gr, service)
            stop = gr.Button("Stop", size="sm", min_width=60)
        with gr.Column(scale=3, min_width=300):
            stage = gr.HTML(
                markup.notice(
                    "Drop a picture and paint the cells to sample anew, with the pointer or with arrow keys and space."
                ),
                **PLAIN,
                elem_id="dg-edited",
            )

    async def load(value: Any) -> Any:
        try:
            picture = await desk.run(lambda _: _picture_of(service, value))
            return {"picture": markup.data_url(picture), "cells": []}, markup.notice("Paint the cells to sample anew.")
        except DigitError as error:
            return {}, markup.notice(str(error), error=True)

    async def resample(value: Any, label: int, seed: float, count: int, decoder: str, steps: int) -> Any:
        cells = (value or {}).get("cells") or []
        if not cells:
            yield markup.notice("Paint some cells of a picture first.", error=True)
            return
        async for html in edit(value, {"cells": cells}, label, seed, count, decoder, steps):
            yield html

    async def continued(value: Any, keep: int, label: int, seed: float, count: int, decoder: str, steps: int) -> Any:
        async for html in edit(value, {"rows": int(keep)}, label, seed, count, decoder, steps):
            yield html

    async def edit(
        value: Any, what: dict[str, Any], label: int, seed: float, count: int, decoder: str, steps: int
    ) -> Any:
        values = {
            **what, "label": None if label == NO_CLASS else label, "seed": int(seed or 0), "num": int(count),
            **_stage2(service, decoder, steps),
        }  # fmt: skip
        try:
            wish = from_dict(Edit, values, "The form")
        except DigitError as error:
            yield markup.notice(str(error), error=True)
            return

        def work(visit: Visit) -> Pictures:
            return service.edit(_picture_of(service, value), wish, visit)

        async for html in pictures(service, desk, work, wish.seed, "edited"):
            yield html

    knobs = [label, seed, count, decoder, steps]
    well.upload(load, well, [well, stage], **QUIET)
    events = [
        paint.click(resample, [well, *knobs], stage, **QUIET),
        extend.click(continued, [well, keep, *knobs], stage, **QUIET),
    ]
    stop.click(lambda: markup.notice("Stopped."), None, stage, cancels=events, **QUIET)
