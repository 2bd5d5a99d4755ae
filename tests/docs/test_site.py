"""The documentation builds without a warning, and no link in it leads nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra [docs] is not installed")
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr, result.stderr
    return out


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]


def test_every_link_and_anchor_inside_leads_somewhere(site):
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 15
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute, for it may be shown at any depth
            continue
        for link in page.links:
            address, anchor = urldefrag(link)
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            target = path if not address else (path.parent / unquote(address)).resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (anchor and target in pages and unquote(anchor) not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert urlsplit(link).scheme or (ROOT / link).exists(), link


def test_every_command_is_in_the_reference(site):
    from digit.cli.app import app

    text = (site / "reference" / "cli" / "index.html").read_text()
    import typer

    for name in typer.main.get_command(app).commands:
        assert f"digit {name}" in text, name
    for word in ("--cfg-schedule", "--save-tokens", "digit evaluate stability", "digit convert digit-upstream"):
        assert word in text


def test_public_names_are_in_the_reference(site):
    import digit

    text = (site / "reference" / "python" / "index.html").read_text()
    for name in digit.__all__:
        if name != "__version__":
            assert re.search(rf'id="digit\.[\w.]*{name}"', text), name


def test_pages_ask_nobody_else_for_anything(site):
    """No font, script or style of a third party: the site works offline and tells nobody who reads it."""
    for path in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", path.read_text()):
            match = re.search(r'(?:src|href)="(https?:)?//[^"]*"', tag)
            assert match is None or 'rel="canonical"' in tag, f"{path.relative_to(site)}: {tag}"
