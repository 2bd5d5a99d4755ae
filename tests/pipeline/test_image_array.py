"""Images packed into one array as ADM's evaluator reads it, and runs with balanced or random labels."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiny
from digit.cli.app import app
from digit.core.errors import DigitError
from digit.pipeline.generation import generate_folder, run_labels
from digit.pipeline.image_array import ImageArray, write_image_array


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline().with_parts(prior=tiny.token_model("prior", num_classes=3))


def noise(n, height=5, width=4):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def test_numpy_reads_what_is_written_and_we_read_what_numpy_writes(tmp_path):
    images = noise(7)
    write_image_array(tmp_path / "ours.npz", iter(images), 7, {"num": 7})
    np.savez_compressed(tmp_path / "theirs.npz", arr_0=images)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]
        assert np.array_equal(arrays["arr_0"], images)
    for name, about in (("ours", {"num": 7}), ("theirs", {})):
        array = ImageArray(tmp_path / f"{name}.npz")
        assert (len(array), array.about) == (7, about)
        assert [len(batch) for batch in array.batches(3)] == [3, 3, 1]
        assert np.array_equal(torch.cat(list(array.batches(3))).permute(0, 2, 3, 1), images)


def test_memory_is_that_of_a_batch(tmp_path):
    one = np.zeros((64, 64, 3), np.uint8)
    tracemalloc.start()
    write_image_array(tmp_path / "big.npz", (one for _ in range(2000)), 2000)  # 25 MB
    assert sum(int(batch.shape[0]) for batch in ImageArray(tmp_path / "big.npz").batches(50)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def broken(folder):
    np.savez(folder / "object.npz", arr_0=np.array([{"a": 1}], dtype=object))
    np.savez(folder / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(folder / "grey.npz", arr_0=np.zeros((2, 4, 4), np.uint8))
    np.savez(folder / "other.npz", images=noise(2))
    (folder / "text.npz").write_text("no archive")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (9, 5, 4, 3)})
    with zipfile.ZipFile(folder / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + noise(2).tobytes())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("object", r"arr_0 \(1,\) of object; expected images"),
        ("float", r"arr_0 \(2, 4, 4, 3\) of float64; expected images"),
        ("grey", r"arr_0 \(2, 4, 4\) of uint8; expected images"),
        ("other", "not an .npz file with the array 'arr_0'"),
        ("text", "not an .npz file with the array 'arr_0'"),
        ("missing", "not an .npz file with the array 'arr_0'"),
        ("short", "ends within image 2 of 9"),
    ],
)
def test_other_files_are_refused(tmp_path, name, sentence):
    broken(tmp_path)
    with pytest.raises(DigitError, match=sentence):
        list(ImageArray(tmp_path / f"{name}.npz").batches(4))


@pytest.mark.parametrize("images", [[noise(1)[0], noise(1, 6)[0]], []], ids=["sizes", "none"])
def test_nothing_is_left_where_writing_fails(tmp_path, images):
    with pytest.raises(DigitError, match=r"expected (one size|at least one)"):
        write_image_array(tmp_path / "x.npz", images, 2)
    assert not list(tmp_path.iterdir())


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_is_packed_also_after_an_interruption_and_when_it_is_finished(pipe, tmp_path, monkeypatch):
    how = {"num": 10, "labels": [0, 2], "seed": 3, "batch_size": 4, "npz": tmp_path / "x.npz"}
    with monkeypatch.context() as patch:
        patch.setattr("digit.pipeline.generation.save_png", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate_folder(pipe, tmp_path / "out", **how)
    assert not (tmp_path / "x.npz").exists()
    for made in (10, 0):
        assert generate_folder(pipe, tmp_path / "out", **how)["made"] == made
        with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
            packed = arrays["arr_0"]
        files = [np.asarray(Image.open(tmp_path / "out" / f"{i:05d}.png")) for i in range(10)]
        assert np.array_equal(packed, np.stack(files))
        (tmp_path / "x.npz").unlink()
    with pytest.raises(DigitError, match=r"ends in \.npz"):
        generate_folder(pipe, tmp_path / "out", **{**how, "npz": "x.npy"})


def test_labels_by_name():
    assert run_labels(3, labels=[2, 1], num=4) == ([2, 1], 4, "in turns")
    assert run_labels(3) == ([0, 1, 2], 64, "all in turns")
    assert run_labels(0, 5) == (None, 5, "none")
    assert run_labels(3, per_class=50) == ([0, 1, 2], 150, "balanced, 50 a class")
    drawn, num, name = run_labels(10, 20_000, "random", seed=1)
    assert (num, name) == (20_000, "random")
    assert np.abs(np.bincount(drawn, minlength=10) / 2000 - 1).max() < 0.1
    assert run_labels(10, 7, "random", seed=1)[0] == drawn[:7]  # image i has its own draw
    assert run_labels(10, 7, "random", seed=2)[0] != drawn[:7]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((0, None, "random"), "class-conditional"),
        ((0, None, None, 5), "class-conditional"),
        ((3, None, "random", 5), "exclude each other"),
        ((3, 64, None, 5), r"--labels-per-class 5 make 15"),
    ],
)
def test_labels_that_cannot_be(given, sentence):
    with pytest.raises(DigitError, match=sentence):
        run_labels(*given)


def test_command_names_the_labels_in_the_record(pipe, tmp_path):
    model = pipe.save_pretrained(tmp_path / "model")
    common = ["generate", str(model), "--seed", "1", "--batch-size", "8"]
    for number, (words, named, num) in enumerate(
        ((["--labels-per-class", "4"], "balanced, 4 a class", 12), (["--labels", "random", "-n", "9"], "random", 9))
    ):
        out, npz = tmp_path / f"out{number}", tmp_path / f"{number}.npz"
        done = CliRunner().invoke(app, [*common, *words, "--out", str(out), "--npz", str(npz)], catch_exceptions=False)
        assert str(npz) in done.output.replace("\n", "")
        assert json.loads((out / "generation.json").read_text())["labelling"] == named
        array = ImageArray(npz)
        assert (len(array), array.about["labelling"], array.about["seed"]) == (num, named, 1)
