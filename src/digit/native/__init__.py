"""C++ for CPUs, built with the user's compiler at first use: token steps, draws and group norms.

Each of these stands beside a plain version in PyTorch, which is its definition and runs wherever this cannot.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from digit.core.errors import DigitError
from digit.core.files import cache_folder, write_file

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / name for name in ("step.cpp", "draw.cpp", "norm.cpp"))
HEADERS = tuple(FOLDER / name for name in ("vectors.h", "threads.h", "draw.h"))
FLAGS = ("-O3", "-std=c++17", "-fopenmp-simd", "-pthread", "-fPIC", "-shared", "-Wno-psabi")

_SIGNATURES = {
    "digit_strip": "",
    "digit_room": "plll",
    "digit_step": "ppiilppp",
    "digit_tokens_room": "ppi",
    "digit_tokens": "pppillip",
    "digit_draw": "ppflllipflfp",
    "digit_norm": "ppllllppppfii",
}
"""Arguments: p is a pointer, i int, l int64, f float."""


class NoCompiler(Exception):
    """Why the C++ step could not be built here, in one line."""


@functools.cache
def library() -> ctypes.CDLL:
    """The built sources; from the user's cache folder where this source, compiler and processor were seen before.

    They are built for this processor, or for the level that DIGIT_NATIVE_MARCH names, such as x86-64-v3.

    Raises:
        NoCompiler: there is none, or it cannot build the source.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ("g++", "clang++", "c++")))[:1]
    if not compiler:
        raise NoCompiler("no C++ compiler was found")
    flags = (*FLAGS, f"-march={os.environ.get('DIGIT_NATIVE_MARCH') or 'native'}")
    # the compiler's macros name its version and everything that the processor can do
    macros = _run(*compiler, *flags, "-E", "-dM", "-x", "c++", os.devnull)
    texts = [path.read_bytes() for path in (*SOURCES, *HEADERS)]
    key = hashlib.sha256(b"\0".join([*texts, " ".join(flags).encode(), macros])).hexdigest()[:16]
    try:
        built = cache_folder() / f"native-{key}.so"
        if not built.exists():
            files = [str(path) for path in SOURCES]
            write_file(built, lambda path: _run(*compiler, *flags, "-x", "c++", *files, "-o", str(path)))
        loaded = ctypes.CDLL(str(built))
    except (DigitError, OSError, RuntimeError) as error:  # no folder where something may be written and run
        raise NoCompiler(f"{error} (DIGIT_CACHE names another folder)") from error
    for name in ("digit_room", "digit_strip", "digit_tokens_room"):
        getattr(loaded, name).restype = ctypes.c_int64
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}
    for name, arguments in _SIGNATURES.items():
        getattr(loaded, name).argtypes = [kinds[letter] for letter in arguments]
    return loaded


@functools.cache
def available() -> ctypes.CDLL | None:
    """:func:`library`, or None where it cannot be built; asked once."""
    try:
        return library()
    except NoCompiler:
        return None


def _run(*command: str) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=300).stdout
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
        raise NoCompiler(f"{command[0]}: {said[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompiler(str(error)) from error
