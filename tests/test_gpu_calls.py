"""The calls of experiments/gpu.sh that measure on a GPU, rehearsed on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SUITE = """
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_skips(): pass
@pytest.fixture
def untidy():
    yield
    raise ValueError
def test_leaves_a_mess(untidy): pass
"""
PROGRAM = """
import sys, pytest
from pathlib import Path
from gpu import Outcomes, Record
record = Record("tests", Path(sys.argv[2]), 60, dry=True)
pytest.main([sys.argv[1], "-q", "-p", "no:cacheprovider", "--rootdir", str(Path(sys.argv[1]).parent)],
            plugins=[Outcomes(record)])
"""


def call(name: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    names = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([EXPERIMENTS / "gpu.sh", name], env=names, capture_output=True, text=True)


def rehearsed(name: str, out: Path) -> dict:
    done = call(name, out, DRY_RUN="1")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    record = json.loads((out / f"{name}.json").read_text())
    assert (record["call"], record["device"], record["dry_run"], record["finished"]) == (name, "cpu", True, True)
    return record


@pytest.mark.slow
def test_the_tests(tmp_path: Path) -> None:
    record = rehearsed("tests", tmp_path)
    names = record["durations"]
    assert record["failed"] == 0
    assert record["passed"] >= sum(name.endswith("cpu]") for name in names) > 0
    assert record["skipped"] == len(record["not_passed"]) == len(names) - record["passed"]
    assert all("CUDA" in reason for reason in record["not_passed"].values())


def test_sampling(tmp_path: Path) -> None:
    record = rehearsed("sampling", tmp_path)
    assert [(row["model"], row["guided"], row["batch"]) for row in record["rows"]] == [
        ("base", False, 2),
        ("base", True, 1),
    ]
    assert all(row["images_per_second"] > 0 and row["peak_megabytes"] > 0 for row in record["rows"])
    plain, guided = record["targets"]
    assert (plain["wanted"], plain["best"]) == (200, record["rows"][0]["images_per_second"])
    assert guided["best"] == record["rows"][1]["images_per_second"]
    assert record["left_out"] == []


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    record = rehearsed("training", tmp_path)
    found = record["runs"][0]["result"]["presets"]["cifar10-tiny-prior"]
    assert record["targets"] == [{"what": "MFU, base prior", "wanted": 0.4, "best": found["mfu"], "reached": False}]
    assert 0 < found["mfu"] < 1


def test_what_did_not_pass_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "test_suite.py"), str(tmp_path / "tests.json")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(EXPERIMENTS)}, capture_output=True, check=True)
    record = json.loads((tmp_path / "tests.json").read_text())
    assert (record["passed"], record["failed"], record["skipped"], record["finished"]) == (1, 2, 1, False)
    reasons = {name.rpartition("::")[2]: reason for name, reason in record["not_passed"].items()}
    assert reasons.keys() == {"test_fails", "test_skips", "test_leaves_a_mess"}
    assert "assert 1 == 2" in reasons["test_fails"]
    assert "not here" in reasons["test_skips"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = call("sampling", tmp_path)
    assert done.returncode == 2
    assert "DRY_RUN=1" in done.stderr
    assert not (tmp_path / "sampling.json").exists()
