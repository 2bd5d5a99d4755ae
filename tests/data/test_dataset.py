import dataclasses
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from digit.core.errors import DigitError
from digit.core.files import cache_folder
from digit.core.images import encode_png
from digit.data import dataset as writer_module
from digit.data import shards as shards_module
from digit.data.dataset import open_dataset, write_dataset
from digit.data.shards import ShardIndex
from digit.data.sources import HubSource, list_folder

SHARD = "train-00000.tar"


def _picture(seed, size=(8, 8)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def _pixels(image):
    return np.asarray(image).tolist()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A dataset of 20 + 4 images in several shards."""
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 8_000)
    path = tmp_path / "small"
    with write_dataset(path, "small", ["a", "b"], "a test", "none") as writer:
        for i in range(20):
            writer.add("train", f"{i:03d}", encode_png(_picture(i)), "png", (8, 8), i % 2)
        for i in range(4):
            writer.add("test", f"{i:03d}", encode_png(_picture(100 + i)), "png", (8, 8))
    return path


@pytest.fixture
def copy512(cifar512, tmp_path):
    return shutil.copytree(cifar512, tmp_path / "copy")


def _flip_byte(path, offset):
    with open(path, "r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ 0x40]))


def _fail_after_one(writer):
    writer.add("train", "x", encode_png(_picture(1)), "png", (8, 8))
    raise OSError("no bytes")


# Our own format


def test_what_is_written_is_read(small):
    dataset = open_dataset(small)
    assert len(dataset) == 20
    assert dataset.name == "small"
    assert dataset.classes == ("a", "b")
    assert dataset.image_size == (8, 8)
    assert dataset.labels.tolist() == [i % 2 for i in range(20)]
    assert len(list(small.glob("train-*.tar"))) > 2
    for i in (0, 7, 19, -1):
        sample = dataset[i]
        assert _pixels(sample.image) == _pixels(_picture(i % 20))
        assert (sample.label, sample.key) == (i % 2, f"{i % 20:03d}")
    with pytest.raises(IndexError):
        dataset[20]
    test = open_dataset(small, "test")
    assert test.labels.tolist() == [-1] * 4
    assert _pixels(test[2].image) == _pixels(_picture(102))


def test_the_committed_images_are_what_they_say(cifar512):
    dataset = open_dataset(cifar512)
    dataset.verify()
    assert np.bincount(dataset.labels).tolist() == [52] * 2 + [51] * 8
    assert dataset.classes[3] == "cat"
    pixels, labels = dataset.arrays()
    assert pixels.shape == (512, 32, 32, 3)
    assert labels.dtype == np.int64
    assert dataset.arrays()[0] is pixels
    assert abs(pixels.mean() / 255 - 0.473) < 0.02  # the mean over the whole of CIFAR-10 is 0.473


def test_the_shards_are_webdataset(cifar512, small):
    import webdataset

    def read(paths, count, split, root):
        stream = (
            webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
            .decode("pil")
            .to_tuple("__key__", "png")
        )
        ours = open_dataset(root, split)
        items = list(stream)
        assert len(items) == count
        for i, (key, image) in enumerate(items):
            assert key == ours[i].key
            assert _pixels(image) == _pixels(ours[i].image)

    read(sorted(small.glob("train-*.tar")), 20, "train", small)
    labelled = (
        webdataset.WebDataset(str(cifar512 / "train-00000.tar"), shardshuffle=False)
        .decode("pil")
        .to_tuple("png", "cls")
    )
    assert [label for _, label in labelled] == open_dataset(cifar512).labels.tolist()


def test_indexing_by_scanning_agrees_with_the_written_index(small):
    written = ShardIndex.load(small / "train.index.npz")
    scanned = shards_module.scan_shards(sorted(small.glob("train-*.tar")))
    assert scanned.shards == written.shards
    for field in ("sizes", "shard", "offset", "length", "label", "key_text", "key_end"):
        assert np.array_equal(getattr(scanned, field), getattr(written, field)), field


def test_fingerprint_is_of_the_content_and_not_of_the_sharding(small, tmp_path, monkeypatch):
    def build(path, shard_bytes, change=None):
        monkeypatch.setattr(writer_module, "SHARD_BYTES", shard_bytes)
        with write_dataset(path, "other name", ["a", "b"], "elsewhere", "none") as writer:
            for i in range(20):
                label = i % 2 if change != "label" else 0
                picture = _picture(i if change != "pixel" or i < 19 else 999)
                writer.add("train", f"{i:03d}", encode_png(picture), "png", (8, 8), label)
        return open_dataset(path).fingerprint

    same = open_dataset(small).fingerprint
    assert len(same) == 64
    assert build(tmp_path / "one", 1 << 30) == same
    assert build(tmp_path / "two", 1 << 30, "label") != same
    assert build(tmp_path / "three", 1 << 30, "pixel") != same


def test_subset(cifar512):
    dataset = open_dataset(cifar512)
    part = dataset.subset([5, 3, 500])
    assert part.labels.tolist() == dataset.labels[[5, 3, 500]].tolist()
    assert part[2].key == dataset[500].key
    assert part.arrays()[0].shape == (3, 32, 32, 3)
    assert part.fingerprint != dataset.fingerprint
    assert part.fingerprint == open_dataset(cifar512).subset([5, 3, 500]).fingerprint


def _rewrite_index(folder, **changes):
    index = ShardIndex.load(folder / "train.index.npz")
    dataclasses.replace(index, **changes).save(folder / "train.index.npz")


DAMAGES = {
    "shard cut": (lambda f: os.truncate(f / SHARD, 300_000), rf"{SHARD} has .* bytes, its index says"),
    "shard gone": (lambda f: (f / SHARD).unlink(), rf"{SHARD} is missing"),
    "path for a name": (lambda f: _rewrite_index(f, shards=(f"../copy/{SHARD}",)), "is missing"),
    "index changed": (lambda f: _rewrite_index(f, label=np.zeros(512, np.int64)), "does not match the checksum"),
    "index cut": (lambda f: os.truncate(f / "train.index.npz", 1000), r"index .*train\.index\.npz"),
    "index of text": (lambda f: (f / "train.index.npz").write_text("hello"), r"index .*train\.index\.npz"),
    "index gone": (lambda f: (f / "train.index.npz").unlink(), r"no index .*train\.index\.npz"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named_on_opening(copy512, what):
    damage, message = DAMAGES[what]
    damage(copy512)
    with pytest.raises(DigitError, match=message):
        open_dataset(copy512)


def test_changed_shard_is_named_when_it_is_read(copy512):
    dataset = open_dataset(copy512)
    _flip_byte(copy512 / "train-00000.tar", int(dataset.source.index.offset[100]) + 60)
    dataset[99], dataset[101]
    with pytest.raises(
        DigitError, match=rf"train-00000\.tar has changed or is damaged: image '{dataset.source.key(100)}'"
    ):
        dataset[100]
    with pytest.raises(DigitError, match=r"train-00000\.tar has changed"):
        dataset.verify()
    with pytest.raises(DigitError, match=r"train-00000\.tar has changed"):
        dataset.arrays()


def test_shard_that_is_truncated_after_opening_is_named(copy512):
    dataset = open_dataset(copy512)
    os.truncate(copy512 / "train-00000.tar", 100_000)
    with pytest.raises(DigitError, match=r"train-00000\.tar is truncated"):
        dataset[511]


def test_unknown_split_and_version(copy512):
    with pytest.raises(DigitError, match="no split 'test'; it has: train"):
        open_dataset(copy512, "test")
    info = json.loads((copy512 / "dataset.json").read_text())
    (copy512 / "dataset.json").write_text(json.dumps(info | {"version": 9}))
    with pytest.raises(DigitError, match="format version 9; this release reads version 1"):
        open_dataset(copy512)
    (copy512 / "dataset.json").write_text("{}")
    with pytest.raises(DigitError, match="does not describe a dataset"):
        open_dataset(copy512)


def test_writer_replaces_datasets_only(small, tmp_path):
    with write_dataset(small, "new", [], "a test", "none") as writer:
        writer.add("train", "x", encode_png(_picture(1, (5, 4))), "png", (5, 4))
        writer.add("train", "y", encode_png(_picture(2, (6, 4))), "png", (6, 4))
    assert open_dataset(small).name == "new"
    assert open_dataset(small).image_size is None
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(DigitError, match="exists and is not a dataset"), write_dataset(precious, "new", [], "", ""):
        pass
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_failed_writing_leaves_nothing_and_keeps_the_old(small):
    before = open_dataset(small).fingerprint
    with pytest.raises(OSError, match="no bytes"), write_dataset(small, "new", [], "", "") as writer:
        _fail_after_one(writer)
    assert open_dataset(small).fingerprint == before
    with (
        pytest.raises(DigitError, match="No image was found"),
        write_dataset(small.with_name("none"), "new", [], "", ""),
    ):
        pass
    assert [item.name for item in small.parent.iterdir()] == ["small"]


def test_arrays_needs_one_size(tmp_path):
    _picture(0, (8, 8)).save(tmp_path / "a.png")
    _picture(1, (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(DigitError, match=r"b\.png is 9x8, others are 8x8"):
        open_dataset(tmp_path).arrays()


# Plain folders


def test_class_folders(tmp_path):
    for name in ("dogs/x/1.png", "cats/2.png", "cats/1.PNG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        _picture(len(name)).save(tmp_path / name)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.txt").write_text("hello")
    dataset = open_dataset(tmp_path)
    assert dataset.classes == ("cats", "dogs")
    assert [(sample.key, sample.label) for sample in dataset] == [
        ("cats/1.PNG", 0),
        ("cats/2.png", 0),
        ("dogs/x/1.png", 1),
    ]
    before = dataset.fingerprint
    _picture(77).save(tmp_path / "cats/2.png")
    assert open_dataset(tmp_path).fingerprint != before


def test_flat_folder_says_what_it_leaves_out(tmp_path, caplog):
    _picture(0).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("hello")
    dataset = open_dataset(tmp_path)
    assert (len(dataset), dataset.classes, dataset[0].label) == (1, (), -1)
    assert "notes.txt" in caplog.text
    with pytest.raises(DigitError, match="no split 'test'; it has: train"):
        open_dataset(tmp_path, "test")


def test_folder_with_splits_shares_its_classes(tmp_path):
    for name in ("train/cats/1.png", "train/dogs/1.png", "val/dogs/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        _picture(len(name)).save(tmp_path / name)
    assert open_dataset(tmp_path, "train").labels.tolist() == [0, 1]
    assert open_dataset(tmp_path, "val").labels.tolist() == [1]
    assert open_dataset(tmp_path, "val").classes == ("cats", "dogs")


def test_empty_folder_and_nothing_at_all(tmp_path):
    with pytest.raises(DigitError, match="There is no image in the folder"):
        open_dataset(tmp_path)
    with pytest.raises(DigitError, match="There is no dataset"):
        open_dataset(tmp_path / "gone")
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(DigitError, match="is a file, expected a folder"):
        open_dataset(tmp_path / "file.txt")


def test_folder_links_are_followed_once(tmp_path):
    (tmp_path / "real").mkdir()
    _picture(0).save(tmp_path / "real" / "a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    assert list_folder(tmp_path / "images") == (["linked/a.png"], [])


# Foreign shards


def _tar(path, members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def foreign(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    jpeg = io.BytesIO()
    _picture(0).save(jpeg, format="JPEG")
    long = "a/very/long/" + "x" * 150
    _tar(
        folder / "part-0.tar",
        [
            ("0001.cls", b"3\n"),
            ("0001.jpg", jpeg.getvalue()),
            ("../../escape.png", encode_png(_picture(1))),
            ("../../escape.json", b'{"label": 1, "text": "x"}'),
            ("only.txt", b"no image here"),
        ],
    )
    _tar(
        folder / "part-1.tar",
        [(f"{long}.PNG", encode_png(_picture(2))), (f"{long}.seg.png", b"other")],
        tarfile.GNU_FORMAT,
    )
    return folder


def test_foreign_shards_by_folder_file_and_pattern(foreign):
    dataset = open_dataset(foreign)
    assert [sample.key for sample in dataset] == ["0001", "../../escape", "a/very/long/" + "x" * 150]
    assert dataset.labels.tolist() == [3, 1, -1]
    assert dataset.classes == ("0", "1", "2", "3")
    assert _pixels(dataset[1].image) == _pixels(_picture(1))
    assert _pixels(dataset[2].image) == _pixels(_picture(2))
    assert sorted(item.name for item in foreign.parent.iterdir()) == ["shards"]
    assert len(open_dataset(foreign / "part-0.tar")) == 2
    assert open_dataset(f"{foreign}/part-*.tar").fingerprint == dataset.fingerprint
    with pytest.raises(DigitError, match="No file matches"):
        open_dataset(f"{foreign}/nothing-*.tar")


def test_the_index_of_foreign_shards_is_kept_and_renewed(foreign, monkeypatch):
    open_dataset(foreign)
    kept = list(foreign.glob(".digit-index-*.npz"))
    assert len(kept) == 1
    calls = []
    real = shards_module.scan_shard
    monkeypatch.setattr(shards_module, "scan_shard", lambda path: calls.append(path) or real(path))
    open_dataset(foreign)
    assert calls == []
    _tar(foreign / "part-1.tar", [("new.png", encode_png(_picture(5)))])
    assert open_dataset(foreign)[2].key == "new"
    assert len(calls) == 2


@pytest.mark.skipif(os.name == "nt", reason="folders are made read-only by their mode")
def test_the_index_goes_to_the_cache_where_the_folder_is_read_only(foreign, monkeypatch):
    from digit.data import sources

    real = sources.ShardIndex.save

    def refuse_beside(index, path):
        if path.parent == foreign:  # chmod does not stop root, under which these tests may run
            raise DigitError(f"Cannot write {path}: the file system is read-only; choose another --out.")
        return real(index, path)

    monkeypatch.setattr(sources.ShardIndex, "save", refuse_beside)
    first = open_dataset(foreign)
    assert not list(foreign.glob(".digit-index-*"))
    assert len(list((cache_folder() / "shard-index").rglob("*.npz"))) == 1
    assert open_dataset(foreign).fingerprint == first.fingerprint


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9, 0.999])
def test_truncated_foreign_shard_is_named(cifar512, tmp_path, keep):
    path = tmp_path / "cut.tar"
    data = (cifar512 / "train-00000.tar").read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DigitError, match=r"cut\.tar is (truncated|not a readable plain tar)"):
        open_dataset(path)


def test_shard_cut_between_two_members_is_noticed(cifar512, tmp_path):
    path = tmp_path / "cut.tar"
    first = open_dataset(cifar512).source.index
    data = (cifar512 / "train-00000.tar").read_bytes()
    path.write_bytes(data[: int(first.offset[100]) - 512])
    with pytest.raises(DigitError, match=r"cut\.tar is truncated: the end mark"):
        open_dataset(path)


def test_compressed_text_and_wrongly_labelled_shards(tmp_path):
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    (tmp_path / "text.tar").write_text("hello" * 1000)
    _tar(tmp_path / "label.tar", [("a.png", encode_png(_picture(0))), ("a.cls", b"tabby cat")])
    _tar(tmp_path / "empty.tar", [("readme.txt", b"hello")])
    for name, message in [
        ("packed", "compressed"),
        ("text", "not a readable plain tar"),
        ("label", r"a\.cls in the shard .*label\.tar is not a class id but b'tabby cat'"),
        ("empty", "no image in .*empty"),
    ]:
        with pytest.raises(DigitError, match=message):
            open_dataset(tmp_path / f"{name}.tar")


def test_shards_with_splits(foreign):
    (foreign / "part-0.tar").rename(foreign / "train-0.tar")
    (foreign / "part-1.tar").rename(foreign / "val-0.tar")
    assert len(open_dataset(foreign, "train")) == 2
    assert len(open_dataset(foreign, "val")) == 1
    with pytest.raises(DigitError, match="no split 'test'; they have: train, val"):
        open_dataset(foreign, "test")


# The Hub's library


def test_hub_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"bytes": encode_png(_picture(i)), "path": None} for i in range(3)]
    table = datasets.Dataset.from_dict({"img": rows, "label": [1, 0, 1]}, features=features)
    source = HubSource(table, "me/mine")
    assert source.classes == ("no", "yes")
    assert source.labels.tolist() == [1, 0, 1]
    from digit.data.dataset import ImageDataset

    dataset = ImageDataset(source, "me/mine", "train")
    assert _pixels(dataset[1].image) == _pixels(_picture(1))
    assert len(dataset.fingerprint) == 64
    with pytest.raises(DigitError, match="has no image column; it has: label"):
        HubSource(table.remove_columns("img"), "me/mine")


def test_hub_id_that_cannot_be_had_says_what_was_tried():
    pytest.importorskip("datasets")
    with pytest.raises(
        DigitError, match=r"no folder or file nobody/nothing-here, so a Hub dataset .* was tried .* which failed"
    ):
        open_dataset("nobody/nothing-here")
