"""The package as others get it: the wheel alone in an empty environment, without extras."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).parent.parent
OPTIONAL = [
    "torchvision",
    "fastapi",
    "lightly",
    "transformers",
    "accelerate",
    "torch_fidelity",
    "matplotlib",
    "datasets",
]
PUBLIC = "from digit import DigitPipeline, SemanticTokenizer, VQGAN, load_images; import digit.cli.app"
MORE_THAN_TORCH = 0.7  # seconds that importing the public names may take beyond importing torch
ROUNDS = 5


def test_the_core_imports_no_optional_package():
    code = f"{PUBLIC}; import sys; print([name for name in {OPTIONAL} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def interpreter(version: str) -> str | None:
    """A Python of this version, on the path or installed by pyenv."""
    places = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    for place in filter(None, places):
        asked = subprocess.run([place, "--version"], capture_output=True, text=True, check=False)
        if asked.stdout.startswith(f"Python {version}."):
            return str(place)
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, for setuptools leaves things behind in the folder that it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    if find_spec("setuptools"):  # then no network is needed
        words.append("--no-build-isolation")
    subprocess.run(words, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_every_file_of_the_package(wheel):
    """A file that is missing there, a header say, is not missed in a checkout."""
    tracked = subprocess.run(
        ["git", "ls-files", "src/digit"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()  # fmt: skip
    assert {path.removeprefix("src/") for path in tracked} <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", ["3.10", "3.12"])
def test_the_wheel_alone_generates_images(version, wheel, tmp_path):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    subprocess.run([python, "-m", "venv", tmp_path / "env"], check=True)
    program = tmp_path / "env" / "bin"
    subprocess.run(
        [program / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel], check=True
    )

    def run(*words: object, **env: str) -> str:
        own = {**os.environ, "DIGIT_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", **env}
        own.pop("PYTHONPATH", None)
        result = subprocess.run(
            [str(w) for w in words], env=own, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    check = f"{PUBLIC}; import sys; print([name for name in {OPTIONAL} if name in sys.modules])"
    assert run(program / "python", "-c", check).strip() == "[]"

    def seconds(imports: str) -> tuple[float, float]:
        """Processor and wall seconds of an import; the former do not depend on what else the machine does."""
        code = f"import json, time; w, c = time.perf_counter(), time.process_time(); {imports}; "
        both = json.loads(
            run(
                program / "python", "-c", code + "print(json.dumps([time.process_time() - c, time.perf_counter() - w]))"
            )
        )
        return both[0], both[1]

    rounds = [(seconds("import torch"), seconds(PUBLIC)) for _ in range(ROUNDS)]
    processor, wall = ([statistics.median(pair[which][kind] for pair in rounds) for which in (0, 1)] for kind in (0, 1))
    print(
        f"Python {version}: torch, digit: {processor} s of processor time, {wall} s on the clock (medians of {ROUNDS})"
    )
    assert processor[1] - processor[0] <= MORE_THAN_TORCH

    model = tiny.pipeline().save_pretrained(tmp_path / "model")
    run(
        program / "digit", "generate", model, "--num", 2, "--labels", "cat,ship", "--out", "pictures", "--device", "cpu"
    )
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {
        "00000.png",
        "00001.png",
        "grid.png",
        "generation.json",
    }
    assert "Everything that is needed works" in run(program / "digit", "doctor")
    packaged = run(
        program / "python", "-c", "from digit.core.hub import packaged_models; print(*packaged_models())"
    ).split()
    if packaged:
        run(program / "digit", "generate", "--num", 2, "--out", "default", "--device", "cpu")
        assert (tmp_path / "default" / "grid.png").is_file()
