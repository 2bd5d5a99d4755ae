import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from digit.core.errors import DigitError
from digit.core.images import decode, load_image, load_images, save_png, to_pil, to_tensor, to_uint8


def _photo(width=48, height=32):
    """Smooth enough for JPEG, with no symmetry, so that any turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 255 * (x + 2 * y) / (width + 2 * height)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def _bytes(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def _difference(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))


def test_plain_rgb_is_untouched():
    decoded = decode(_bytes(_photo()))
    assert decoded.notes == ()
    assert decoded.format == "PNG"
    assert _difference(decoded.image, _photo()).max() == 0


@pytest.mark.parametrize(
    ("image", "format", "note", "tolerance"),
    [
        (_photo().convert("P", palette=Image.Palette.ADAPTIVE), "PNG", "palette", 40),
        (_photo().convert("P", palette=Image.Palette.ADAPTIVE), "GIF", "palette", 40),
        (_photo().convert("CMYK"), "TIFF", "CMYK", 1),
        (_photo().convert("CMYK"), "JPEG", "CMYK", 12),
    ],
)
def test_colour_modes_keep_their_colours(image, format, note, tolerance):
    decoded = decode(_bytes(image, format))
    assert decoded.image.mode == "RGB"
    assert note in decoded.notes
    assert _difference(decoded.image, _photo()).max() <= tolerance


def test_grey_becomes_three_equal_channels():
    grey = _photo().convert("L")
    decoded = decode(_bytes(grey))
    assert decoded.notes == ("grey",)
    assert (np.asarray(decoded.image) == np.asarray(grey)[..., None]).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)
    decoded = decode(_bytes(Image.fromarray(values)))
    assert decoded.notes == ("16 bits a pixel",)
    assert np.asarray(decoded.image)[..., 0].tolist() == np.rint(values / 257).tolist()


def test_floating_point_grey_in_range_is_read_and_out_of_range_is_refused():
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    decoded = decode(_bytes(Image.fromarray(values), "TIFF"))
    assert np.asarray(decoded.image)[..., 1].tolist() == np.rint(values.astype(float) * 255).tolist()
    with pytest.raises(DigitError, match=r"outside 0\.\.1"):
        decode(_bytes(Image.fromarray(values * 1000), "TIFF"))


def test_transparency_is_composited_on_white():
    image = _photo().convert("RGBA")
    alpha = np.zeros((32, 48), dtype=np.uint8)
    alpha[:, 24:] = 255
    image.putalpha(Image.fromarray(alpha))
    result = np.asarray(decode(_bytes(image)).image)
    assert (result[:, :24] == 255).all()
    assert (result[:, 24:] == np.asarray(_photo())[:, 24:]).all()


def test_transparent_palette_entry_is_composited_on_white():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode=None).convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1])
    result = np.asarray(decode(_bytes(image, transparency=0)).image)
    assert result.tolist() == [[[255, 255, 255], [200, 0, 0]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _bytes(_photo(), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode(data)
    assert decoded.image.size == expected.size
    assert _difference(decoded.image, expected).max() == 0
    assert ("EXIF rotation" in decoded.notes) == (orientation > 1)


def test_animation_gives_its_first_frame_and_says_so(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = tmp_path / "moving.gif"
    red.save(path, save_all=True, append_images=[blue, red])
    with pytest.warns(UserWarning, match=r"moving\.gif is animated, 3 frames"):
        image = load_image(path)
    assert np.asarray(image)[0, 0].tolist() == [255, 0, 0]


def test_a_still_image_gives_no_warning(tmp_path):
    _photo().save(tmp_path / "still.gif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(tmp_path / "still.gif")


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.webp"])
def test_truncated_file_is_named(tmp_path, name):
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noisy.save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DigitError, match=rf"{name} is damaged or truncated"):
        load_image(tmp_path / name)


def test_missing_folder_and_text_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(DigitError, match=r"no image file .*gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(DigitError, match="not a file but a folder"):
        load_image(tmp_path)
    with pytest.raises(DigitError, match=r"notes\.txt is not an image"):
        load_image(tmp_path / "notes.txt")


def test_decompression_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(DigitError, match=r"bomb\.png has more than"):
        load_image(path)
    with pytest.raises(DigitError, match="more than 100 pixels"):
        load_image(_bytes(_photo()), max_pixels=100)


@settings(max_examples=150, deadline=None)
@given(format=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), seed=st.integers(0, 2**32 - 1))
def test_damage_anywhere_gives_an_image_or_a_digit_error(format, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(_bytes(_photo(16, 16), format))
    for _ in range(rng.integers(1, 8)):
        data[rng.integers(len(data))] = rng.integers(256)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert decode(bytes(data[: rng.integers(1, len(data) + 1)])).image.mode == "RGB"
    except DigitError:
        pass


def test_load_images_stacks_and_scales(tmp_path):
    _photo(48, 32).save(tmp_path / "a.png")
    _photo(64, 90).save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    batch = load_images(paths, size=16)
    assert batch.shape == (2, 3, 16, 16)
    assert batch.dtype == torch.float32
    assert 0 <= batch.min() < batch.max() <= 1
    assert load_images(paths[0]).shape == (1, 3, 32, 48)
    with pytest.raises(DigitError, match=r"b\.png is 64x90, the first is 48x32"):
        load_images(paths)
    with pytest.raises(DigitError, match="No images were given"):
        load_images([])


def test_every_8_bit_value_survives_the_round_trip():
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert (to_uint8(to_tensor(values)) == values).all()
    assert (np.asarray(to_pil(to_tensor(Image.fromarray(values)))) == values).all()


def test_rounding_and_clamping():
    image = torch.tensor([-0.2, 0.49 / 255, 0.51 / 255, 1.7]).expand(3, 1, 4)
    assert to_uint8(image)[0, :, 0].tolist() == [0, 0, 1, 255]
    assert to_uint8(image.bfloat16()[None]).shape == (1, 1, 4, 3)
    with pytest.raises(DigitError, match="NaN"):
        to_pil(torch.full((3, 2, 2), torch.nan))


def test_save_png_makes_folders_and_is_lossless(tmp_path):
    path = save_png(_photo(), tmp_path / "new" / "photo.png")
    assert _difference(load_image(path), _photo()).max() == 0
    assert [item.name for item in path.parent.iterdir()] == ["photo.png"]
