"""From the name of a model to its folder: a local folder, a packaged model, the cache, or the Hub. And back to the Hub.

The DiGIT authors' checkpoints are on the Hub in their own layout; they are downloaded, converted once, and kept in the
cache.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors

from digit.core.errors import DigitError
from digit.core.files import cache_folder
from digit.core.hub import INDEX, endpoint, is_repository, out_of_reach, packaged_models, repository_id
from digit.pipeline.index import read_index

AUTHORS = "DAMO-NLP-SG/DiGIT"
VQGAN_NAME = "vqgan_jax_strongaug.ckpt"
VQGAN_LINK = "https://drive.google.com/file/d/13S_unB87n6KKuuMdyMnyExW0G1kplTbP/view"
PARTS = ("encoder", "codebook", "prior", "decoder", "vqgan")
"""The folders of a model."""
_LOGIN = "A private model, and publishing, need a token: hf auth login, or the variable HF_TOKEN."


class Published(NamedTuple):
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
) -> Path:
    """The folder of a model.

    Args:
        name: looked for as a local model, a packaged one, another local folder, in the cache, and on the Hub, in this
            order; None is the packaged one.
        variant: which of the models of a Hub repository: for ``DAMO-NLP-SG/DiGIT`` one of :data:`VARIANTS`, else a
            folder in it.
        revision: branch, tag or commit on the Hub.
        token: for private repositories; see huggingface_hub.

    Raises:
        DigitError: it is in none of these places; the message says what was tried.

    ``$DIGIT_HUB_DIR`` may name a folder that mirrors the Hub (``OWNER/NAME/FILES...``), which then stands for it.
    """
    packaged = packaged_models()
    if name is None:
        if not packaged:
            raise DigitError(
                "No model was named, and this installation has no packaged one. Give a folder or a Hub id."
            )
        return next(iter(packaged.values()))
    path, text = Path(name).expanduser(), str(name)
    if text in packaged and not (path / INDEX).is_file():  # a data set may lie in a folder of the same name
        return packaged[text]
    if path.is_dir():
        return path
    known = f" (packaged: {', '.join(packaged)})" if packaged else ""
    repository_id(text, "model", f"no such folder, no packaged model of this name{known}")
    if text == AUTHORS:
        return _authors_model(variant, revision, token)
    inside = f"{variant}/" if variant else ""
    wanted = [f"{inside}{place}" for place in (INDEX, "README.md", *(f"{part}/*" for part in PARTS))]
    tried = f"'{text}' is neither a local folder nor a packaged model"
    return _fetch(text, wanted[:1], wanted, tried, revision=revision, token=token) / inside


def _authors_model(variant: str | None, revision: str | None, token: str | bool | None) -> Path:
    """One of the authors' models, converted; from the cache if it was converted before."""
    from digit.convert.fairseq import read_checkpoint
    from digit.convert.upstream import convert_upstream  # which loads PyTorch

    if variant not in VARIANTS:
        given = f"variant '{variant}' was given" if variant else "no variant was given"
        raise DigitError(f"{AUTHORS} holds several models and {given}; choose one of: {', '.join(VARIANTS)}.")
    store = cache_folder()
    folder = store / "models" / AUTHORS.replace("/", "--") / (variant if revision is None else f"{variant}@{revision}")
    if (folder / INDEX).is_file():
        return folder
    files = VARIANTS[variant]
    tried = f"'{AUTHORS}' ({variant}) is neither a local folder nor converted in the cache ({folder})"
    root = _fetch(AUTHORS, [*files], [*files], tried, newest=False, revision=revision, token=token)
    stage1, stage2 = (root / name for name in files)
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


def _fetch(
    repository: str, needed: list[str], wanted: list[str], tried: str, newest: bool = True, **options: Any
) -> Path:
    """The folder that stands for a Hub repository, with files of one commit: those needed, and all of the patterns that
    are wanted. They come from the mirror, the Hub's own cache, or the network.

    Where the newest commit is wanted, the cache serves only if the Hub cannot be asked; else it comes first. Messages
    begin with ``tried``.
    """
    options |= {"endpoint": endpoint(), "allow_patterns": wanted}

    def whole(root: Path) -> Path:
        if missing := [name for name in needed if not (root / name).is_file()]:
            raise errors.EntryNotFoundError(missing[0])
        return root

    def download(local: bool) -> Path:
        return whole(Path(huggingface_hub.snapshot_download(repository, local_files_only=local, **options)))

    if mirror := os.environ.get("DIGIT_HUB_DIR"):
        try:
            return whole(Path(mirror) / repository)
        except errors.EntryNotFoundError as error:
            where = Path(mirror) / repository / str(error)
            raise DigitError(f"{tried}, and the mirror in DIGIT_HUB_DIR has no {where}.") from None
    barrier = out_of_reach() if newest else ""
    if not newest or barrier:
        with contextlib.suppress(errors.LocalEntryNotFoundError, errors.EntryNotFoundError):
            return download(True)
        if barrier := barrier or out_of_reach():
            raise DigitError(
                f"{tried}; {needed[0]} is not in the Hub's cache ({constants.HF_HUB_CACHE}), and {barrier}. Give a "
                "local folder instead."
            )
    try:
        return download(False)
    except (errors.EntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        failed = f"the download of {needed[0]} failed"
        reasons: dict[type[BaseException], str] = {
            errors.LocalEntryNotFoundError: f"{failed}: {error.__cause__ or error}",
            errors.EntryNotFoundError: f"the Hub's {repository} has no file {error}.",
            errors.RevisionNotFoundError: f"the Hub's {repository} has no branch, tag or commit of that name.",
            errors.RepositoryNotFoundError: f"the Hub has no repository {repository} that may be read. {_LOGIN}",
            Exception: f"{failed}: {_first_line(error)}",
        }
        reason = next(text for kind, text in reasons.items() if isinstance(error, kind))
        raise DigitError(f"{tried}; {reason}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# -- publishing --------------------------------------------------------------------------------------------------------


def push_folder(
    folder: str | Path,
    repository: str,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    variant: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Publish a saved model on the Hub: the address of the commit, or of the pull request. Other files of the
    repository stay; parts that the model no longer has go. DigitError: not a model, no such place, or the Hub refuses.

    Args:
        folder, repository: the model, and ``owner/name``, made if it does not exist.
        private: make it readable by its owner alone. One that exists stays as it is.
        token: see huggingface_hub; None: what ``hf auth login`` or ``$HF_TOKEN`` has left.
        revision: the branch to write to, made if it does not exist; None: main.
        variant: a folder of the repository, for one that holds several models.
        message, create_pr: of the commit; propose it as a pull request.
    """
    index = read_index(folder)
    if not is_repository(repository):
        raise DigitError(f"The repository '{repository}' was given; expected owner/name, such as somebody/my-model.")
    if barrier := out_of_reach():
        raise DigitError(f"The model was not published: {barrier}.")
    api = huggingface_hub.HfApi(endpoint=endpoint(), token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            path_in_repo=variant,
            revision=None if create_pr else revision,
            create_pr=create_pr,
            commit_message=message or f"{index['name']}, saved by digit {index['digit_version']}",
            delete_patterns=[f"{part}/*" for part in PARTS],
        )
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        login = f" {_LOGIN}" if code in (401, 403, 404) else ""
        raise DigitError(f"The Hub did not take the model for {repository}: {_first_line(error)}.{login}") from error
    except (errors.LocalTokenNotFoundError, OSError) as error:
        raise DigitError(f"The model was not published: {_first_line(error)}. {_LOGIN}") from error
    return str(commit.pr_url or commit.commit_url)
