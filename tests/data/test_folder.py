import json

import numpy as np
import pytest
from PIL import Image

from digit.core.errors import DigitError
from digit.data.dataset import open_dataset
from digit.data.folder import import_folder


def _noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def odd(tmp_path):
    """One of everything, in two class folders, with things that are no images."""
    root = tmp_path / "odd"
    for name in ("cats", "dogs/small", ".thumbnails"):
        (root / name).mkdir(parents=True)
    plain = _noise(60, 40)
    plain.save(root / "cats/plain.png")
    plain.save(root / "cats/plain.jpg")
    plain.quantize(16).save(root / "cats/palette.png")
    plain.convert("CMYK").save(root / "cats/cmyk.jpg")
    plain.save(root / "dogs/anim.gif", save_all=True, append_images=[_noise(60, 40, 1), _noise(60, 40, 2)])
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)).save(root / "dogs/deep.png")
    clear = plain.copy()
    clear.putalpha(100)
    clear.save(root / "dogs/small/alpha.v2.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.save(root / "dogs/turned.jpg", exif=exif)
    plain.save(root / "dogs/web.webp", lossless=True)
    plain.save(root / ".thumbnails/plain.png")
    (root / "dogs/cut.png").write_bytes((root / "cats/plain.png").read_bytes()[:3000])
    (root / "dogs/empty.png").touch()
    (root / "notes.txt").write_text("hello")
    return root


USED = {
    *("cats/cmyk", "cats/palette", "cats/plain", "cats/plain-2"),
    *("dogs/anim", "dogs/deep", "dogs/small/alpha_v2", "dogs/turned", "dogs/web"),
}


def test_every_file_is_accounted_for(odd, tmp_path):
    report = import_folder(odd, tmp_path / "out")
    assert report.files == sum(path.is_file() for path in odd.rglob("*")) == report.used + len(report.skipped)
    assert report.used == 9
    assert report.per_class == {"cats": 4, "dogs": 5}
    assert report.converted == {
        "cats/cmyk.jpg": "CMYK",
        "cats/palette.png": "palette",
        "dogs/anim.gif": "palette; GIF file stored as PNG",
        "dogs/deep.png": "16 bits a pixel",
        "dogs/small/alpha.v2.png": "transparency (RGBA), composited on white",
        "dogs/turned.jpg": "EXIF rotation",
        "dogs/web.webp": "WEBP file stored as PNG",
    }
    assert report.animated == {"dogs/anim.gif": "3 frames, the first one used"}
    assert set(report.skipped) == {".thumbnails/plain.png", "dogs/cut.png", "dogs/empty.png", "notes.txt"}
    assert "truncated" in report.skipped["dogs/cut.png"]
    assert "not an image" in report.skipped["notes.txt"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == report.skipped
    for name in report.skipped:
        assert name in report.summary()
    assert "13 files: 9 used, 4 skipped" in report.summary()


def test_the_dataset_holds_the_images(odd, tmp_path):
    import_folder(odd, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    samples = {sample.key: sample for sample in dataset}
    assert set(samples) == USED
    assert dataset.classes == ("cats", "dogs")
    assert all(sample.label == dataset.classes.index(key.split("/")[0]) for key, sample in samples.items())
    assert samples["dogs/turned"].image.size == (40, 60)
    assert np.array_equal(np.asarray(samples["dogs/web"].image), np.asarray(_noise(60, 40)))
    files = {dataset.source.read(i) for i in range(len(dataset))}
    assert (odd / "cats/plain.jpg").read_bytes() in files  # plain files are kept byte for byte
    assert (odd / "cats/plain.png").read_bytes() in files


def test_size_makes_them_uniform(odd, tmp_path):
    import_folder(odd, tmp_path / "out", size=16)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.image_size == (16, 16)
    assert dataset.arrays()[0].shape == (9, 16, 16, 3)


def test_the_filter_is_used_and_said(odd, tmp_path):
    for filter in ("bicubic", "bilinear"):
        import_folder(odd, tmp_path / filter, size=16, filter=filter)
        stored = {open_dataset(tmp_path / filter)[i].key: open_dataset(tmp_path / filter)[i].image for i in range(8)}
        expected = _noise(60, 40).resize((24, 16), Image.Resampling[filter.upper()]).crop((4, 0, 20, 16))
        assert np.array_equal(stored["cats/plain"], expected) or np.array_equal(stored["cats/plain-2"], expected)
        assert json.loads((tmp_path / filter / "dataset.json").read_text())["filter"] == filter
    with pytest.raises(DigitError, match="filter 'nearest' was given; expected one of bicubic, bilinear, lanczos, box"):
        import_folder(odd, tmp_path / "none", size=16, filter="nearest")


def test_flat_folder_and_splits(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        _noise(8, 8, i).save(tmp_path / "flat" / f"{i}.png")
    assert import_folder(tmp_path / "flat", tmp_path / "a").per_class == {}
    assert open_dataset(tmp_path / "a").labels.tolist() == [-1] * 3
    for name in ("train/x", "train/y", "val/y"):
        (tmp_path / "split" / name).mkdir(parents=True)
        _noise(8, 8).save(tmp_path / "split" / name / "1.png")
    import_folder(tmp_path / "split", tmp_path / "b")
    assert open_dataset(tmp_path / "b", "train").labels.tolist() == [0, 1]
    assert open_dataset(tmp_path / "b", "val").labels.tolist() == [1]


def test_loose_files_beside_class_folders_are_reported(odd, tmp_path):
    _noise(8, 8).save(odd / "loose.png")
    report = import_folder(odd, tmp_path / "out")
    assert report.without_class == ["loose.png"]
    lines = report.summary().split("\n")
    assert lines[:3] == [
        "14 files: 10 used, 4 skipped",
        "2 classes with 4 to 5 images",
        "beside the class folders, used without a class: 1 image (loose.png)",
    ]
    assert open_dataset(tmp_path / "out").labels.tolist().count(-1) == 1


def test_one_is_not_plural(tmp_path):
    (tmp_path / "mine/cats").mkdir(parents=True)
    _noise(8, 8).save(tmp_path / "mine/cats/a.png")
    assert (
        import_folder(tmp_path / "mine", tmp_path / "out").summary()
        == "1 file: 1 used, 0 skipped\n1 class with 1 image"
    )


def test_importing_twice_gives_the_same(odd, tmp_path):
    import_folder(odd, tmp_path / "a")
    import_folder(odd, tmp_path / "b")
    assert open_dataset(tmp_path / "a").fingerprint == open_dataset(tmp_path / "b").fingerprint


def test_empty_and_useless_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DigitError, match="empty is empty; expected images"):
        import_folder(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(DigitError, match=r"Of 1 file in .* none is an image .* notes\.txt: it is not an image"):
        import_folder(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DigitError, match="There is no folder"):
        import_folder(tmp_path / "gone", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_may_not_touch_the_source(odd, tmp_path):
    for out in (odd, odd / "out", tmp_path):
        with pytest.raises(DigitError, match="lie inside each other"):
            import_folder(odd, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    with pytest.raises(DigitError, match="exists and is not a dataset"):
        import_folder(odd, tmp_path / "mine")
    assert (tmp_path / "mine" / "precious.txt").exists()
