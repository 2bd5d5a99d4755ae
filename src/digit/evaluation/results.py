"""What every measurement returns: its values, one table, one figure, and all that decides whether values may be
compared.

Terminal, Markdown, ``result.json`` and the HTML report show :meth:`Result.rows` and :meth:`Result.figure`, nothing
else.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

from pydantic import TypeAdapter, ValidationError
from rich.table import Table
from rich.text import Text

from digit.core.environment import hardware, versions
from digit.core.errors import DigitError, MissingPackageError, require
from digit.core.files import read_json, write_bytes, write_file, write_json
from digit.core.progress import console

RESULT = "result.json"
DASH = "\u2013"  # stands where there is no value
COLORS = ("#7c8494", "#1f6feb", "#c4500a", "#1a8f6a", "#8a4fd0", "#b0306a", "#8a7412")
"""Line colours of every figure, which the report exchanges for those of the reader's light or dark scheme."""
PAPER, OURS, OTHER = COLORS[:3]
"""What the paper reports; semantic tokens (or the first thing); VQ tokens (or a second thing)."""

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?[%MKB]| ±.*)?")
Rows = list[dict[str, Any]]
R = TypeVar("R", bound="Result")
P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished measurement. Each kind is a subclass with its own type of values, ``rows`` and ``figure``.

    Attributes:
        kind: which: "stability", "probe", "sweep" ...
        title: one line for people.
        values: what was measured.
        settings: everything that was chosen.
        model: name, and parameters and checksum of each part.
        data: which images, :func:`~digit.evaluation.model_source.describe_data`.
        paper: the paper's figures that these stand beside, and their source.
        notes: what a reader of the values should know.
        plots: file names of the figures beside it.
        seconds: wall time.
        made: UTC; None where a file does not say.
        hardware, versions: what it ran on.
    """

    plot: ClassVar[str] = ""  # file name of the figure; "" stands for KIND.png
    kinds: ClassVar[tuple[str, ...]] = ()  # of a class that serves several

    kind: str = ""
    title: str
    values: Any
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    paper: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    plots: tuple[Any, ...] = ()
    seconds: float = 0.0
    made: str | None = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    hardware: dict[str, Any] = field(default_factory=hardware)
    versions: dict[str, str] = field(default_factory=versions)

    def rows(self) -> Rows:
        """The table: one dict a row, column heading -> value. This one is for kinds without rows of their own."""
        if isinstance(self.values, list) and self.values and all(isinstance(v, Mapping) for v in self.values):
            return [flatten(v) for v in self.values]
        return [{"": name, "value": value} for name, value in flatten(self.values).items()]

    def figure(self) -> Any:
        """A matplotlib Figure, or None where there is nothing to draw.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return None

    def provenance(self) -> str:
        """One line under the table: what the values depend on, as far as it is known."""
        s = self.settings
        runs = s.get("runs") or s
        return provenance(model=self.model, data=self.data, reference=s.get("reference"), sampling=runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the line of :meth:`provenance`."""
        return {**asdict(self), "seconds": round(self.seconds, 2), "provenance": self.provenance()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Result:
        """What :meth:`to_dict` gave, as the class of its kind; unknown kinds become a plain :class:`Result`.

        Raises:
            DigitError: values that are not of that kind.
        """
        kinds = {kind: each for each in Result.__subclasses__() for kind in each.kinds or (each.kind,)}
        chosen = kinds.get(str(values.get("kind")), Result)
        unknown: dict[str, Any] = {"made": None, "hardware": {}, "versions": {}}
        try:
            return TypeAdapter(chosen).validate_python({**unknown, **values})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DigitError(
                f"this {values.get('kind')} result is not as expected: {where}: {first['msg']}."
            ) from error

    @staticmethod
    def load(path: str | Path) -> Result:
        """Read a ``result.json``.

        Raises:
            DigitError: it is missing, not JSON, or not a result.
        """
        values = read_json(path)
        if not isinstance(values, Mapping) or not {"kind", "title", "values"} <= values.keys():
            raise DigitError(f"{path} is not a result: 'kind', 'title' and 'values' are expected.")
        return Result.from_dict(values)

    def save(self: R, folder: str | Path) -> R:
        """Write ``result.json``, ``result.md`` and the figure into a folder; without matplotlib, no figure but a note.

        Returns:
            The result as it was saved, with its ``plots``.
        """
        folder, saved = Path(folder), self
        try:
            figure = self.figure()
        except MissingPackageError as error:
            figure, saved = None, replace(self, notes=(*self.notes, str(error)))
        if figure is not None:
            name = self.plot or f"{self.kind}.png"
            write_file(folder / name, lambda aside: figure.savefig(aside, dpi=150, format="png"))
            saved = replace(saved, plots=(name,))
        write_bytes(folder / "result.md", saved.markdown().encode())
        write_json(folder / RESULT, saved.to_dict())
        return saved

    def markdown(self) -> str:
        """Title, table, provenance and notes."""
        rows = self.rows()
        head = columns(rows)
        lines = [head, ["---"] * len(head), *([shown(row.get(name)) for name in head] for row in rows)]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        notes = "".join(f"- {note}\n" for note in self.notes)
        return f"## {self.title}\n\n{table}\n\n{self.provenance()}\n\n{notes}"

    def table(self) -> Table:
        """The table for the terminal."""
        rows = self.rows()
        table = Table(title=self.title, title_justify="left")
        for name in columns(rows):
            table.add_column(name, justify="right" if is_numeric(rows, name) else "left")
        for row in rows:  # as Text: names of files may hold brackets, which are not markup
            table.add_row(*(Text(shown(row.get(name))) for name in columns(rows)))
        return table

    def show(self, out: str | Path | None = None) -> None:
        """Print table, provenance, notes, and where the files are; not cut to a width where stdout is no terminal."""
        screen = console()
        screen.print(self.table(), soft_wrap=False)
        lines = [self.provenance(), *(f"Note: {note}" for note in self.notes)]
        if out is not None:
            lines.append(f"Written to {out}: {', '.join([RESULT, *self.plots])} ({self.seconds:.0f} s)")
        screen.print("\n".join(lines), markup=False)


def timed(measure: Callable[P, R]) -> Callable[P, R]:
    """A function whose result says how many ``seconds`` it took."""

    @wraps(measure)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        began = time.monotonic()
        found = measure(*args, **kwargs)
        return replace(found, seconds=time.monotonic() - began)

    return wrapped


# ---- tables ----------------------------------------------------------------------------------------------------------


def columns(rows: Rows) -> list[str]:
    """The headings of a table, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def is_numeric(rows: Rows, column: str) -> bool:
    """Whether a column holds mostly numbers, which are aligned to the right; also as text: "0.114 ±0.003", "219M"."""
    cells = [text for row in rows if (text := shown(row.get(column))) != DASH]
    return 2 * sum(bool(_NUMBER.fullmatch(text)) for text in cells) >= len(cells)


def shown(value: Any, digits: int = 4) -> str:
    """A cell as text: numbers with ``digits`` significant digits, None as a dash."""
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}g}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    return f"{value:,.{min(decimals, 6)}f}"


