"""What can be asked of a model, without HTTP."""

import asyncio
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
from digit.pipeline.editing import cells, edit_region
from digit.pipeline.pipeline import Tokens
from digit.web.jobs import JobQueue
from digit.web.schema import Edit, Generate, Limits, Stability, Tokenize
from digit.web.service import Service


@pytest.fixture(scope="module")
def service():
    return Service(tiny.pipeline(), Limits(pictures=8))


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def upload(image):
    return base64.b64encode(encode_png(image)).decode()


def answer(method, body, progress=None):
    """What a method of the service answers, as a job of a queue."""

    async def scene():
        async for kind, value in JobQueue(0, 60).submit(lambda job: method(body, job)).events():
            if kind == "error":
                raise value
            if kind == "result":
                return value
            if progress is not None:
                progress.append(value)
        raise AssertionError("the job was cancelled")

    return asyncio.run(scene())


def png(image):
    """An image as the service sends it."""
    return base64.b64encode(encode_png(image)).decode()


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["ar", "masked"])
def test_generated_images_are_the_pipelines_own(service, decoder):
    made = answer(service.generate, Generate(labels=["ship", 0], num=3, seed=7, decoder=decoder, cfg_scale=1.0))
    own = service.pipe([2, 0], num=3, seed=7, decoder=decoder)
    assert made.labels == [2, 0, 2]
    assert made.decoder == decoder
    assert made.pictures == [png(image) for image in own]


def test_settings_of_every_stage_are_taken_and_told(service):
    asked = {"temperature": 0.5, "top_k": 3, "steps": 5, "decoder_temperature": 0.7}
    made = answer(service.generate, Generate(labels=["dog"], seed=1, decoder="masked", cfg_scale=2.0, **asked))
    assert made.pictures == [png(image) for image in service.pipe([1], None, 1, "masked", cfg_scale=2.0, **asked)]
    prior, masked = made.settings["prior"], made.settings["masked"]
    assert (prior["cfg_scale"], prior["temperature"], prior["top_k"]) == (2.0, 0.5, 3)
    assert (masked["steps"], masked["temperature"]) == (5, 0.7)


@pytest.mark.parametrize(("decoder", "steps"), [("ar", None), ("masked", 5)])
def test_progress_tells_what_is_known_so_far(service, decoder, steps):
    told = []
    made = answer(service.generate, Generate(labels=[1], num=2, decoder=decoder, steps=steps), told)
    first = [progress for progress in told if progress.stage == "prior"]
    then = [progress for progress in told if progress.stage == decoder]
    assert told == first + then
    for part, whole in ((first, made.semantic), (then, made.vq)):
        still_open = [sum(row.count(-1) for row in progress.tokens) for progress in part]
        assert still_open == sorted(still_open, reverse=True)
        assert still_open[0] > 0
        assert len(part) >= 5
        assert part[-1].done == part[-1].total
        assert part[-1].tokens == whole
    assert {progress.space for progress in first} == {"semantic"}
    assert {progress.space for progress in then} == {"vq"}
    assert all(a in (-1, b) for a, b in zip(first[0].tokens[0], made.semantic[0], strict=True))


@pytest.mark.parametrize("role", ["masked", "random"])
def test_a_prior_that_takes_steps_is_said_and_reports_them(role):
    service, told = Service(tiny.pipeline(role=role)), []
    assert service.about().stepped == ["prior", "masked"]
    made = answer(service.generate, Generate(labels=[1], num=2, decoder="ar", steps=5), told)
    first = [progress for progress in told if progress.stage == "prior"]
    assert [(progress.done, progress.total) for progress in first] == [(i, 5) for i in range(1, 6)]
    assert first[-1].tokens == made.semantic
    assert any(-1 in row for row in first[0].tokens)


def test_a_client_that_leaves_stops_the_sampling(service):
    async def scene():
        queue = JobQueue(0, 60)
        events = queue.submit(lambda job: service.generate(Generate(num=8), job)).events()
        seen = [await anext(events) for _ in range(3)]
        await events.aclose()
        while queue.active:
            await asyncio.sleep(0.01)
        return seen

    assert [kind for kind, _ in asyncio.run(scene())] == ["progress"] * 3


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"num": 9}, 413, "9 images were asked for; at most 8"),
        ({"labels": [0] * 9}, 413, "9 images"),
        ({"labels": ["horse"]}, None, "neither a number nor a class"),
        ({"labels": [3]}, 400, "The label 3 was given; this model knows 0 to 2"),
        ({"labels": [-1]}, 400, "The label -1 was given"),
        ({"labels": ["9" * 40]}, 400, "this model knows 0 to 2"),
        ({"decoder": "none"}, None, "no decoder 'none'"),
        ({"decoder": "ar", "steps": 4}, None, "has no steps"),
        ({"cfg_scale": 2.0}, None, "needs class labels"),
    ],
)
def test_requests_that_are_refused(service, body, status, message):
    with pytest.raises(DigitError, match=message) as refused:
        answer(service.generate, Generate(**body))
    assert getattr(refused.value, "status", None) == status


