"""The page of a running `digit serve` in a browser."""

import re
import zipfile

import numpy as np
import pytest
from PIL import Image

WAIT = 120_000  # ms; the machine may have other things to do


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def opened(browser, server, request):
    """A fresh page, which must neither complain nor ask anybody else for anything."""
    width, scheme = getattr(request, "param", (1440, "light"))
    window = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=width < 500)
    window.set_default_timeout(WAIT)
    page = window.new_page()
    said, asked, failed = [], [], []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
    page.goto(server.url)
    page.wait_for_selector("[data-ready]")
    yield page
    window.close()
    assert [text for text in said if not text.startswith(("log:", "debug:", "info:"))] == []
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []
    assert failed == []


WATCH = """
    window.seen = [];
    new MutationObserver(() => {
        const filling = document.querySelector("#generate .filling");
        if (filling) window.seen.push([filling.dataset.stage, Number(filling.dataset.open)]);
    }).observe(document.querySelector("#generate .stage"), { childList: true });
"""
FIRST = "document.querySelector('{} .stage .done figure img')"


def figures(page, tab):
    return page.locator(f"#{tab} .stage .done figure")


def generate(page, **choices):
    for name, value in choices.items():
        page.select_option(f"#generate [name={name}]", value)
    page.click("#generate [name=go]")
    page.wait_for_selector("#generate .stage .done")


def saved(page, press):
    with page.expect_download() as download:
        press()
    return download.value.suggested_filename, download.value.path()


def test_generating_shows_a_grid_that_fills_and_then_images(opened):
    opened.evaluate(WATCH)
    generate(opened)
    seen = opened.evaluate("window.seen")
    for stage in ("prior", "ar"):
        still_open = [count for name, count in seen if name == stage]
        assert len(set(still_open)) >= 2, seen  # the browser may skip some, but not all
        assert still_open == sorted(still_open, reverse=True)
    assert figures(opened, "generate").count() == 4
    image = figures(opened, "generate").first
    assert image.get_attribute("data-label") == "0"
    assert image.locator("figcaption").inner_text().split("\n") == ["cat", "seed 0, no. 0", "no guidance, ar"]
    name, path = saved(opened, image.get_by_role("link", name="Download").click)
    assert name == "cat-seed-0-no-0.png"
    assert Image.open(path).size == (32, 32)


def test_images_are_enlarged_and_downloaded(opened):
    generate(opened)
    one = figures(opened, "generate").first.locator("img").first.get_attribute("src")
    figures(opened, "generate").first.locator(".zoom").click()
    viewer = opened.locator("#viewer")
    assert viewer.locator("img").get_attribute("src") == one
    assert viewer.locator("img").evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    viewer.get_by_label("Smooth").check()
    assert viewer.locator("img").evaluate("image => getComputedStyle(image).imageRendering") == "auto"
    name, path = saved(opened, viewer.get_by_role("button", name="Download enlarged").click)
    assert name == "cat-seed-0-no-0-x16.png"
    assert Image.open(path).size == (512, 512)
    opened.keyboard.press("ArrowRight")
    assert "no. 1" in viewer.inner_text()
    opened.keyboard.press("Escape")
    assert not viewer.is_visible()
    name, path = saved(opened, opened.get_by_role("button", name="Download grid").click)
    assert (name, Image.open(path).size) == ("grid.png", (4 * 98 - 2, 96))
    name, path = saved(opened, opened.get_by_role("button", name="Download all").click)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"cat-seed-0-no-{number}.png" for number in range(4)]
        assert Image.open(archive.open("cat-seed-0-no-0.png")).size == (32, 32)