def millions(parameters: float | None) -> str:
    """A number of parameters, given in millions, as people write it."""
    if parameters is None:
        return DASH
    if parameters >= 1000:
        return f"{parameters / 1000:.3g}B"
    return f"{parameters:.3g}M" if parameters >= 1 else f"{1000 * parameters:.3g}K"


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested values as dotted name -> text; settings are given exactly, without separators or added zeros."""
    if isinstance(values, Mapping):
        items = ((f"{prefix}.{key}" if prefix else str(key), value) for key, value in values.items())
        return {name: text for key, value in items for name, text in flatten(value, key).items()}
    if isinstance(values, (list, tuple)):
        nested = any(isinstance(v, (Mapping, list, tuple)) for v in values)
        plain = json.dumps(values, ensure_ascii=False) if nested else ", ".join(flatten(v)[""] for v in values)
        return {prefix: plain}
    return {prefix: DASH if values is None else f"{values:.6g}" if isinstance(values, float) else str(values)}


Facts = Mapping[str, Any] | None


def provenance(
    model: Facts = None, data: Facts = None, reference: Facts = None, network: str | None = None, sampling: Facts = None
) -> str:
    """One line of what a table's values depend on: numbers of images, reference, filters, network, labels, guidance.

    Args:
        model: with ``name``, or several models by name.
        data: one image set with ``name``, ``split``, ``images`` and the ``filter`` of its resize, or several by name.
        reference: an image set; its ``weights`` are the feature network's checksum.
        network: the feature network, in words.
        sampling: ``num``, ``labels``, ``decoder`` and the ``stages`` (or ``settings``) of a run, or several runs by
            name.
    """
    facts = [f"model {model['name']}"] if model and isinstance(model.get("name"), str) else []
    sets = {"": data} if data and isinstance(data.get("name"), str) else dict(data or {})
    facts += [f"{name} {_images(one)}".strip() for name, one in sets.items() if isinstance(one, Mapping)]
    runs = {"": sampling} if sampling and "num" in sampling else dict(sampling or {})
    told = {name: _sampled(run) for name, run in runs.items() if isinstance(run, Mapping) and "num" in run}
    facts += [f"{name}: {text}".removeprefix(": ") for name, text in told.items()]
    if reference:
        facts.append(f"reference {_images(reference)}")
        weights = str(reference.get("weights") or "")[:12]
        network = network or (f"InceptionV3, weights {weights}" if weights else None)
    if network:
        facts.append(f"feature network: {network}")
    return "; ".join(facts)


def _images(side: Mapping[str, Any]) -> str:
    name = " ".join(str(side[key]) for key in ("name", "split") if side.get(key))
    count = f"{shown(side['images'])} images" if side.get("images") is not None else ""
    how = side.get("filter") or ""  # older files do not say
    resized = "not resized" if how == "none" else how and f"resized by {how}"
    details = ", ".join(filter(None, (count, resized)))
    return f"{name} ({details})" if details else name


def _sampled(run: Mapping[str, Any]) -> str:
    """Number, decoder, labels, and of each stage its filters and guidance."""
    facts = [f"{shown(run['num'])} generated images"]
    if run.get("decoder"):
        facts.append(f"{run['decoder']} decoder")
    labels = run.get("labels")
    facts.append("no labels" if labels in (None, "none") else f"labels {', '.join(flatten(labels).values())}")
    if stages := run.get("stages"):
        facts += [f"{stage}: {stage_text(values)}" for stage, values in stages.items()]
    else:
        settings = ", ".join(f"{name} {text}" for name, text in flatten(run.get("settings") or {}).items())
        facts.append("filter and guidance: " + (settings or "the model's own"))
    return ", ".join(facts)


def stage_text(values: Mapping[str, Any]) -> str:
    """Temperature, filters and guidance of a stage in words."""
    facts = [
        f"{name.replace('_', '-')} {values[name]:g}"
        for name in ("top_k", "top_p")
        if values.get(name) not in (None, 0, 1)
    ]
    facts = facts or ["no filter"]
    facts += [f"temperature {values['temperature']:g}"] if values.get("temperature", 1) != 1 else []
    guidance = values.get("cfg_scale", 1)
    return " ".join([*facts, f"guidance {guidance:g}" if guidance != 1 else "no guidance"])


# ---- figures ---------------------------------------------------------------------------------------------------------


def panels(count: int = 1, size: tuple[float, float] = (4.8, 3.8), columns: int = 0) -> tuple[Any, list[Any]]:
    """A matplotlib Figure with ``count`` axes of ``size`` inches each in rows of ``columns`` (0: one row), and the
    axes.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    module = require("matplotlib.figure", "eval", "Drawing figures")
    columns = columns or count
    rows = -(-count // columns)
    figure = module.Figure((size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    axes = axes[:count]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(visible=True, alpha=0.3)
        each.set_axisbelow(True)
    return figure, axes


Lines = Mapping[str, Sequence[tuple[float, float]]]


def lines_figure(shown: Mapping[str, Lines], xlabel: str = "", ylabel: str = "", columns: int = 0) -> Any:
    """A matplotlib Figure of a panel for each quantity, by its label, and a line for each named thing, which keeps its
    colour; None where there is nothing to draw.
    """
    if not shown:
        return None
    figure, places = panels(len(shown), (5.2, 4.0), columns or (len(shown) if len(shown) <= 3 else -(-len(shown) // 2)))
    names = list(dict.fromkeys(name for lines in shown.values() for name in lines))
    for axes, (title, lines) in zip(places, shown.items(), strict=True):
        for name, points in lines.items():
            color = COLORS[1 + names.index(name) % (len(COLORS) - 1)]
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=name, markersize=4)
        axes.set(xlabel=xlabel, ylabel=ylabel or title, title=title.rstrip(" ↓↑"))
        axes.margins(y=0.12)
    legend(places)
    return figure


def legend(axes: Sequence[Any]) -> None:
    """A legend under each axes that has more than one named thing; every row grows by the longest of them."""
    lines = [0]
    for each in axes:
        names = each.get_legend_handles_labels()[1]
        if len(names) > 1:
            columns = 1 if max(map(len, names)) > 22 else 2
            lines.append(-(-len(names) // columns))
            how = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.5, "ncols": columns}
            each.legend(fontsize="small", frameon=False, **how)
    figure, rows = axes[0].figure, axes[0].get_gridspec().nrows
    figure.set_figheight(figure.get_figheight() + 0.2 * max(lines) * rows)