def test_parts_that_a_model_lacks():
    whole = tiny.pipeline()
    tokenizers = Service(whole.with_parts(prior=None, decoders={}))
    assert not tokenizers.about().can["generate"]
    with pytest.raises(DigitError, match="has no prior"):
        answer(tokenizers.generate, Generate())
    blind = Service(whole.with_parts(encoder=None, codebook=None))
    about = blind.about()
    assert about.grids == {"semantic": (4, 4), "vq": (4, 4)}
    assert about.can == {"generate": True, "edit": False, "guide": True, "clusters": False}
    assert (about.default_decoder, about.stepped) == ("ar", ["masked"])


def test_a_decoder_that_goes_straight_to_pixels(upload):
    service = Service(tiny.pipeline().with_parts(decoders={"onepass": tiny.onepass()}, vqgan=None))
    assert service.about().can["edit"]
    told = []
    made = answer(service.generate, Generate(labels=[1], num=2, seed=4, cfg_scale=1.0), told)
    assert made.pictures == [png(image) for image in service.pipe([1], num=2, seed=4)]
    assert made.vq is None
    assert {progress.stage for progress in told} == {"prior"}
    seen = answer(service.tokenize, Tokenize(image=upload))
    assert seen.vq is None
    assert seen.full is not None
    assert len(answer(service.edit, Edit(image=upload, cells=[3], num=2)).pictures) == 2


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_what_an_image_becomes(service, image, upload):
    pipe, seen = service.pipe, answer(service.tokenize, Tokenize(image=upload))
    images = to_tensor(image)[None]
    vq = pipe.vqgan.encode(images)
    assert seen.semantic == pipe.tokenizer.encode(images)[0].tolist()
    assert seen.vq == vq[0].tolist()
    assert seen.vqgan == png(to_pil(pipe.to_pixels(Tokens(vq=vq))[0]))
    assert seen.full == png(to_pil(pipe.reconstruct(images)[0]))
    assert seen.picture == upload


def test_more_noise_changes_more_tokens(service, upload):
    before, counts = answer(service.tokenize, Tokenize(image=upload)), {}
    for snr in (60, 20, 0):
        changed = answer(service.stability, Stability(image=upload, snr=snr))
        counts[snr] = {space: found.count for space, found in changed.flips.items()}
        for space, found in changed.flips.items():
            old = getattr(before, space)
            assert found.places == [i for i in range(len(old)) if old[i] != found.after[i]]
            assert found.count == len(found.places) == round(found.share * found.of)
    for space in ("semantic", "vq"):
        assert counts[60][space] <= 1 <= counts[20][space] <= counts[0][space]


# ---- edit ------------------------------------------------------------------------------------------------------------


def test_cells_are_marked_on_the_grid_and_touch_no_other(service):
    for chosen in ([0], [5, 6, 15], list(range(16))):
        found = cells(service.region(chosen)[None], (4, 4))[0]
        assert found.nonzero().flatten().tolist() == chosen
    finer = cells(service.region([5])[None], (8, 8))[0]  # VQ tokens that lie closer
    assert finer.nonzero().flatten().tolist() == [18, 19, 26, 27]


def test_editing_is_the_librarys_own(service, image, upload):
    made = answer(service.edit, Edit(image=upload, cells=[0, 5], label="dog", num=2, seed=3, decoder="masked"))
    images = to_tensor(image)[None].expand(2, -1, -1, -1)
    request = tiny.request(range(2), [1, 1], 3, "masked")
    own = edit_region(service.pipe, images, service.region([0, 5]), request)
    assert made.sha256 == own.sha256()
    kept = answer(service.edit, Edit(image=upload, rows=2, num=1))
    before = service.pipe.tokenizer.encode(to_tensor(image)[None])[0].tolist()
    assert kept.semantic[0][:8] == before[:8]
    guided = answer(service.edit, Edit(image=upload, cells=[0, 5], label="dog", cfg_scale=3.0))
    assert guided.settings["prior"]["cfg_scale"] == 3.0


@pytest.mark.parametrize(
    ("body", "message"),
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
def test_edits_that_are_refused(service, upload, body, message):
    with pytest.raises(DigitError, match=message):
        answer(service.edit, Edit(image=upload, **body))


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


def test_an_upload_over_the_limit(service):
    text = base64.b64encode(bytes(1_060_000)).decode()
    with pytest.raises(DigitError, match="larger than 1 MiB") as refused:
        answer(Service(service.pipe, Limits(upload_mb=1)).tokenize, Tokenize(image=text))
    assert refused.value.status == 413


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_what_browsers_make_is_taken(service, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (100, 60), "red").save(buffer, format=kind)
    for head in ("", "data:image/whatever;base64,"):
        text = head + base64.b64encode(buffer.getvalue()).decode()
        taken = Image.open(io.BytesIO(base64.b64decode(answer(service.tokenize, Tokenize(image=text)).picture)))
        assert taken.size == (32, 32)
        assert taken.getpixel((16, 16))[0] > 250
