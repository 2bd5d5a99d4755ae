"""Weights that others publish as one file: given as a file, found in the cache or on the Hub, or fetched from their
address.
"""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.files import cache_folder, read_tensors, sha256_of, write_file, write_tensors

HUB = "hf://"


@dataclass(frozen=True)
class PublishedWeights:
    """One published file of tensors.

    Attributes:
        title: what messages call it.
        sha256: of the published file, or its first digits.
        cached: safetensors files in the cache folder that may hold these tensors; the first is written after a
            download.
        prefix: the names of the tensors that are kept in the cache begin with this.
    """

    title: str
    url: str
    sha256: str
    cached: tuple[str, ...]
    prefix: str = ""

    @property
    def name(self) -> str:
        """The published file's name."""
        return self.url.rsplit("/", 1)[1]

    def load(self, source: str | Path = "auto") -> tuple[dict[str, Tensor], str]:
        """The tensors, and where they come from; a DigitError says what was tried.

        ``source`` is "auto": the cache, else the publisher's address; "public": the address's own file, from the cache
        or now; a ``.pth`` or ``.safetensors`` file; or a file on the Hub, ``hf://OWNER/NAME/FILE``.
        """
        if source not in ("auto", "public"):
            return self._given(str(source))
        files = [cache_folder() / name for name in (self.cached if source == "auto" else self.cached[:1])]
        for file in files:
            if file.is_file():
                return read_tensors(file), f"cache: {file.name}"
        aside = files[0].with_suffix(".pth")
        try:
            tensors = read_weights(download(self.url, aside, self.sha256))
        except DigitError as error:
            raise DigitError(
                f"{self.title}'s weights were not found. Tried the cache ({', '.join(map(str, files))}); {error} "
                f"Fetch {self.name} on a machine that reaches it, and give its path."
            ) from error
        finally:
            aside.unlink(missing_ok=True)
        write_tensors(files[0], {key: value for key, value in tensors.items() if key.startswith(self.prefix)})
        return tensors, f"{self.title}'s {self.name}"

    def _given(self, source: str) -> tuple[dict[str, Tensor], str]:
        if not source.startswith(HUB):
            return read_weights(Path(source)), f"file: {Path(source).name}"
        owner, _, rest = source.removeprefix(HUB).partition("/")
        name, _, file = rest.partition("/")
        try:
            return read_weights(Path(huggingface_hub.hf_hub_download(f"{owner}/{name}", file))), source
        except (OSError, ValueError) as error:  # the Hub's errors are of these kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DigitError(f"{source} could not be had from the Hub ({reason}).") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of ``torch.save`` (``weights_only``); a DigitError for other files."""
    if not path.is_file():
        raise DigitError(f"There are no weights at {path}.")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DigitError(f"{path} could not be read as weights ({type(error).__name__}: {error}).") from error
    return tensors


def download(url: str, path: Path, sha256: str) -> Path:
    """Fetch ``url`` into ``path``, whole or not at all; a DigitError where that fails. ``sha256``: its first digits."""

    def fetch(aside: Path) -> None:
        with urllib.request.urlopen(url, timeout=20.0) as answer, open(aside, "wb") as handle:
            shutil.copyfileobj(answer, handle, 1 << 20)
        if not sha256_of(aside).startswith(sha256):
            raise DigitError(f"{url} sent another file than expected: its SHA-256 does not begin with {sha256[:16]}.")

    try:
        return write_file(path, fetch)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise DigitError(f"{url} could not be reached ({getattr(error, 'reason', error)}).") from error
