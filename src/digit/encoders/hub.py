"""A repository of the public Hub as a local folder: the cache first, then the Hub, and at once a sentence if it is out
of reach.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from digit.core.errors import DigitError
from digit.core.hub import out_of_reach

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the second only where a repository has none of the first


def repository_folder(name: str) -> Path:
    """A local folder with the JSON files and the weights of a Hub repository, ``owner/name``; a DigitError where it is
    not in the cache, and the Hub is switched off, out of reach, or has no such repository.
    """
    for pattern in _WEIGHTS:
        if folder := _snapshot(name, None, pattern):
            return folder
    tried = f"'{name}': there is no such local folder, and it is not in the cache ({constants.HF_HUB_CACHE})"
    if barrier := out_of_reach():
        raise DigitError(f"{tried}; {barrier}. Give a local folder instead.")
    for pattern in _WEIGHTS:
        if folder := _snapshot(name, ["*.json", pattern], pattern):
            return folder
    raise DigitError(f"{tried}; the Hub has no repository of that name with {' or '.join(_WEIGHTS)} that may be read.")


def _snapshot(name: str, download: list[str] | None, weights: str) -> Path | None:
    """The repository in the cache, after a download if patterns of one are given; None without config or weights."""
    try:
        local = download is None
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=download, local_files_only=local))
    except (errors.LocalEntryNotFoundError, errors.RepositoryNotFoundError, errors.GatedRepoError):
        return None
    except errors.HfHubHTTPError as error:
        raise DigitError(f"The Hub refused '{name}': {str(error).strip().splitlines()[0]}") from error
    return folder if (folder / "config.json").is_file() and any(folder.glob(weights)) else None
