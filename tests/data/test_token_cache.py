import errno
import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import tiny
from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.core.images import to_tensor
from digit.data.dataset import ImageDataset, open_dataset
from digit.data.token_cache import Views, build_token_cache, open_token_cache
from digit.pipeline.pipeline import DigitPipeline


@pytest.fixture(scope="module")
def model():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def images(cifar512):
    return open_dataset(cifar512).subset(range(0, 512, 16))  # 32


def build(model, images, out, views=None, **options):
    return build_token_cache(model, images, out, views or Views(), **{"shard_size": 10, "batch_size": 4, **options})


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_cache_holds_what_the_models_say(model, images, tmp_path):
    cache = build(model, images, tmp_path)
    assert (len(cache), cache.views, cache.classes[:2]) == (32, ["center", "flip"], ["airplane", "automobile"])
    pixels = torch.stack([to_tensor(images[i].image) for i in range(32)])
    mirrored = torch.stack([to_tensor(ImageOps.mirror(images[i].image)) for i in range(32)])
    everything = np.arange(32)
    for view, batch in enumerate((pixels, mirrored)):
        assert torch.equal(cache.tokens("semantic", everything, view), model.tokenizer.encode(batch))
        assert torch.equal(cache.tokens("vq", everything, view), model.vqgan.encode(batch))
    assert np.array_equal(cache.labels, images.labels)
    # any order, any views, across shards
    order, views = np.array([31, 0, 9, 10, 31]), np.array([1, 0, 1, 0, 0])
    expected = torch.stack([cache.tokens("vq", np.array([i]), int(v))[0] for i, v in zip(order, views, strict=True)])
    assert torch.equal(cache.tokens("vq", order, views), expected)
    cache.verify()
    assert np.load(tmp_path / "shard-00000" / "semantic.npy", allow_pickle=False).dtype == np.uint16
    assert np.load(tmp_path / "shard-00003" / "vq.npy", allow_pickle=False).shape == (2, 2, 16)


def test_the_batch_size_and_the_threads_change_nothing(model, images, tmp_path):
    views = Views(crops=2, crop="random-resized", seed=3)
    build(model, images, tmp_path / "a", views, batch_size=32, workers=1)
    build(model, images, tmp_path / "b", views, batch_size=3, workers=4)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    build(model, images, tmp_path / "c", Views(crops=2, crop="random-resized", seed=4))
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_views_of_a_larger_image():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    views = Views(crops=4)
    center, flip, *crops = views.cut(picture, 32, number=5)
    assert views.names == ["center", "flip", "crop0", "crop1", "crop2", "crop3"]
    assert ImageOps.mirror(center).tobytes() == flip.tobytes()
    assert {view.size for view in (center, flip, *crops)} == {(32, 32)}
    assert len({view.tobytes() for view in crops}) == 4
    assert [a.tobytes() for a in views.cut(picture, 32, number=5)] == [
        center.tobytes(),
        flip.tobytes(),
        *(c.tobytes() for c in crops),
    ]
    assert views.cut(picture, 32, number=6)[2].tobytes() != crops[0].tobytes()


def test_no_view_at_all_gets_a_sentence():
    with pytest.raises(DigitError, match="at least one view"):
        from_dict(Views, {"center": False, "flip": False}, "test")


def test_an_interrupted_cache_goes_on_and_makes_nothing_twice(model, images, tmp_path, monkeypatch):
    build(model, images, tmp_path / "whole")
    seen: list[int] = []
    real = ImageDataset.__getitem__

    def read(self, i):
        seen.append(i)
        if len(seen) == 26:
            raise KeyboardInterrupt
        return real(self, i)

    monkeypatch.setattr(ImageDataset, "__getitem__", read)
    with pytest.raises(KeyboardInterrupt):
        build(model, images, tmp_path / "parts", workers=1)
    shards = sorted(path.name for path in (tmp_path / "parts").glob("shard-*"))
    assert shards == ["shard-00000", "shard-00001"]
    with pytest.raises(DigitError, match="has 2 of its 4 shards; run the same digit cache-tokens command again"):
        open_token_cache(tmp_path / "parts")
    (tmp_path / "parts" / ".shard-00002.12345678.tmp").mkdir()  # as after kill -9
    seen[:] = [-1] * 100
    build(model, images, tmp_path / "parts")
    assert sorted(seen[100:]) == list(range(20, 32))
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob(".*"))


def test_processes_share_the_shards(model, images, tmp_path):
    build(model, images, tmp_path / "whole")
    assert build(model, images, tmp_path / "parts", rank=1, world=2) is None
    assert sorted(path.name for path in (tmp_path / "parts").glob("shard-*")) == ["shard-00001", "shard-00003"]
    assert len(build(model, images, tmp_path / "parts", rank=0, world=2)) == 32
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_process_leaves_alone_what_another_is_writing(model, images, tmp_path):
    theirs, ours = tmp_path / ".shard-00000.12345678.tmp", tmp_path / ".shard-00001.12345678.tmp"
    theirs.mkdir()
    ours.mkdir()
    build(model, images, tmp_path, rank=1, world=2)
    assert theirs.is_dir()
    assert not ours.exists()


