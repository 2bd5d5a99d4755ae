"""What results and runs are recorded with: the machine, and the versions of the packages that decide numbers."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def hardware() -> dict[str, Any]:
    """The machine: processor, cores, the threads torch uses, and GPUs."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(terse=True),
    }


@cache
def processor_name() -> str:
    """The maker's name of the processor, such as "AMD EPYC"."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of this package, Python, and the packages that values depend on, as far as they are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("digit-ar", "numpy", "torch-fidelity", "transformers", "lpips"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