def test_another_class_keeps_the_seed_and_the_history_keeps_the_images(opened):
    opened.fill("#generate input[name=seed]", "5")
    generate(opened)
    first = figures(opened, "generate").first.locator("img").first.get_attribute("src")
    opened.get_by_role("button", name="Same seed, other class").click()
    opened.wait_for_selector("#generate .history figure")
    opened.wait_for_selector("#generate .stage .done")
    now = figures(opened, "generate").first
    assert now.get_attribute("data-seed") == "5"
    assert now.get_attribute("data-label") in ("1", "2")
    before = opened.locator("#generate .history figure")
    assert before.count() == 4
    assert before.first.locator("img").first.get_attribute("src") == first
    opened.locator("#generate .history").get_by_role("button", name="Use these settings").click()
    assert opened.input_value("#generate [name=label]") == "0"
    opened.get_by_role("button", name="Clear history").click()
    assert not opened.locator("#generate .history").is_visible()


def test_all_classes_at_once_and_the_masked_decoder(opened):
    assert not opened.locator("#generate [data-range=steps]").is_visible()
    opened.get_by_label("masked").first.check()
    opened.fill("#generate input[name=steps]", "3")
    opened.fill("#generate input[name=cfg_scale]", "2.5")
    generate(opened, label="all")
    found = figures(opened, "generate")
    assert [one.get_attribute("data-label") for one in found.all()] == ["0", "1", "2"]
    assert "guidance 2.5, masked, 3 steps" in found.first.inner_text()
    assert "in a few steps" in opened.locator("#generate .decoder").inner_text()
    assert "\n16" in opened.locator("#generate [data-range=num]").inner_text()  # the slider's end


def test_a_seed_is_a_whole_number(opened):
    assert "whole number" in opened.get_by_label("Seed").first.evaluate("input => input.parentElement.innerText")
    for wrong in ("1.5", "-1", ""):
        opened.fill("#generate input[name=seed]", wrong)
        opened.click("#generate [name=go]")
        assert not opened.evaluate("document.querySelector('#generate form').checkValidity()")
        assert "Choose a class" in opened.locator("#generate .stage").inner_text()


def test_stopping(opened):
    opened.fill("#generate input[name=num]", "16")
    opened.get_by_label("masked").first.check()
    opened.fill("#generate input[name=steps]", "32")
    # within the page, as soon as there is progress: the tiny model is done before a click from outside arrives
    opened.evaluate(
        """() => new MutationObserver((_, observer) => {
            const stop = document.querySelector("#generate [name=stop]");
            if (stop.disabled || !document.querySelector("#generate .filling")) return;
            observer.disconnect();
            stop.click();
        }).observe(document.querySelector("#generate"), { childList: true, subtree: true, attributes: true })"""
    )
    opened.click("#generate [name=go]")
    opened.get_by_text("Stopped.").wait_for()
    generate(opened)


def test_noise_changes_tokens_while_the_slider_moves(opened, photo):
    opened.click("#tab-tokens")
    opened.set_input_files("#tokens input[type=file]", photo)
    opened.wait_for_selector("#tokens .changed figure")
    assert opened.locator("#tokens .stage figure").count() == 5
    counts = []
    for key, snr in (("End", "40"), ("Home", "0")):
        with opened.expect_response(lambda answer: "/api/stability" in answer.url):
            opened.locator("#tokens input[type=range]").press(key)
        assert opened.input_value("#tokens [name=snr]") == snr
        expected = "> 0" if snr == "0" else "< 8"
        opened.wait_for_function(
            f"Number(document.querySelector('#tokens [data-space=semantic]')?.dataset.flips) {expected}"
        )
        counts.append([int(f.get_attribute("data-flips")) for f in opened.locator("#tokens [data-space]").all()])
    assert all(quiet < loud for quiet, loud in zip(*counts, strict=True)), counts
    assert "no patches of real images" in opened.locator("#tokens .stage").inner_text()


def test_cells_can_be_walked_with_the_keyboard(opened):
    opened.click("#tab-tokens")
    opened.locator("#tokens .samples button").first.click()  # an empty tab offers images
    opened.locator("#tokens .cells button").first.focus()
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("ArrowRight")
    assert opened.evaluate("document.activeElement.dataset.place") == "5"
    token = opened.evaluate("document.activeElement.dataset.token")
    same = opened.locator("#tokens .cells button.same")
    assert {cell.get_attribute("data-token") for cell in same.all()} == {token}


