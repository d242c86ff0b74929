"""`Machine`: what a plan needs to know of the computer, and the fingerprint that keys what was measured on it."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

import convselect.kernels as kernels


@dataclass(frozen=True)
class Machine:
    """A processor as convselect uses it. Cache sizes in bytes, 0 where unknown."""

    device: str
    name: str
    isa: str
    cores: int
    threads: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the machine, the versions and the kernel binary; keys the calibration cache."""
        parts = [f"{key}={value}" for key, value in sorted(asdict(self).items())]
        parts += [f"torch={torch.__version__}", f"kernels={kernels.binary_hash()}", "dtype=float32"]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.name}, {self.isa}, {self.threads} of {self.cores} cores"


def _cache_bytes(level: int) -> int:
    """Size of the data or unified cache of core 0, from sysfs."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if int((index / "level").read_text()) != level or (index / "type").read_text().strip() == "Instruction":
                continue
            text = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        scale = {"K": 2**10, "M": 2**20}.get(text[-1], 1)
        return int(text.rstrip("KM")) * scale
    return 0


@lru_cache(maxsize=1)
def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu() -> Machine:
    """The processor at hand, with torch's current number of threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        "cpu", _processor_name(), kernels.isa(), cores, torch.get_num_threads(),
        _cache_bytes(1), _cache_bytes(2), _cache_bytes(3),
    )  # fmt: skip
