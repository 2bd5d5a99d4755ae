"""Whether this installation works, and what to do where it does not. Each check is a few findings in plain words."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from digit.core.devices import bf16_is_fast
from digit.core.errors import DigitError

State = Literal["ok", "note", "broken"]
LITTLE_ROOM, NO_ROOM = 5 << 30, 200 << 20
"""Bytes of free disk: below the first a converted base model does not fit, below the second nothing does."""


@dataclass(frozen=True)
class Finding:
    """Something that was looked at.

    Attributes:
        topic: a word or two.
        state: "ok", "note" (an option is missing, or something could be better), or "broken" (a command will fail).
        what: what was found.
        advice: what to do about it; "" where nothing has to be done.
    """

    topic: str
    state: State
    what: str
    advice: str = ""


def examine() -> list[Finding]:
    """All checks, in the order in which a newcomer needs them; a few seconds."""
    checks = (versions, devices, compiler, packages, places, hub, models)
    return [finding for check in checks for finding in check()]


# -- the machine -------------------------------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    """Python, torch and this package."""
    from digit import __version__

    yield Finding(
        "digit", "ok", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    if Version(torch.__version__) < Version("2.6"):
        yield Finding("torch", "broken", torch.__version__, "digit needs 2.6 or newer: pip install -U torch")
    else:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        yield Finding("torch", "ok", f"{torch.__version__}, built for {build}")


def devices() -> Iterator[Finding]:
    """Every device does a small computation, in float32 and bfloat16."""
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    for name in names:
        yield _device(torch.device(name))
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        yield Finding(
            "GPU", "note", "a driver is installed (nvidia-smi), but torch sees no device",
            "install a torch built for CUDA, or look at CUDA_VISIBLE_DEVICES; until then --device cpu is taken",
        )  # fmt: skip


def _device(device: torch.device) -> Finding:
    title = f"device {device}"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        size = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    else:
        size = f"{torch.get_num_threads()} threads" if device.type == "cpu" else "Apple GPU"
    try:
        for dtype in (torch.float32, torch.bfloat16):
            ones = torch.ones(8, 8, device=device, dtype=dtype)
            if float((ones @ ones).sum()) != 512:
                raise RuntimeError(f"a product of matrices in {dtype} is wrong")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        advice = "use --device cpu" if device.type != "cpu" else "reinstall torch"
        return Finding(title, "broken", f"{size}; it does not compute: {reason}", advice)
    if bf16_is_fast(device):
        return Finding(title, "ok", f"{size}; bfloat16 is quick", "train with --set training.precision=bf16")
    return Finding(title, "ok", f"{size}; bfloat16 works, but float32 is quicker")


def compiler() -> Iterator[Finding]:
    """The C++ step for CPUs, built here if it was not; and what torch.compile needs: Python's headers, triton on a CUDA
    GPU.
    """
    from digit.native import NoCompiler, library

    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    slower = "sampling works without, more slowly"
    if found:
        try:
            library()
            yield Finding("C++ step", "ok", "it builds: small batches on a CPU sample quickly")
        except NoCompiler as error:
            yield Finding(
                "C++ step", "note", f"it does not build: {error}; {slower}", "look at the compiler that CXX names"
            )
    if not found:
        yield Finding("compiler", "note", f"no C++ compiler; {slower}", "install g++ (Debian: apt-get install g++)")
    elif not headers.is_file():
        yield Finding(
            "compiler", "note", f"{found}, but Python's headers are missing; {slower}",
            f"install them (Debian: apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev)",
        )  # fmt: skip
    else:
        yield Finding("compiler", "ok", f"{found}: sampling can be compiled")
    if torch.cuda.is_available():
        try:
            yield Finding("triton", "ok", f"{metadata.version('triton')}: sampling can be compiled on the GPU")
        except metadata.PackageNotFoundError:
            yield Finding("triton", "note", "not installed; sampling on the GPU is not compiled", "pip install triton")


# -- packages ----------------------------------------------------------------------------------------------------------


def packages(requirements: Iterable[str] | None = None) -> Iterator[Finding]:
    """The optional packages of each extra.

    Args:
        requirements: lines as in a package's metadata; by default this package's own.
    """
    extras: dict[str, list[Requirement]] = {}
    for line in metadata.requires("digit-ar") or [] if requirements is None else requirements:
        wanted = Requirement(line)
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", str(wanted.marker or ""))
        if extra and extra[1] not in ("dev", "docs", "all"):
            extras.setdefault(extra[1], []).append(wanted)
    for name, packages_of_extra in extras.items():
        yield _extra(name, packages_of_extra)
    yield from _torchvision()


def _extra(extra: str, wanted: Iterable[Requirement]) -> Finding:
    there, missing = [], []
    for one in wanted:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            missing.append(one.name)
            continue
        if one.specifier.contains(version, prereleases=True):
            there.append(f"{one.name} {version}")
        else:
            missing.append(f"{one.name} {one.specifier} ({version} is installed)")
    if not missing:
        return Finding(f"[{extra}]", "ok", ", ".join(there))
    what = f"missing: {', '.join(missing)}" + (f"; there: {', '.join(there)}" if there else "")
    return Finding(
        f"[{extra}]", "note", what, f"{_PURPOSES.get(extra, 'if you need it')}: pip install 'digit-ar[{extra}]'"
    )


_PURPOSES = {
    "encoders": "for DINOv2 and the other encoders of transformers",
    "train": "for training",
    "data": "for datasets of the Hub",
    "eval": "for measuring",
    "web": "for digit serve",
}


def _torchvision() -> Iterator[Finding]:
    """A torchvision of another build fails on import, and takes transformers down with it."""
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        what = f"{version} does not fit torch {torch.__version__}: {str(error).splitlines()[0]}"
        yield Finding("torchvision", "broken", what, "install both from one place: pip install -U torch torchvision")


# -- places ------------------------------------------------------------------------------------------------------------


def places() -> Iterator[Finding]:
    """Whether the cache and the working folder can be written, and how much room there is."""
    from digit.core.files import cache_folder

    for topic, folder, advice in (
        ("cache", cache_folder(), "name another folder in the variable DIGIT_CACHE"),
        ("working folder", Path.cwd(), "change to a folder of yours, or give --out"),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            yield Finding(topic, "broken", f"{folder} cannot be written: {error.strerror}", advice)
            continue
        free = shutil.disk_usage(folder).free
        state: State = "broken" if free < NO_ROOM else "note" if free < LITTLE_ROOM else "ok"
        room = f"make room, or {advice}" if state != "ok" else ""
        yield Finding(topic, state, f"{folder} can be written; {free / 2**30:.1f} GiB are free", room)


def hub() -> Iterator[Finding]:
    """Whether the Hub answers. Without it everything works that is on this machine."""
    import huggingface_hub

    from digit.core.hub import out_of_reach

    reason = out_of_reach()
    if reason:
        local = "models and datasets come from folders and the cache alone"
        advice = (
            "unset HF_HUB_OFFLINE to ask it" if "HF_HUB_OFFLINE" in reason else "look at the network and HF_ENDPOINT"
        )
        yield Finding("Hub", "note", f"{reason}; {local}", advice)
    else:
        login = (
            "logged in"
            if huggingface_hub.get_token()
            else "not logged in, which only private models and publishing need"
        )
        yield Finding("Hub", "ok", f"it answers; {login}")


def models() -> Iterator[Finding]:
    """The packaged models load."""
    from digit.core.hub import packaged_models
    from digit.pipeline.pipeline import read_index

    found = packaged_models()
    if not found:
        yield Finding(
            "model",
            "note",
            "none comes with this installation",
            "give a folder or a Hub id where a command wants MODEL",
        )
    for name, folder in found.items():
        try:
            read_index(folder)
            yield Finding("model", "ok", f"{name} is packaged; try: digit generate --num 4 --out pictures")
        except DigitError as error:
            yield Finding("model", "broken", f"the packaged {name}: {error}", "reinstall digit-ar")
