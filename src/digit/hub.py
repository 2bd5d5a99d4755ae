"""From the name of a model to its folder: a local folder, a packaged model, the cache, or the Hub.

The DiGIT authors' checkpoints are on the Hub in their own layout; they are downloaded, converted once, and kept in the cache.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from digit.data.dataset import cache_folder
from digit.encoders.hub import looks_like_repository, unreachable
from digit.errors import DigitError
from digit.files import read_json

AUTHORS = "DAMO-NLP-SG/DiGIT"
VQGAN_NAME = "vqgan_jax_strongaug.ckpt"
VQGAN_LINK = "https://drive.google.com/file/d/13S_unB87n6KKuuMdyMnyExW0G1kplTbP/view"
INDEX = "model_index.json"


@dataclass(frozen=True)
class Published:
    """The files of the authors that make a model."""

    stage1: str
    stage2: str


def _checkpoint(run: str) -> str:
    return f"outputs/{run}/checkpoints/checkpoint_last.pt"


_BASE_DECODER, _LARGE_DECODER = _checkpoint("base_8k_stage2_400epoch"), _checkpoint("large_16k_stage2")
VARIANTS = {
    "base": Published(_checkpoint("base_8k_stage1_400epoch"), _BASE_DECODER),
    "base-cond": Published(_checkpoint("base_8k_stage1_cls"), _BASE_DECODER),
    "large": Published(_checkpoint("large_16k_stage1"), _LARGE_DECODER),
    "large-cond": Published(_checkpoint("large_16k_stage1_cls"), _LARGE_DECODER),
}


def resolve_model(
    name: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache: str | Path | None = None,
) -> Path:
    """The folder of a model.

    Args:
        name: looked for as a local folder, a packaged model, in the cache, and on the Hub, in this order; None is the packaged one.
        variant: which of the models of a Hub repository: for ``DAMO-NLP-SG/DiGIT`` one of :data:`VARIANTS`, else a folder in it.
        revision: branch, tag or commit on the Hub.
        token: for private repositories; see huggingface_hub.
        cache: where converted models are kept; None: ``$DIGIT_CACHE``, else ``~/.cache/digit``.

    Raises:
        DigitError: it is in none of these places; the message says what was tried.

    ``$DIGIT_HUB_DIR`` may name a folder that mirrors the Hub (``OWNER/NAME/FILES...``), which then stands for it.
    """
    packaged = packaged_models()
    if name is None:
        if not packaged:
            raise DigitError("No model was named, and this installation has no packaged one. Give a folder or a Hub id.")
        return next(iter(packaged.values()))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = str(name)
    if text in packaged:
        return packaged[text]
    if not looks_like_repository(text):
        known = f" (packaged: {', '.join(packaged)})" if packaged else ""
        raise DigitError(
            f"There is no model '{text}': no such folder, no packaged model of this name{known}, and it is not a Hub id (owner/name)."
        )
    store = Path(cache) if cache is not None else cache_folder()
    if text == AUTHORS:
        return _authors_model(variant, revision, token, store)
    return _published_model(text, variant, revision, token)


def packaged_models() -> dict[str, Path]:
    """The models that come with the package, by name."""
    found = sorted((Path(__file__).parent / "packaged").glob(f"*/{INDEX}"))
    return {path.parent.name: path.parent for path in found}


def _authors_model(variant: str | None, revision: str | None, token: str | bool | None, store: Path) -> Path:
    """One of the authors' models, converted; from the cache if it was converted before."""
    if variant not in VARIANTS:
        given = f"variant '{variant}' was given" if variant else "no variant was given"
        raise DigitError(f"{AUTHORS} holds several models and {given}; choose one of: {', '.join(VARIANTS)}.")
    folder = store / "models" / AUTHORS.replace("/", "--") / (variant if revision is None else f"{variant}@{revision}")
    if (folder / INDEX).is_file():
        return folder
    files = VARIANTS[variant]
    tried = f"'{AUTHORS}' ({variant}) is neither a local folder nor converted in the cache ({folder})"
    stage1, stage2 = (_file(AUTHORS, name, revision, token, tried) for name in (files.stage1, files.stage2))
    from digit.convert.fairseq import read_checkpoint
    from digit.convert.upstream import convert_upstream

    vqgan = None
    if not read_checkpoint(stage2).keys.under("vqgan.").names():
        vqgan = store / VQGAN_NAME
        if not vqgan.is_file():
            store.mkdir(parents=True, exist_ok=True)
            raise DigitError(
                f"{stage2} has no VQGAN inside, and MAGE's is on a Google Drive, from where programs cannot fetch it. "
                f"Download {VQGAN_LINK} in a browser, save it as {vqgan}, and try again."
            )
    return convert_upstream(folder, stage1, stage2, vqgan=vqgan, name=f"{AUTHORS} {variant}")


def _published_model(name: str, variant: str | None, revision: str | None, token: str | bool | None) -> Path:
    """A model in our format on the Hub; a variant is a folder of the repository."""
    inside = f"{variant}/" if variant else ""
    tried = f"'{name}' is neither a local folder nor a packaged model"
    index = read_json(_file(name, f"{inside}{INDEX}", revision, token, tried))
    places = [*index.get("parts", []), *(f"decoder/{kind}" for kind in index.get("decoders", []))]
    for place in places:
        for file in ("config.json", "model.safetensors"):
            _file(name, f"{inside}{place}/{file}", revision, token, tried)
    return _file(name, f"{inside}{INDEX}", revision, token, tried).parent


def _file(repository: str, name: str, revision: str | None, token: str | bool | None, tried: str) -> Path:
    """A file of a Hub repository on this machine: from the mirror, the Hub's own cache, or the network."""
    mirror = os.environ.get("DIGIT_HUB_DIR")
    if mirror:
        path = Path(mirror) / repository / name
        if not path.is_file():
            raise DigitError(f"{tried}, and the mirror in DIGIT_HUB_DIR has no {path}.")
        return path
    import huggingface_hub
    from huggingface_hub import errors

    endpoint = os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT

    def download(local: bool) -> Path:
        return Path(
            huggingface_hub.hf_hub_download(
                repository, name, revision=revision, token=token, endpoint=endpoint, local_files_only=local
            )
        )

    try:
        return download(local=True)
    except errors.LocalEntryNotFoundError:
        pass
    where = f"{name} is not in the Hub's cache ({huggingface_hub.constants.HF_HUB_CACHE})"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise DigitError(f"{tried}; {where}, and the Hub was not asked because HF_HUB_OFFLINE is set.")
    reason = unreachable(endpoint)
    if reason:
        raise DigitError(f"{tried}; {where}, and the Hub ({endpoint}) is out of reach: {reason}. Give a local folder instead.")
    try:
        return download(local=False)
    except errors.EntryNotFoundError as error:
        raise DigitError(f"{tried}; the Hub's {repository} has no file {name}.") from error
    except errors.RepositoryNotFoundError as error:
        raise DigitError(f"{tried}; the Hub has no repository {repository} that may be read.") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise DigitError(f"{tried}; the download of {name} failed: {str(error).strip().splitlines()[0]}") from error
