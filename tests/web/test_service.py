"""What can be asked of a model, without any web."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from digit.clustering.patches import Atlas, build_atlas
from digit.core.errors import DigitError
from digit.core.images import encode_png, to_pil, to_tensor
from digit.pipeline.editing import edit_region
from digit.pipeline.pipeline import Tokens
from digit.web.limits import Gone, Limits, Refused, TooLarge, Visit
from digit.web.service import Edit, Generate, Look, Service, Shake
from digit.web.uploads import read_picture
from serving import BAD_UPLOADS, bad_upload


@pytest.fixture(scope="module")
def service():
    return Service(tiny.pipeline(), Limits(pictures=8))


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8))


def visit(tell=None):
    return Visit(60, tell)


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["ar", "masked"])
def test_generated_pictures_are_the_pipelines_own(service, decoder):
    made = service.generate(Generate(labels=["ship", 0], num=3, seed=7, decoder=decoder, cfg_scale=1.0), visit())
    own = service.pipe([2, 0], num=3, seed=7, decoder=decoder)
    assert made.labels == [2, 0, 2]
    assert [encode_png(a) for a in made.images] == [encode_png(b) for b in own]


@pytest.mark.parametrize(("decoder", "steps"), [("ar", None), ("masked", 5)])
def test_frames_tell_what_is_known_so_far(service, decoder, steps):
    frames = []
    made = service.generate(Generate(labels=[1], num=2, decoder=decoder, steps=steps), visit(frames.append))
    first = [frame for frame in frames if frame.stage == "prior"]
    then = [frame for frame in frames if frame.stage == decoder]
    assert frames == first + then
    for part, whole in ((first, made.tokens.semantic), (then, made.tokens.vq)):
        still_open = [int((frame.tokens < 0).sum()) for frame in part]
        assert still_open == sorted(still_open, reverse=True)
        assert still_open[0] > 0
        assert still_open[-1] == 0
        assert len(part) >= 5
        assert part[-1].done == part[-1].total
        for frame in part:
            assert frame.tokens.shape == whole.shape
        assert torch.equal(part[-1].tokens, whole)
    assert {frame.space for frame in first} == {"semantic"}
    assert {frame.space for frame in then} == {"vq"}
    known = first[0].tokens >= 0
    assert torch.equal(first[0].tokens[known], made.tokens.semantic[known])


def test_one_who_leaves_stops_the_sampling(service):
    seen = []
    one = visit()

    def tell(frame):
        seen.append(frame)
        if len(seen) == 3:
            one.leave()

    one._tell = tell
    with pytest.raises(Gone):
        service.generate(Generate(num=1), one)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("wish", "error", "message"),
    [
        ({"num": 9}, TooLarge, "9 pictures were asked for; at most 8"),
        ({"labels": [0] * 9}, TooLarge, "9 pictures"),
        ({"labels": ["horse"]}, DigitError, "neither a number nor a class"),
        ({"labels": [3]}, Refused, "The label 3 was given; this model knows 0 to 2"),
        ({"labels": ["9" * 40]}, Refused, "this model knows 0 to 2"),
        ({"decoder": "none"}, DigitError, "no decoder 'none'"),
    ],
)
def test_wishes_that_are_refused(service, wish, error, message):
    with pytest.raises(error, match=message):
        service.generate(Generate(**wish), visit())


def test_parts_that_a_model_lacks():
    whole = tiny.pipeline()
    tokenizers = Service(whole.with_parts(prior=None, decoders={}))
    assert not tokenizers.can_generate
    with pytest.raises(DigitError, match="has no prior"):
        tokenizers.generate(Generate(), visit())
    blind = Service(whole.with_parts(encoder=None, codebook=None))
    assert blind.can_generate
    assert not blind.can_edit
    assert blind.grids == {"semantic": (4, 4), "vq": (4, 4)}
    assert blind.describe()["can"] == {"generate": True, "edit": False, "guide": True, "clusters": False}


def test_a_decoder_that_goes_straight_to_pixels(picture):
    service = Service(tiny.pipeline().with_parts(decoders={"onepass": tiny.onepass()}, vqgan=None))
    assert service.can_generate
    assert service.can_edit
    made, frames = [], []
    made += service.generate(Generate(labels=[1], num=2, seed=4, cfg_scale=1.0), visit(frames.append)).images
    assert [encode_png(a) for a in made] == [encode_png(b) for b in service.pipe([1], num=2, seed=4)]
    assert {frame.stage for frame in frames} == {"prior"}
    inside = service.look(picture, Look(), visit())
    assert inside.vq is None
    assert inside.full.size == made[0].size
    assert len(service.edit(picture, Edit(cells=[3], num=2), visit()).images) == 2


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_inside_a_picture(service, picture):
    pipe, inside = service.pipe, service.look(picture, Look(), visit())
    images = to_tensor(picture)[None]
    assert torch.equal(inside.semantic, pipe.tokenizer.encode(images)[0])
    assert torch.equal(inside.vq, pipe.vqgan.encode(images)[0])
    assert encode_png(inside.vqgan) == encode_png(to_pil(pipe.to_pixels(Tokens(None, inside.vq[None]))[0]))
    assert encode_png(inside.full) == encode_png(to_pil(pipe.reconstruct(images)[0]))


def test_more_noise_flips_more_tokens(service, picture):
    counts = {}
    for snr in (60, 20, 0):
        shaken = service.shake(picture, Shake(snr=snr), visit())
        counts[snr] = {space: len(found.places) for space, found in shaken.flips.items()}
        for found in shaken.flips.values():
            assert found.places == [i for i in range(len(found.before)) if found.before[i] != found.after[i]]
    for space in ("semantic", "vq"):
        assert counts[60][space] <= 1 <= counts[20][space] <= counts[0][space]


# ---- edit ------------------------------------------------------------------------------------------------------------


def test_cells_become_pixels_that_touch_no_other_cell(service):
    from digit.pipeline.editing import cells

    for chosen in ([0], [5, 6, 15], list(range(16))):
        found = cells(service.region(chosen)[None], (4, 4))[0]
        assert found.nonzero().flatten().tolist() == chosen


def test_editing_is_the_librarys_own(service, picture):
    made = service.edit(picture, Edit(cells=[0, 5], label="dog", num=2, seed=3, decoder="masked"), visit())
    images = to_tensor(picture)[None].expand(2, -1, -1, -1)
    request = tiny.request(range(2), [1, 1], 3, "masked")
    own = edit_region(service.pipe, images, service.region([0, 5]), request)
    assert made.tokens.sha256() == own.sha256()
    kept = service.edit(picture, Edit(rows=2, num=1), visit())
    before = service.pipe.tokenizer.encode(to_tensor(picture)[None])
    assert torch.equal(kept.tokens.semantic[:, :8], before[:, :8])


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "exactly one of"),
        ({"cells": [1], "rows": 1}, "exactly one of"),
        ({"cells": [16]}, "no cell 16"),
        ({"cells": [-1]}, "no cell -1"),
        ({"cells": []}, "marks nothing"),
        ({"rows": 4}, "grid has 4"),
        ({"cells": [1], "num": 99}, "at most 8"),
    ],
)
def test_edits_that_are_refused(service, picture, wish, message):
    with pytest.raises(DigitError, match=message):
        service.edit(picture, Edit(**wish), visit())


# ---- clusters --------------------------------------------------------------------------------------------------------


def test_an_atlas_holds_the_nearest_patches(tmp_path):
    """Against a search over all distances at once."""
    pipe = tiny.pipeline()
    images = torch.rand(10, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "patches.safetensors"
    counts = build_atlas(pipe.tokenizer, [images[:6], images[6:]], path, each=3, source="noise")
    atlas = Atlas(path, pipe.tokenizer)
    features, tokens = pipe.tokenizer.features(images), pipe.tokenizer.encode(images)  # (10, 16, D), (10, 16)
    distances = (features - pipe.codebook.lookup(tokens)).square().sum(-1)
    assert (atlas.images, atlas.source) == (10, "noise")
    for cluster in range(tiny.CLUSTERS):
        rivals = {}
        for image, place in (tokens == cluster).nonzero().tolist():
            rivals.setdefault(image, []).append((float(distances[image, place]), place))
        best = sorted((*min(places), image) for image, places in rivals.items())[:3]
        patches = atlas.patches(cluster)
        assert len(patches) == counts[cluster] == len(best)
        for patch, (_, place, image) in zip(patches, best, strict=True):
            row, column = divmod(place, 4)
            middle = np.asarray(to_pil(images[image]))[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            assert np.array_equal(patch[8:16, 8:16], middle)


def test_an_atlas_of_another_codebook_is_refused(tmp_path):
    pipe = tiny.pipeline()
    path = tmp_path / "patches.safetensors"
    build_atlas(pipe.tokenizer, [torch.rand(2, 3, tiny.SIZE, tiny.SIZE)], path)
    other = pipe.with_parts(codebook=tiny.codebook(pipe.encoder.dim, seed=1))
    with pytest.raises(DigitError, match="another codebook"):
        Atlas(path, other.tokenizer)
    path.write_bytes(b"no tensors")
    with pytest.raises(DigitError, match="not a readable atlas"):
        Atlas(path, pipe.tokenizer)


# ---- uploads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(BAD_UPLOADS))
def test_bad_uploads(name):
    text, message = bad_upload(name)
    with pytest.raises(DigitError, match=message):
        read_picture(text, 32, Limits())


def test_an_upload_over_the_limit():
    text = base64.b64encode(bytes(1_060_000)).decode()
    with pytest.raises(TooLarge, match="at most 1 are taken"):
        read_picture(text, 32, Limits(upload_mb=1))
    with pytest.raises(TooLarge, match="larger than 1 MiB"):
        read_picture(text * 2, 32, Limits(upload_mb=1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_what_browsers_make_is_taken(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (100, 60), "red").save(buffer, format=kind)
    for head in ("", "data:image/whatever;base64,"):
        taken = read_picture(head + base64.b64encode(buffer.getvalue()).decode(), 32, Limits())
        assert taken.size == (32, 32)
        assert taken.getpixel((16, 16))[0] > 250
