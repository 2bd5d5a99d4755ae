"""The pieces of the page as HTML. Everything that comes from a model or a person is escaped."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from digit.web.api import to_base64
from digit.web.service import Frame, Inside, Pictures, Service, Shaken

SPACES = {"semantic": "semantic tokens", "vq": "VQ tokens"}


def data_url(picture: Image.Image) -> str:
    """A picture as an address that holds it."""
    return f"data:image/png;base64,{to_base64(picture)}"


def grid_url(tokens: Tensor, grid: tuple[int, int], colors: np.ndarray) -> str:
    """Tokens (N,) as one pixel a token; open ones, -1, are transparent."""
    ids = tokens.cpu().numpy()
    pixels = np.zeros((len(ids), 4), dtype=np.uint8)
    pixels[ids >= 0, :3] = colors[ids[ids >= 0]]
    pixels[ids >= 0, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(*grid, 4)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def notice(text: str, error: bool = False) -> str:
    """A sentence in the place of a result."""
    return (
        f'<p class="dg-notice{" dg-error" if error else ""}" role="{"alert" if error else "status"}">{escape(text)}</p>'
    )


# ---- generate --------------------------------------------------------------------------------------------------------


def filling(frame: Frame, service: Service) -> str:
    """Grids that fill while tokens are sampled."""
    grid, colors = service.grids[frame.space], service.colors[frame.space]
    name = "VQ tokens" if frame.space == "vq" else "Semantic tokens"
    unit = "iteration" if frame.total != frame.tokens.shape[1] else "token"
    open_ones = int((frame.tokens[0] < 0).sum())
    figures = "".join(
        f'<figure><img class="dg-pixels dg-open" src="{grid_url(row, grid, colors)}" alt=""></figure>'
        for row in frame.tokens
    )
    words = f"{name}: {unit} {frame.done} of {frame.total}"
    return (
        f'<section class="dg-stage" data-stage="{escape(frame.stage)}" data-done="{frame.done}" data-open="{open_ones}">'
        f'<p class="dg-notice" role="status">{words}</p>'
        f'<progress max="{frame.total}" value="{frame.done}" aria-label="{name}"></progress>'
        f'<div class="dg-pictures">{figures}</div></section>'
    )


def gallery(made: Pictures, service: Service, seed: int, name: str = "") -> str:
    """Finished pictures with what one can do with them; the browser keeps them as its history."""
    figures = []
    for number, (picture, label) in enumerate(zip(made.images, made.labels, strict=True)):
        title = name or class_title(service, label)
        about = f"{title}, seed {seed}, no. {number}"
        file = escape("-".join("".join(c if c.isalnum() else " " for c in about).split()) + ".png")
        url = data_url(picture)
        small = _thumbnail(made, number, service)
        figures.append(
            f'<figure data-label="{label}" data-seed="{seed}"><img class="dg-pixels" src="{url}" alt="{escape(about)}">'
            f"<figcaption>{small}<span>{escape(about)}</span></figcaption>"
            f'<div class="dg-links"><a href="{url}" download="{file}">Download</a>'
            f'<button type="button" data-send="tokens">Look inside</button>'
            f'<button type="button" data-send="edit">Edit</button></div></figure>'
        )
    return f'<section class="dg-stage dg-done" data-stage="pixels"><div class="dg-pictures">{"".join(figures)}</div></section>'


def _thumbnail(made: Pictures, number: int, service: Service) -> str:
    space = "vq" if made.tokens.semantic is None else "semantic"
    tokens = made.tokens.vq if made.tokens.semantic is None else made.tokens.semantic
    if tokens is None:
        return ""
    url = grid_url(tokens[number], service.grids[space], service.colors[space])
    return f'<img class="dg-pixels dg-small" src="{url}" alt="its {SPACES[space]}">'


def class_title(service: Service, label: int) -> str:
    """A class by its name, else by its number."""
    if label < 0:
        return "no class"
    names = service.pipe.class_names
    return names[label] if label < len(names) else f"class {label}"


# ---- tokens ----------------------------------------------------------------------------------------------------------


def inside(picture: Image.Image, seen: Inside, service: Service) -> str:
    """A picture beside its tokens and what becomes of it."""
    figures = [
        _plain("The picture", data_url(picture), f"{picture.width} x {picture.height} pixels, as the model sees it")
    ]
    if seen.semantic is not None:
        figures.append(_tokens_over(picture, seen.semantic, "semantic", service))
    if seen.vq is not None:
        rows, columns = service.grids["vq"]
        url = grid_url(seen.vq, (rows, columns), service.colors["vq"])
        figures.append(_plain("VQ tokens", url, f"{rows} x {columns} of {len(service.colors['vq']):,} codes"))
    if seen.vqgan is not None:
        figures.append(_plain("VQGAN alone", data_url(seen.vqgan), "what VQ tokens keep"))
    if seen.full is not None:
        figures.append(_plain("Full path", data_url(seen.full), "from semantic tokens alone"))
    clusters = "" if seen.semantic is None else _clusters(seen.semantic, service)
    return f'<section class="dg-inside"><div class="dg-pictures">{"".join(figures)}</div>{clusters}</section>'


def _plain(title: str, url: str, about: str) -> str:
    return (
        f'<figure><img class="dg-pixels" src="{url}" alt="{escape(title)}">'
        f"<figcaption><b>{escape(title)}</b><span>{escape(about)}</span></figcaption></figure>"
    )


def _tokens_over(picture: Image.Image, tokens: Tensor, space: str, service: Service) -> str:
    """Coloured cells over a picture; one can walk over them with the arrow keys."""
    (rows, columns), colors = service.grids[space], service.colors[space]
    cells = "".join(
        f'<button type="button" role="gridcell" tabindex="{-1 if place else 0}" data-token="{token}" data-place="{place}" '
        f'style="--c:rgb({",".join(map(str, colors[token]))})" aria-label="token {token}"></button>'
        for place, token in enumerate(tokens.tolist())
    )
    used = len(set(tokens.tolist()))
    return (
        f'<figure><div class="dg-over" style="--columns:{columns};background-image:url({data_url(picture)})" role="grid" '
        f'aria-label="{SPACES[space]}" data-columns="{columns}">{cells}</div>'
        f"<figcaption><b>Semantic tokens</b><span>{rows} x {columns} of {len(colors):,} clusters, {used} in use here. "
        "Point at a cell, or walk with the arrow keys.</span></figcaption></figure>"
    )


def _clusters(tokens: Tensor, service: Service) -> str:
    """What each cluster of a picture looks like, to be shown when its cell is chosen."""
    if service.atlas is None:
        return notice(
            "What each cluster looks like is not known here: the model has no patches of real pictures. "
            "Its owner can add them with: digit atlas MODEL --data D"
        )
    numbers = sorted(set(tokens.tolist()))
    strips: list[np.ndarray] = []
    where = []
    for number in numbers:
        patches = service.cluster(number)
        where.append(f'"{number}":[{len(strips)},{len(patches)}]')
        if len(patches):
            strips.append(np.concatenate(list(patches), axis=1))  # (side, n * side, 3)
    if not strips:
        return notice("None of these clusters has patches in the model's atlas.")
    width = max(strip.shape[1] for strip in strips)
    sheet = np.concatenate(
        [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0))) for s in strips]
    )  # (rows * side, width, 3)
    side = strips[0].shape[0]
    about = f"the nearest patches of {service.atlas.images:,} pictures{' of ' + service.atlas.source if service.atlas.source else ''}"
    return (
        f'<div class="dg-cluster" hidden data-where="{escape("{" + ",".join(where) + "}")}" data-rows="{len(strips)}" '
        f'data-columns="{width // side}" data-url="{data_url(Image.fromarray(sheet))}">'
        f'<p role="status"><b></b> looks like this: <span>{escape(about)}.</span></p><div class="dg-patches"></div></div>'
    )


def flips(shaken: Shaken, service: Service) -> str:
    """Which tokens noise changes, for each kind of tokens."""
    figures = [_plain("With noise", data_url(shaken.picture), _realised(shaken.realised_snr))]
    for space, found in shaken.flips.items():
        changed = set(found.places)
        grid = service.grids[space]
        marks = np.full((len(found.before), 4), (128, 128, 128, 60), dtype=np.uint8)
        for place in changed:
            marks[place] = (*service.colors[space][int(found.after[place])], 255)
        picture = Image.fromarray(marks.reshape(*grid, 4))
        count, total = len(changed), len(found.before)
        figures.append(
            f'<figure data-space="{space}" data-flips="{count}"><img class="dg-pixels dg-open" src="{data_url(picture)}" '
            f'alt="places of the changed {SPACES[space]}"><figcaption><b>{count} of {total}</b>'
            f'<meter max="{total}" value="{count}" aria-label="changed {SPACES[space]}"></meter>'
            f"<span>{SPACES[space]} change: {found.share:.0%}</span></figcaption></figure>"
        )
    return f'<section class="dg-flips" aria-live="polite"><div class="dg-pictures">{"".join(figures)}</div></section>'


def _realised(snr: float) -> str:
    return "no noise" if not np.isfinite(snr) else f"{snr:.1f} dB after clipping to 0..255"