@pytest.mark.parametrize("what", ["dataset", "model", "views", "shard size"])
def test_caches_are_not_mixed(model, images, tmp_path, what):
    build(model, images, tmp_path)
    before = files(tmp_path)
    other_model = model.with_parts(vqgan=tiny.vqgan(seed=1)) if what == "model" else model
    other_images = images.subset(range(31)) if what == "dataset" else images
    views = Views(flip=False) if what == "views" else Views()
    with pytest.raises(DigitError, match=f"cache of (an)?other {what}; .*never mixed"):
        build(other_model, other_images, tmp_path, views, shard_size=11 if what == "shard size" else 10)
    assert files(tmp_path) == before


def test_other_preprocessing_is_another_model(model, images, tmp_path):
    build(model, images, tmp_path)
    other = tiny.encoder()
    other.load_state_dict(model.encoder.state_dict())
    object.__setattr__(other.config.preprocessing, "mean", (0.5, 0.5, 0.5))
    with pytest.raises(DigitError, match="another model"):
        build(model.with_parts(encoder=other), images, tmp_path)


def test_a_part_of_a_model_is_enough(model, images, tmp_path):
    only_vq = build(DigitPipeline(vqgan=model.vqgan), images, tmp_path / "vq")
    assert list(only_vq.spaces) == ["vq"]
    with pytest.raises(
        DigitError, match="holds no semantic tokens; build one with a model that has an encoder and a codebook"
    ):
        only_vq.tokens("semantic", np.arange(2))
    only_semantic = build(DigitPipeline(encoder=model.encoder, codebook=model.codebook), images, tmp_path / "semantic")
    assert list(only_semantic.spaces) == ["semantic"]
    with pytest.raises(DigitError, match="makes no tokens"):
        build(DigitPipeline(prior=model.prior), images, tmp_path / "none")


def test_the_fingerprint_is_that_of_the_tokens(model, images, tmp_path):
    one = build(model, images, tmp_path / "a").fingerprint
    assert build(model, images, tmp_path / "b", shard_size=7).fingerprint == one
    assert build(model, images, tmp_path / "c", Views(flip=False)).fingerprint != one


def pickled(_):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}] * 10, dtype=object), allow_pickle=True)
    return buffer.getvalue()


DAMAGES = {
    "empty": lambda _: b"",
    "cut in the header": lambda data: data[:6],
    "cut by a byte": lambda data: data[:-1],
    "no array": lambda _: b"not an array at all",
    "a pickle": pickled,
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_gets_a_sentence(model, images, tmp_path, damage):
    build(model, images, tmp_path)
    file, change = tmp_path / "shard-00001" / "vq.npy", DAMAGES[damage]
    data = file.read_bytes()
    file.unlink() if change is None else file.write_bytes(change(data))
    with pytest.raises(DigitError, match=r"shard-00001/vq\.npy is missing or damaged.*digit cache-tokens again"):
        open_token_cache(tmp_path)


def test_verify_finds_a_flipped_bit(model, images, tmp_path):
    cache = build(model, images, tmp_path)
    file = tmp_path / "shard-00002" / "semantic.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DigitError, match=r"shard-00002/semantic\.npy is damaged"):
        cache.verify()


@pytest.mark.parametrize("text", ["{}", '{"format": "digit-token-cache", "version": 99}', "[]"])
def test_another_index_gets_a_sentence(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DigitError, match="does not describe a token cache of version 1"):
        open_token_cache(tmp_path)


def test_no_cache_gets_a_sentence(tmp_path):
    with pytest.raises(DigitError, match=r"not a token cache.*digit cache-tokens"):
        open_token_cache(tmp_path)


def test_a_full_disk_leaves_no_half_shard(model, images, tmp_path, monkeypatch):
    real = os.replace

    def replace(source, target):
        if "shard-00002" in str(target) and str(target).endswith("vq.npy"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(DigitError, match="disk is full"):
        build(model, images, tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("*shard-*")) == ["shard-00000", "shard-00001"]
    assert len(build(model, images, tmp_path)) == 32


def test_the_index_says_where_tokens_come_from(model, images, tmp_path):
    build(model, images, tmp_path)
    index = read_json(tmp_path / "index.json")
    assert index["source"]["fingerprint"] == images.fingerprint
    assert index["models"]["weights"] == model.fingerprint()
    assert index["tokens"] == {"semantic": {"vocab_size": 12, "grid": [4, 4]}, "vq": {"vocab_size": 20, "grid": [4, 4]}}
    assert json.loads(json.dumps(index)) == index
