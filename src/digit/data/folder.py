"""Anybody's images as a dataset, with an account of every file: used, changed on the way, or skipped and why."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

from digit.core.errors import DigitError
from digit.core.files import write_json
from digit.core.images import decode, encode_png
from digit.core.progress import bar
from digit.core.transforms import center_crop, resampling, resize_shorter
from digit.data.dataset import refuse_to_replace, write_dataset
from digit.data.sampling import map_ahead
from digit.data.sources import survey_folder

_KEPT_AS_THEY_ARE = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
_AHEAD = 64  # images being decoded at a time, which bounds the memory


@dataclass
class FolderReport:
    """What became of each file below the source folder. ``used + len(skipped)`` is ``files``.

    Attributes:
        converted: file: what was changed, such as "palette" or "EXIF rotation"; these are among the used.
        animated: file: how many frames it has; the first one is used.
        without_class: used images beside the class folders.
        skipped: file: why.
    """

    source: str
    files: int = 0
    used: int = 0
    per_class: dict[str, int] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    animated: dict[str, str] = field(default_factory=dict)
    without_class: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """A few lines for the screen."""
        lines = [f"{_numbered(self.files, 'file')}: {self.used:,} used, {len(self.skipped):,} skipped"]
        if self.per_class:
            counts = self.per_class.values()
            fewest, most = min(counts), max(counts)
            images = f"{fewest:,} to {_numbered(most, 'image')}"
            if fewest == most:
                images = _numbered(most, "image") + " each" * (len(counts) > 1)
            lines.append(f"{_numbered(len(counts), 'class', 'classes')} with {images}")
            if empty := [name for name, images in self.per_class.items() if not images]:
                lines.append(f"classes without an image: {', '.join(empty)}")
            if loose := self.without_class:
                names = ", ".join(loose[:3]) + ", ..." * (len(loose) > 3)
                lines.append(
                    f"beside the class folders, used without a class: {_numbered(len(loose), 'image')} ({names})"
                )
        kinds = Counter(note for what in self.converted.values() for note in what.split("; "))
        lines += [f"converted: {number:,} x {kind}" for kind, number in kinds.most_common()]
        lines += [f"animated: {name} ({what})" for name, what in islice(self.animated.items(), 10)]
        lines += [f"skipped: {name}: {reason}" for name, reason in islice(self.skipped.items(), 10)]
        if len(self.skipped) > 10 or len(self.animated) > 10:
            lines.append("... report.json has them all")
        return "\n".join(lines)


def _numbered(count: int, one: str, more: str = "") -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


class _Item(NamedTuple):
    data: bytes
    extension: str
    size: tuple[int, int]
    notes: tuple[str, ...]


def import_folder(
    source: str | Path, out: str | Path, size: int | None = None, filter: str = "bicubic"
) -> FolderReport:
    """Make a dataset of a folder of images, flat or with a folder for each class (which may hold further folders), and
    with or without a level ``train/``, ``val/`` above; an older dataset at ``out`` is replaced.

    Plain 8-bit RGB JPEG and PNG files are kept byte for byte unless ``size`` is given, which scales the shorter side to
    so many pixels with ``filter`` and cuts the square in the middle; others are stored as PNG after what
    :func:`digit.core.images.decode` does to them. ``OUT/report.json`` accounts for every file.

    Raises:
        DigitError: no such folder, no image in it, an unknown filter, or ``out`` lies in ``source`` or is something
            else than a dataset.
    """
    source, out = Path(source), Path(out)
    _check_places(source, out)
    resampling(filter)
    files, splits, labels, classes, hidden = survey_folder(source, images_only=False)
    report = FolderReport(str(source), files=len(files) + len(hidden), per_class=dict.fromkeys(classes, 0))
    report.skipped = dict.fromkeys(hidden, "hidden: a part of its path begins with a dot")
    name, taken = source.resolve().name, set[str]()

    def prepare(file: str) -> _Item | DigitError:
        return _prepare(source / file, size, filter)

    with (
        write_dataset(out, name, classes, f"the folder {name}", "not stated", size and filter) as writer,
        bar(f"Importing {source}", len(files), unit="files") as progress,
    ):
        items = map_ahead(prepare, files, os.cpu_count() or 1, _AHEAD)
        for file, split, label, item in zip(files, splits, labels.tolist(), items, strict=True):
            progress.advance()
            if isinstance(item, DigitError):
                report.skipped[file] = str(item).replace(str(source / file), "it")
                continue
            writer.add(split, _key(file, taken), item.data, item.extension, item.size, label)
            report.used += 1
            if label >= 0:
                report.per_class[classes[label]] += 1
            elif classes:
                report.without_class.append(file)
            if animated := [note for note in item.notes if note.startswith("animated")]:
                report.animated[file] = animated[0].removeprefix("animated, ")
            if changed := [note for note in item.notes if not note.startswith("animated")]:
                report.converted[file] = "; ".join(changed)
        if not report.files:
            raise DigitError(f"The folder {source} is empty; expected images, loose or in a folder for each class.")
        if not report.used:
            first, reason = next(iter(report.skipped.items()))
            raise DigitError(
                f"Of {_numbered(report.files, 'file')} in {source} none is an image that can be used; the first, "
                f"{first}: {reason}"
            )
        write_json(writer.folder / "report.json", asdict(report))
    return report


def _check_places(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise DigitError(
            f"There is no folder {source}." if not source.exists() else f"{source} is a file, expected a folder."
        )
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise DigitError(
            f"--out {out} and the source folder {source} lie inside each other; choose a folder elsewhere."
        )
    refuse_to_replace(out)


def _prepare(path: Path, size: int | None, filter: str) -> _Item | DigitError:
    try:
        decoded = decode(path)
        image = decoded.image
        if size is None and not decoded.notes and decoded.format in _KEPT_AS_THEY_ARE:
            return _Item(path.read_bytes(), _KEPT_AS_THEY_ARE[decoded.format], image.size, ())
        if size is not None:
            image = center_crop(resize_shorter(image, size, filter), size)
        stored = () if decoded.format in _KEPT_AS_THEY_ARE else (f"{decoded.format} file stored as PNG",)
        return _Item(encode_png(image), "png", image.size, decoded.notes + stored)
    except DigitError as error:
        return error
    except OSError as error:
        return DigitError(f"it cannot be read: {error.strerror or error}.")


def _key(file: str, taken: set[str]) -> str:
    """A key made of a relative path: the ending goes, dots become underscores, and a clash gets a number."""
    folder, slash, base = file.rpartition("/")
    start = f"{folder}{slash}{(base.rpartition('.')[0] or base).replace('.', '_')}"
    key = next(key for key in chain([start], (f"{start}-{number}" for number in count(2))) if key not in taken)
    taken.add(key)
    return key
