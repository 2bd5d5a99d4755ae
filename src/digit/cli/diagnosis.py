"""Whether this installation works, and what to do where it does not. Each check is a few findings in plain words."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import huggingface_hub
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from digit import __version__, native
from digit.core.devices import bf16_is_fast
from digit.core.errors import DigitError
from digit.core.files import cache_folder
from digit.core.hub import out_of_reach, packaged_models
from digit.models.component import load_component
from digit.models.token_model import TokenModel
from digit.pipeline.index import read_index
from digit.sampling.engines import acceleration as choice
from digit.sampling.engines.acceleration import Acceleration, EngineCache

State = Literal["ok", "note", "broken"]
LITTLE_ROOM, NO_ROOM = 5 << 30, 200 << 20
"""Bytes of free disk: below the first a converted base model does not fit, below the second nothing does."""


class Finding(NamedTuple):
    """Something that was looked at: "ok", a "note" (an option is missing, or something could be better), or "broken" (a
    command will fail); what was found, and what to do about it.
    """

    topic: str
    state: State
    what: str
    advice: str = ""


def examine() -> list[Finding]:
    """All checks, in the order in which a newcomer needs them; a few seconds."""
    checks = (versions, devices, compiler, engines, packages, places, hub, models)
    return [finding for check in checks for finding in check()]


def versions() -> Iterator[Finding]:
    """Python, torch and this package."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding("digit", "ok", f"{__version__}, {system}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    old = Version(torch.__version__) < Version("2.6")
    advice = "digit needs 2.6 or newer: pip install -U torch" if old else ""
    yield Finding("torch", "broken" if old else "ok", f"{torch.__version__}, built for {build}", advice)


