"""`digit serve` in a process of its own, and uploads that it must refuse."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from digit.core.images import encode_png


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: where.
        pid: of its process.
        scratch: its folder for temporary files.
        said: what it printed.
    """

    url: str
    pid: int
    scratch: Path
    said: str


@contextlib.contextmanager
def running(model: Path, scratch: Path, *options: str):
    """`digit serve` until the block ends."""
    command = [sys.executable, "-m", "digit", "serve", str(model), "--port", "0", "--device", "cpu", *options]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch),
    }
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    said = ""
    try:
        while "Serving on" not in said:
            line = process.stdout.readline()
            assert line, f"the server ended: {said}"
            said += line
        url = re.search(r"http://[\d.]+:\d+", said)[0].replace("0.0.0.0", "127.0.0.1")
        yield Server(url, process.pid, scratch, said)
        assert process.poll() is None, "the server died"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 black pixels in two megabytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(20_001 * 100)) for _ in range(200)) + packer.flush()
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


_SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/tmp/x) run\n"
BAD_UPLOADS = {
    "bomb": (bomb, "more than 40,000,000 pixels"),
    "executable": (lambda: b"\x7fELF" + bytes(200), "not an image in one of the formats"),
    "svg": (lambda: _SVG, "not an image"),
    "postscript": (lambda: _EPS, "not an image"),
    "truncated": (lambda: encode_png(Image.effect_noise((40, 40), 90))[:900], "damaged or truncated"),
    "empty": (lambda: b"", "not an image"),
    "path": ("/etc/passwd", "paths and addresses are not opened"),
    "path upwards": ("../../../etc/passwd", "paths and addresses are not opened"),
    "address": ("file:///etc/passwd", "paths and addresses are not opened"),
    "other data": ("data:text/html,<b>", "without ';base64'"),
    "no text": ("é", "not base64"),
}
"""A file or a text that is sent for an image, and what the refusal says."""


def bad_upload(name: str) -> tuple[str, str]:
    """What is sent, files as base64, and what the refusal says."""
    sent, message = BAD_UPLOADS[name]
    return (sent if isinstance(sent, str) else base64.b64encode(sent()).decode()), message
