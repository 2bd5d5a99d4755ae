"""A repository of the public hub as a local folder: the cache first, then the hub, and at once a sentence if it is out
of reach.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from digit.core.errors import DigitError


def looks_like_repository(name: str) -> bool:
    """Whether this could be a hub id, ``owner/name``, rather than a path."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not name.endswith(
        (".pth", ".pt", ".safetensors")
    )


def repository_folder(name: str, weights: str = "*.safetensors", fallback: str | None = None) -> Path:
    """A local folder with the JSON files and the weights of a hub repository.

    Args:
        name: ``owner/name``.
        weights: file pattern that must match something.
        fallback: another pattern, tried when the repository has nothing that matches ``weights``.

    Raises:
        DigitError: it is not in the cache, and the hub is switched off, out of reach, or has no such repository.
    """
    cached = _snapshot(name, [], local=True)
    patterns = [weights, *([fallback] if fallback else [])]
    if cached is not None and _holds(cached, patterns):
        return cached
    tried = f"'{name}': there is no such local folder, and it is not in the cache ({constants.HF_HUB_CACHE})"
    if offline():
        raise DigitError(
            f"{tried}; the hub was not asked because HF_HUB_OFFLINE is set. Download it, or give a local folder."
        )
    reason = unreachable()
    if reason:
        raise DigitError(
            f"{tried}; the hub ({constants.ENDPOINT}) is out of reach: {reason}. Give a local folder instead."
        )
    for pattern in patterns:
        folder = _snapshot(name, ["*.json", pattern], local=False)
        if folder is not None and _holds(folder, [pattern]):
            return folder
    raise DigitError(f"{tried}; the hub has no repository of that name with {' or '.join(patterns)} that may be read.")


def _snapshot(name: str, patterns: Sequence[str], local: bool) -> Path | None:
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(patterns) or None, local_files_only=local)
        )
    except (errors.LocalEntryNotFoundError, errors.RepositoryNotFoundError, errors.GatedRepoError):
        return None
    except errors.HfHubHTTPError as error:
        raise DigitError(f"The hub refused '{name}': {str(error).strip().splitlines()[0]}") from error


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return (folder / "config.json").is_file() and any(next(folder.glob(pattern), None) for pattern in patterns)


def offline() -> bool:
    """Whether the user has switched the hub off, before its client was imported or after."""
    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def unreachable(endpoint: str = constants.ENDPOINT, seconds: float = 5.0) -> str:
    """Why the hub does not answer, or "". The hub client itself would retry for half a minute first."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""
