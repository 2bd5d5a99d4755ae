"""What is only known on a GPU, in calls that write one JSON each: ``experiments/gpu.sh tests|sampling|training``.

The file is written anew after every test, model or batch, so a call that is stopped leaves what it has; "finished" says
whether that is all. With ``--dry-run`` the same runs on the CPU with tiny models, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LATEST_START = 0.75
"""Of the time of a call; afterwards nothing more is begun, for compiling a model may take minutes."""

# model, guided, batch, compiled; what answers the questions of README.md comes first
CHAINS = [
    ("base", False, 256, False), ("base", False, 256, True), ("base", False, 1, False), ("base", False, 1, True),
    ("base", False, 64, False), ("base", False, 16, False),
    ("base", True, 256, False), ("base", True, 1, False),
    ("large", False, 256, False), ("large", False, 1, False), ("large", True, 256, False),
    ("base", True, 256, True), ("large", False, 256, True),
]  # fmt: skip
TINY_CHAINS = [("base", False, 2, False), ("base", True, 1, False)]
TINY = {"transformer": {"dim": 32, "depth": 1, "heads": 2}, "embedding_scale": 1.0}
GPU = ["--device", "cuda", "--precision", "bf16", "--no-cache"]
TRAININGS = [
    [*GPU, "--batch-size", "256", "--compile", "--presets", "imagenet256-base"],
    [*GPU, "--batch-size", "256", "--presets", "imagenet256-base"],
    [*GPU, "--batch-size", "128", "--presets", "imagenet256-base-ar", "imagenet256-base-masked", "imagenet256-large"],
    [*GPU, "--batch-size", "128", "--compile", "--presets", "imagenet256-base-ar"],
]
TINY_TRAININGS = [["--batch-size", "2", "--seconds", "0", "--no-cache", "--presets", "cifar10-tiny-prior"]]


class Record:
    """The JSON of a call.

    Attributes:
        values: what it holds.
        dry: whether it is a rehearsal on the CPU.
    """

    def __init__(self, call: str, out: Path, seconds: float, dry: bool) -> None:
        self.out, self.dry, self._began = out, dry, time.monotonic()
        self._latest = self._began + LATEST_START * seconds
        device = "cpu" if dry else torch.cuda.get_device_name()
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
        self.values: dict[str, Any] = {"call": call, "dry_run": dry, "device": device, **versions}
        self.write()

    def write(self, finished: bool = False) -> None:
        """Write what is known."""
        seconds = round(time.monotonic() - self._began, 1)
        text = json.dumps({**self.values, "seconds": seconds, "finished": finished}, indent=1)
        self.out.write_text(text + "\n")

    @property
    def may_begin(self) -> bool:
        """Whether there is time for one thing more."""
        return time.monotonic() < self._latest


class Outcomes:
    """A plugin of pytest that records every test."""

    def __init__(self, record: Record) -> None:
        self.record, self.outcomes = record, {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called after set-up, call and tear-down of each test."""
        name = report.nodeid
        self.seconds[name] += report.duration
        if name not in self.outcomes or report.outcome != "passed":  # what fails in any of them has failed
            self.outcomes[name] = report.outcome
        if report.outcome != "passed":
            skipped = isinstance(report.longrepr, tuple)  # file, line, reason
            self.reasons[name] = str(report.longrepr[2]) if skipped else report.longreprtext[-2000:]
        if report.when == "teardown":
            self.tell()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Called for each file."""
        if report.failed:
            self.outcomes[report.nodeid], self.reasons[report.nodeid] = "failed", str(report.longrepr)[-2000:]

    def tell(self) -> None:
        """Write the counts, the names of all tests that did not pass, and the seconds of each."""
        found = list(self.outcomes.values())
        self.record.values |= {
            **{outcome: found.count(outcome) for outcome in ("passed", "failed", "skipped")},
            "not_passed": self.reasons,
            "durations": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
        }
        self.record.write()


def tests(record: Record) -> int:
    """All tests marked gpu; of the dry run those of one file, which run on the CPU too."""
    chosen = [str(ROOT / "tests/sampling/test_cuda.py")] if record.dry else [str(ROOT / "tests"), "-m", "gpu"]
    outcomes = Outcomes(record)
    # a file that cannot be imported is recorded as failed, and the others run
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    arguments = [*chosen, *options, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    code = int(pytest.main(arguments, plugins=[outcomes]))
    outcomes.tell()
    record.write(finished=code in (0, 1))  # 1: some have failed
    return code


def sampling(record: Record) -> int:
    """Images a second of prior, AR decoder and VQGAN at 256 px, in bfloat16: the paper's base and large."""
    from chain import chain, machine, paper_pipeline

    device = "cpu" if record.dry else "cuda"
    speed, at_hand, pipe = machine(device), None, None
    rows: list[dict[str, Any]] = []
    left: list[Any] = []
    record.values |= {"machine": speed, "rows": rows, "left_out": left}
    for name, guided, batch, compile in TINY_CHAINS if record.dry else CHAINS:
        if not record.may_begin:
            left.append([name, guided, batch, compile])
            continue
        if (name, guided) != at_hand:
            pipe, at_hand = None, (name, guided)  # the memory of the old one first
            pipe = paper_pipeline(name, guided, device, TINY if record.dry else {})
        try:
            found = chain(pipe, batch, 1 if record.dry else 3, compile, speed["bandwidth"])
        except torch.OutOfMemoryError:
            left.append([name, guided, batch, compile, "out of memory"])
            continue
        rows.append({"model": name, "guided": guided, **found})
        print(json.dumps(rows[-1]), flush=True)
        of_base = {asked: [r["images_per_second"] for r in rows if (r["model"], r["guided"]) == ("base", asked)]
                   for asked in (False, True)}  # fmt: skip
        record.values["targets"] = [
            target("images/s, base", 200, of_base[False]),
            target("images/s, base, guided", 100, of_base[True]),
        ]
        record.write()
    record.write(finished=not left)
    return 0


