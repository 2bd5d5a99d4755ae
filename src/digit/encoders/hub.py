"""A repository of the public Hub as a local folder: the cache first, then the Hub, and at once a sentence if it is out
of reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from digit.core.errors import DigitError
from digit.core.hub import out_of_reach


def repository_folder(name: str, weights: str = "*.safetensors", fallback: str | None = None) -> Path:
    """A local folder with the JSON files and the weights of a Hub repository.

    Args:
        name: ``owner/name``.
        weights: file pattern that must match something.
        fallback: another pattern, tried when the repository has nothing that matches ``weights``.

    Raises:
        DigitError: it is not in the cache, and the Hub is switched off, out of reach, or has no such repository.
    """
    cached = _snapshot(name, [], local=True)
    patterns = [weights, *([fallback] if fallback else [])]
    if cached is not None and _holds(cached, patterns):
        return cached
    tried = f"'{name}': there is no such local folder, and it is not in the cache ({constants.HF_HUB_CACHE})"
    if barrier := out_of_reach():
        raise DigitError(f"{tried}; {barrier}. Give a local folder instead.")
    for pattern in patterns:
        folder = _snapshot(name, ["*.json", pattern], local=False)
        if folder is not None and _holds(folder, [pattern]):
            return folder
    raise DigitError(f"{tried}; the Hub has no repository of that name with {' or '.join(patterns)} that may be read.")


def _snapshot(name: str, patterns: Sequence[str], local: bool) -> Path | None:
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(patterns) or None, local_files_only=local)
        )
    except (errors.LocalEntryNotFoundError, errors.RepositoryNotFoundError, errors.GatedRepoError):
        return None
    except errors.HfHubHTTPError as error:
        raise DigitError(f"The Hub refused '{name}': {str(error).strip().splitlines()[0]}") from error


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return (folder / "config.json").is_file() and any(next(folder.glob(pattern), None) for pattern in patterns)
