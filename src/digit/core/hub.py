"""Names of models, encoders and datasets that a user gives: which can be on the Hub, and whether it can be asked."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from digit.core.errors import DigitError

INDEX = "model_index.json"
"""The file that makes a folder a model."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the second only where a repository has none of the first
_FILE = re.compile(
    r"\.(bin|ckpt|gif|gz|jpe?g|json|np[yz]|onnx|parquet|pkl|png|pth?|safetensors|tar|tgz|txt|webp|ya?ml|zip)$", re.I
)


def packaged_models() -> dict[str, Path]:
    """The models that come with the package, by name."""
    found = sorted((Path(__file__).parents[1] / "packaged").glob(f"*/{INDEX}"))
    return {path.parent.name: path.parent for path in found}


def is_repository(name: str) -> bool:
    """Whether ``name`` has the form of a repository on the Hub, ``owner/name``, and not of a path."""
    form = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)
    return form is not None and _FILE.search(name) is None


def repository_id(name: str, what: str, places: str = "no such file or folder") -> str:
    """``name``, where it can be a repository on the Hub. Mistyped paths are answered at once: a DigitError where it
    looks like a path, or its first part is a folder that is here.

    ``what`` kind it should be, such as "model", and the ``places`` where it was looked for, are for the message.
    """
    owner, _, rest = name.partition("/")
    if not is_repository(name):
        raise DigitError(f"There is no {what} '{name}': {places}, and it is not a Hub id (owner/name).")
    if Path(owner).is_dir():
        reason = f"the folder '{owner}' has no '{rest}' in it, so the Hub was not asked"
        raise DigitError(f"There is no {what} '{name}': {places}; {reason}.")
    return name


def endpoint() -> str:
    """The address of the Hub."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT") or str(constants.ENDPOINT)


def out_of_reach() -> str:
    """Why the Hub cannot be asked, as a clause, or "". Its client would try again for half a minute first."""
    from huggingface_hub import constants

    # switched off before its client was imported, or after
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "the Hub was not asked because HF_HUB_OFFLINE is set"
    address = endpoint()
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5.0).close()
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError) as error:
        return f"the Hub ({address}) is out of reach: {getattr(error, 'reason', error)}"
    return ""


def repository_folder(name: str) -> Path:
    """A local folder with JSON files and weights of a Hub repository; a DigitError where it is not in the cache nor
    there.
    """
    from huggingface_hub import constants

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
    import huggingface_hub
    from huggingface_hub import errors

    try:
        local = download is None
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=download, local_files_only=local))
    except (errors.LocalEntryNotFoundError, errors.RepositoryNotFoundError, errors.GatedRepoError):
        return None
    except errors.HfHubHTTPError as error:
        raise DigitError(f"The Hub refused '{name}': {str(error).strip().splitlines()[0]}") from error
    return folder if (folder / "config.json").is_file() and any(folder.glob(weights)) else None