def training(record: Record) -> int:
    """Tokens a second and the share of the device's FLOP/s (MFU) of a training step."""
    runs: list[dict[str, Any]] = []
    left: list[list[str]] = []
    record.values |= {"runs": runs, "left_out": left}
    for arguments in TINY_TRAININGS if record.dry else TRAININGS:
        if not record.may_begin:
            left.append(arguments)
            continue
        command = [sys.executable, str(ROOT / "benchmarks/training.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout, flush=True)
        result = {"result": json.loads(done.stdout.splitlines()[-1])} if done.returncode == 0 else {}
        runs.append({"arguments": arguments, **(result or {"error": done.stderr[-2000:]})})
        prior = "cifar10-tiny-prior" if record.dry else "imagenet256-base"
        presets = [run["result"]["presets"] for run in runs if "result" in run]
        record.values["targets"] = [target("MFU, base prior", 0.4, [p[prior]["mfu"] for p in presets if prior in p])]
        record.write()
    failed = any("error" in run for run in runs)
    record.write(finished=not left and not failed)
    return int(failed)


def target(what: str, wanted: float, found: list[float]) -> dict[str, Any]:
    """The best value beside the one that was aimed at."""
    best = max(found, default=None)
    return {"what": what, "wanted": wanted, "best": best, "reached": best is not None and best >= wanted}


CALLS = {"tests": tests, "sampling": sampling, "training": training}


def main() -> int:
    """The exit code: 0 where nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("out", type=Path, help="the JSON")
    parser.add_argument("--seconds", type=float, default=570, help="how long the call may take")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny models")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; DRY_RUN=1 runs it on the CPU with tiny models.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return CALLS[args.call](Record(args.call, args.out, args.seconds, args.dry_run))


if __name__ == "__main__":
    sys.exit(main())