@pytest.mark.parametrize("opened", [(390, "dark")], indirect=True)
def test_painting_and_resampling_on_a_phone(opened, photo):
    opened.click("#tab-edit")
    assert opened.input_value("#edit [name=label]") == "none"
    opened.set_input_files("#edit input[type=file]", photo)
    opened.wait_for_selector(".paint button")
    cell = opened.locator(".paint button[data-place='5']")
    cell.scroll_into_view_if_needed()
    box = cell.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.mouse.move(*middle)
    opened.mouse.down()
    opened.mouse.move(middle[0] + box["width"], middle[1], steps=4)
    opened.mouse.up()
    opened.locator(".paint button[data-place='10']").press("Space")
    painted = opened.locator(".paint [aria-pressed=true]")
    assert [one.get_attribute("data-place") for one in painted.all()] == ["5", "6", "10"]
    opened.click("#edit [name=go]")
    opened.wait_for_selector("#edit .stage .done")
    resampled = figures(opened, "edit").first.locator("img").first.get_attribute("src")
    opened.click("#edit [name=extend]")
    # the other image itself, not the gap between the two: a fast answer leaves none to see
    image = FIRST.format("#edit")
    opened.wait_for_function(f"old => {image} !== null && {image}.getAttribute('src') !== old", arg=resampled)
    assert opened.locator("#edit .history figure").first.locator("img").first.get_attribute("src") == resampled
    old = opened.input_value("#edit input[name=seed]")
    opened.click("#edit [name=fresh]")
    opened.wait_for_function(f"{image}?.closest('figure').dataset.seed !== '{old}'")
    assert opened.evaluate("document.documentElement.scrollWidth") == 390


def test_an_image_goes_to_another_tab(opened):
    generate(opened)
    source = figures(opened, "generate").first.locator("img").first.get_attribute("src")
    figures(opened, "generate").first.get_by_role("button", name="Tokens").click()
    opened.wait_for_selector("#tokens .changed figure")
    assert opened.locator("#tokens .frame img").get_attribute("src") == source


def test_a_bad_file_gets_a_sentence(opened, tmp_path):
    opened.click("#tab-tokens")
    for name, data, sentence in (
        ("program.png", b"\x7fELF" + bytes(100), "is not an image in one of the formats"),
        ("huge.png", bytes(11 << 20), "This file is larger than 10 MiB"),
    ):
        (tmp_path / name).write_bytes(data)
        opened.set_input_files("#tokens input[type=file]", tmp_path / name)
        opened.get_by_role("alert").filter(has_text=sentence).wait_for()


@pytest.mark.parametrize("opened", [(w, s) for w in (390, 1440) for s in ("light", "dark")], indirect=True, ids=str)
def test_it_fits_and_can_be_read(opened, request):
    width, scheme = request.node.callspec.params["opened"]
    for tab in ("generate", "tokens", "edit"):
        opened.click(f"#tab-{tab}")
        assert opened.evaluate("document.documentElement.scrollWidth") == width
        for place in ("#about", f"#{tab} .notice", f"#{tab} small"):
            text = opened.evaluate(f"getComputedStyle(document.querySelector('{place}')).color")
            ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
            assert contrast(text, ground, scheme) > 0.45, (place, text, ground)


def contrast(text, ground, scheme):
    """How far apart two colours are in brightness, 0 to 1, with the text on the side that the scheme says."""
    first, second = (brightness(color) for color in (text, ground))
    return second - first if scheme == "light" else first - second


def brightness(color):
    numbers = [float(part) for part in re.findall(r"[\d.]+", color)]
    return sum(numbers[:3]) / 3 / (1 if color.startswith("color") else 255)
