"""Pack fixture folders into one small archive: python tests/parity/slim.py FIXTURES
tests/parity/fixtures/upstream_A.tar.xz

What no output depends on is set to zero: position rows beyond the longest sequence, and the rows of classes that are
    not used.
Arrays and tensors are stored uncompressed inside, so that xz finds the encoders and VQGANs that several checkpoints
share.
"""

import io
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

LONGEST = 2 + 257  # positions count from row 2; start and 256 tokens
SPECIALS = 5


def slim_checkpoint(path: Path, arrays: dict[str, np.ndarray]) -> bytes:
    values = torch.load(path, weights_only=True)
    tensors = values["model"]
    for name in ("decoder.embed_positions.weight", "decoder.embed_positions_1.weight"):
        if name in tensors:
            tensors[name][LONGEST:] = 0
    table, head = tensors["decoder.embed_tokens.weight"], tensors["decoder.output_projection.weight"]
    if "decoder.embed_positions_1.weight" not in tensors and len(table) > len(head):
        used = torch.zeros(len(table) - len(head), 1)
        used[torch.from_numpy(arrays["class_ids"])] = 1
        table[len(head) :] *= used
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def packed(path: Path) -> tuple[str, bytes]:
    if path.name == "io.npz":
        buffer = io.BytesIO()
        np.savez(buffer, **np.load(path))
        return path.name, buffer.getvalue()
    if path.name == "checkpoint_last.pt":
        return path.name, slim_checkpoint(path, dict(np.load(path.with_name("io.npz"))))
    if path.suffix == ".xz":
        return path.stem, lzma.decompress(path.read_bytes())
    return path.name, path.read_bytes()


def main(source: Path, target: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 << 20}]
    with lzma.open(target, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            name, data = packed(path)
            member = tarfile.TarInfo(str(path.parent.relative_to(source) / name))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
