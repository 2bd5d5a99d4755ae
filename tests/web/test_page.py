"""The page of a running `digit serve` in a browser."""

import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra 'web' is not installed")
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
    page.wait_for_selector("#dg-go")
    yield page
    window.close()
    assert [text for text in said if not text.startswith(("log:", "debug:", "info:"))] == []
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []
    assert failed == []


WATCH = """
    window.seen = [];
    new MutationObserver(() => {
        const stage = document.querySelector("#dg-stage .dg-stage");
        if (stage && stage.dataset.open) window.seen.push([stage.dataset.stage, Number(stage.dataset.open)]);
    }).observe(document.getElementById("dg-stage"), { childList: true, subtree: true, attributes: true });
"""


def figures(page, place):
    return page.locator(f"{place} .dg-done figure")


def test_generating_shows_a_grid_that_fills_and_then_pictures(opened):
    opened.evaluate(WATCH)
    opened.click("#dg-go")
    opened.wait_for_selector("#dg-stage .dg-done")
    seen = opened.evaluate("window.seen")
    for stage in ("prior", "ar"):
        still_open = [count for name, count in seen if name == stage]
        assert len(set(still_open)) >= 2, seen  # the browser may skip some frames, but not all
        assert still_open == sorted(still_open, reverse=True)
    assert figures(opened, "#dg-stage").count() == 4
    picture = figures(opened, "#dg-stage").first
    assert picture.get_attribute("data-label") == "0"
    link = picture.get_by_role("link", name="Download")
    assert link.get_attribute("download") == "cat-seed-0-no-0.png"
    with opened.expect_download() as download:
        link.click()
    assert Image.open(download.value.path()).size == (32, 32)


def test_another_class_keeps_the_seed_and_the_history_keeps_the_pictures(opened):
    opened.get_by_label("Seed").first.fill("5")
    opened.click("#dg-go")
    opened.wait_for_selector("#dg-stage .dg-done")
    first = figures(opened, "#dg-stage").first.locator("img").first.get_attribute("src")
    opened.get_by_role("button", name="Same seed, other class").click()
    opened.wait_for_selector("#dg-history figure")
    opened.wait_for_selector("#dg-stage .dg-done")
    now = figures(opened, "#dg-stage").first
    assert now.get_attribute("data-seed") == "5"
    assert now.get_attribute("data-label") in ("1", "2")
    before = opened.locator("#dg-history figure")
    assert before.count() == 4
    assert before.first.locator("img").first.get_attribute("src") == first


def test_noise_flips_tokens_while_the_slider_moves(opened, photo):
    opened.click("#dg-tab-tokens-button")
    opened.set_input_files("#dg-well-tokens input[type=file]", photo)
    opened.wait_for_selector("#dg-seen .dg-inside")
    assert opened.locator("#dg-seen figure").count() == 5
    counts = []
    for key, snr in (("End", "40"), ("Home", "0")):
        slider = opened.locator("#dg-noise input[type=range]")
        slider.focus()
        slider.press(key)
        opened.wait_for_function(f"document.querySelector('#dg-noise input[type=number]').value === '{snr}'")
        expected = "> 0" if snr == "0" else "< 8"
        flips = "Number(document.querySelector('#dg-flips [data-space=semantic]').dataset.flips)"
        opened.wait_for_function(f"{flips} {expected}")
        opened.wait_for_timeout(1500)
        counts.append([int(f.get_attribute("data-flips")) for f in opened.locator("#dg-flips [data-space]").all()])
    assert all(quiet < loud for quiet, loud in zip(*counts, strict=True)), counts
    assert "no patches of real pictures" in opened.locator("#dg-seen").inner_text()


def test_cells_can_be_walked_with_the_keyboard(opened, photo):
    opened.click("#dg-tab-tokens-button")
    opened.set_input_files("#dg-well-tokens input[type=file]", photo)
    opened.locator("#dg-seen .dg-over button").first.focus()
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("ArrowRight")
    assert opened.evaluate("document.activeElement.dataset.place") == "5"
    token = opened.evaluate("document.activeElement.dataset.token")
    same = opened.locator("#dg-seen .dg-over button.dg-same")
    assert {cell.get_attribute("data-token") for cell in same.all()} == {token}


@pytest.mark.parametrize("opened", [(390, "dark")], indirect=True)
def test_painting_and_resampling_on_a_phone(opened, photo):
    opened.click("#dg-tab-edit-button")
    opened.set_input_files("#dg-well-edit input[type=file]", photo)
    opened.wait_for_selector(".dg-paint button")
    cell = opened.locator(".dg-paint button[data-place='5']")
    cell.scroll_into_view_if_needed()
    box = cell.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.mouse.move(*middle)
    opened.mouse.down()
    opened.mouse.move(middle[0] + box["width"], middle[1], steps=4)
    opened.mouse.up()
    opened.locator(".dg-paint button[data-place='10']").press("Space")
    painted = opened.locator(".dg-paint [aria-pressed=true]")
    assert [one.get_attribute("data-place") for one in painted.all()] == ["5", "6", "10"]
    opened.click("#dg-resample")
    opened.wait_for_selector("#dg-edited .dg-done")
    resampled = figures(opened, "#dg-edited").first.locator("img").first.get_attribute("src")
    opened.click("#dg-extend")
    # the other picture itself, not the gap between the two: a fast answer leaves none to see
    picture = "document.querySelector('#dg-edited .dg-done figure img')"
    other = f"old => {picture} !== null && {picture}.getAttribute('src') !== old"
    opened.wait_for_function(other, arg=resampled)
    assert opened.evaluate("document.documentElement.scrollWidth") == 390


def test_a_bad_file_gets_a_sentence(opened, tmp_path):
    opened.click("#dg-tab-tokens-button")
    for name, data, sentence in (
        ("program.png", b"\x7fELF" + bytes(100), "is not an image in one of the formats"),
        ("huge.png", bytes(11 << 20), "This file is larger than 10 MiB"),
    ):
        (tmp_path / name).write_bytes(data)
        opened.set_input_files("#dg-well-tokens input[type=file]", tmp_path / name)
        opened.get_by_role("alert").filter(has_text=sentence).wait_for()


@pytest.mark.parametrize("opened", [(w, s) for w in (390, 1440) for s in ("light", "dark")], indirect=True, ids=str)
def test_it_fits_and_can_be_read(opened, request):
    width, scheme = request.node.callspec.params["opened"]
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    for place in (".dg-heading p", "#dg-stage .dg-notice"):
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
