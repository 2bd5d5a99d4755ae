"""What every test has at hand."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the Hub's client: an unreachable Hub costs half a minute
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
from pathlib import Path

import pytest
import torch

import shapes

shapes.install()  # before any module of the package is imported

# small models gain nothing from a second thread, and the test runner uses the other cores itself
torch.set_num_threads(1)

ASSETS = Path(__file__).parent / "assets"


@pytest.fixture(scope="session")
def cifar512() -> Path:
    """A dataset folder: 512 training images of CIFAR-10, balanced over the ten classes."""
    return ASSETS / "cifar512"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's cache. The workers of a run share one, for the native code is built in it."""
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv(
        "DIGIT_CACHE", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "digit-cache")
    )


@pytest.fixture
def pixels_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels are made in bfloat16 whatever the processor; float32 rounds them by the batch. See quick_pixels."""
    monkeypatch.setattr("digit.core.devices.bf16_is_fast", lambda device: True)


@pytest.fixture
def backbone_file(tmp_path: Path) -> Path:
    """AlexNet in torchvision's layout, with random weights."""
    from digit.models.lpips import untrained

    torch.manual_seed(0)
    state = untrained("alex").net.state_dict()
    tensors = {"features." + key.split(".", 1)[1]: value for key, value in state.items()}
    torch.save({**tensors, "classifier.1.weight": torch.zeros(3)}, tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


@pytest.fixture(scope="module")
def compiler():
    """What C++ is built with; skipped where there is none. Where there is one, sources that it cannot build are a
    failure."""
    from digit.native import library

    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("there is no C++ compiler")
    library()


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    """A browser for the pages we make; skipped with a reason where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed, so no browser can be driven"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser was found; looked for {', '.join(BROWSERS)}")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=flags)
        yield opened
        opened.close()