def devices() -> Iterator[Finding]:
    """Every device does a small computation, in float32 and bfloat16."""
    sizes = {"cpu": f"{torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        sizes[f"cuda:{index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        sizes["mps"] = "Apple GPU"
    for device, size in sizes.items():
        try:
            for dtype in (torch.float32, torch.bfloat16):
                ones = torch.ones(8, 8, device=device, dtype=dtype)
                if float((ones @ ones).sum()) != 512:
                    raise RuntimeError(f"a product of matrices in {dtype} is wrong")
            speed = "is fast" if bf16_is_fast(torch.device(device)) else "works, but float32 is faster"
            yield Finding(f"device {device}", "ok", f"{size}; bfloat16 {speed}")
        except RuntimeError as error:
            advice = "use --device cpu" if device != "cpu" else "reinstall torch"
            reason = str(error).splitlines()[0]
            yield Finding(f"device {device}", "broken", f"{size}; it does not compute: {reason}", advice)
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        what = "a driver is installed (nvidia-smi), but torch sees no device"
        advice = "install a torch built for CUDA, or look at CUDA_VISIBLE_DEVICES; until then --device cpu is taken"
        yield Finding("GPU", "note", what, advice)


def compiler() -> Iterator[Finding]:
    """The C++ step for CPUs, built here if it was not; and what torch.compile needs: Python's headers, triton on a CUDA
    GPU.
    """
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    slower = "sampling works without, more slowly"
    if found:
        try:
            native.library()
            yield Finding("C++ step", "ok", "it builds: small batches on a CPU sample fast")
        except native.NoCompiler as error:
            advice = "look at the compiler that CXX names"
            yield Finding("C++ step", "note", f"it does not build: {error}; {slower}", advice)
    if not found:
        yield Finding("compiler", "note", f"no C++ compiler; {slower}", "install g++ (Debian: apt-get install g++)")
    elif not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        advice = f"install them (Debian: apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev)"
        yield Finding("compiler", "note", f"{found}, but Python's headers are missing; {slower}", advice)
    else:
        yield Finding("compiler", "ok", f"{found}: sampling can be compiled")
    if torch.cuda.is_available():
        if version := _installed("triton"):
            yield Finding("triton", "ok", f"{version}: sampling can be compiled on the GPU")
        else:
            yield Finding("triton", "note", "not installed; sampling is not compiled", "pip install triton")


def engines() -> Iterator[Finding]:
    """Which step samples the packaged priors, one image and 64 at a time, and what each takes; measured once a
    processor.
    """
    if native.available() is None:
        return
    for name, folder in packaged_models().items():
        prior = load_component(folder / "prior", TokenModel)
        for batch in (1, 64):
            cache = EngineCache(Acceleration())
            engine = cache.engine_for(prior, batch, guided=False)
            if found := choice.remembered().get(choice.shape_class(prior, batch, False, None)):
                times = ", ".join(f"{kind} {1e3 * seconds:.2f} ms" for kind, seconds in found.items())
                what = f"prior of {name}, {batch} at a time: {engine.name} runs; a step: {times}"
                yield Finding("engine", "ok", what)
    others = choice.remembered().values()
    slower = sum(times["plain"] < times["C++"] for times in others)
    if slower:
        yield Finding("engine", "ok", f"of {len(others)} shapes measured here, {slower} run in plain PyTorch")


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def packages(requirements: Iterable[str] | None = None) -> Iterator[Finding]:
    """The optional packages of each extra.

    Args:
        requirements: lines as in a package's metadata; by default this package's own.
    """
    extras: dict[str, tuple[list[str], list[str]]] = {}  # what is missing, and what is there
    for line in metadata.requires("digit-ar") or [] if requirements is None else requirements:
        wanted = Requirement(line)
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", str(wanted.marker or ""))
        if extra is None or extra[1] in ("dev", "docs", "all"):
            continue
        version, name = _installed(wanted.name), wanted.name
        missing, there = extras.setdefault(extra[1], ([], []))
        if version is not None and wanted.specifier.contains(version, prereleases=True):
            there.append(f"{name} {version}")
        else:
            missing.append(f"{name} {wanted.specifier} ({version} is installed)" if version else name)
    for name, (missing, there) in extras.items():
        lists = {"missing: ": missing, "there: " if missing else "": there}
        what = "; ".join(f"{word}{', '.join(names)}" for word, names in lists.items() if names)
        advice = f"{_PURPOSES.get(name, 'if you need it')}: pip install 'digit-ar[{name}]'" if missing else ""
        yield Finding(f"[{name}]", "note" if missing else "ok", what, advice)
    if version := _installed("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception as error:  # of another build; it takes transformers down with it
            what = f"{version} does not fit torch {torch.__version__}: {str(error).splitlines()[0]}"
            advice = "install both from one place: pip install -U torch torchvision"
            yield Finding("torchvision", "broken", what, advice)


_PURPOSES = {
    "encoders": "for DINOv2 and the other encoders of transformers",
    "train": "for training",
    "data": "for datasets of the Hub",
    "eval": "for measuring",
    "web": "for digit serve",
    "share": "for digit serve --share",
}


def places() -> Iterator[Finding]:
    """Whether the cache and the working folder can be written, and how much room there is."""
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
        what = f"{folder} can be written; {free / 2**30:.1f} GiB are free"
        yield Finding(topic, state, what, f"make room, or {advice}" if state != "ok" else "")


def hub() -> Iterator[Finding]:
    """Whether the Hub answers. Without it everything works that is on this machine."""
    if reason := out_of_reach():
        switched = "HF_HUB_OFFLINE" in reason
        advice = "unset HF_HUB_OFFLINE to ask it" if switched else "look at the network and HF_ENDPOINT"
        yield Finding("Hub", "note", f"{reason}; models and datasets come from folders and the cache alone", advice)
    else:
        missing = "not logged in, which only private models and publishing need"
        yield Finding("Hub", "ok", f"it answers; {'logged in' if huggingface_hub.get_token() else missing}")


def models() -> Iterator[Finding]:
    """The packaged models load."""
    for name, folder in packaged_models().items():
        try:
            read_index(folder)
            yield Finding("model", "ok", f"{name} is packaged; try: digit generate --num 4 --out runs/four")
        except DigitError as error:
            yield Finding("model", "broken", f"the packaged {name}: {error}", "reinstall digit-ar")
    if not packaged_models():
        advice = "give a folder or a Hub id where a command wants MODEL"
        yield Finding("model", "note", "none comes with this installation", advice)
