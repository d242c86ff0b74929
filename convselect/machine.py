"""`Machine`: what a plan needs to know of the computer, and the fingerprint that keys what was measured on it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

import convselect.kernels as kernels
from convselect.errors import unknown_choice

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
"""What products are computed in: tf32 is float32 with factors rounded to 10 bits, where torch's switch allows that."""


@dataclass(frozen=True)
class Machine:
    """A processor as convselect uses it. Cache sizes in bytes, 0 where unknown. `precision` is one of `PRECISIONS`."""

    device: str
    name: str
    isa: str
    cores: int
    threads: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    precision: str = "float32"

    runs_programs: ClassVar[bool] = True
    """Whether operators between convolutions join them in one call of ours (`graph/program`), its head in slices."""

    @property
    def model(self) -> str:
        """The name of the cost model's weights for it."""
        return f"{self.device}_{self.isa}"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the machine, the versions and the kernels; keys the calibration cache."""
        parts = [f"{key}={value}" for key, value in sorted(asdict(self).items()) if key not in ("precision", "index")]
        parts += [f"torch={torch.__version__}", f"kernels={self._kernels}", f"dtype={self.precision}"]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def _kernels(self) -> str:
        return str(kernels.binary_hash())

    def __str__(self) -> str:
        return f"{self.name}, {self.isa}, {self.threads} of {self.cores} cores"


@dataclass(frozen=True)
class Gpu(Machine):
    """A GPU: `isa` "sm_90" (NVIDIA's) or "gfx942" (AMD's), `cores` multiprocessors, one "thread".

    `l1d_bytes` is what `shared_bytes` says. Clocks in kHz, 0 where unknown; `driver`, of which the CUDA
    version, and `cudnn` as their libraries count versions; `driver_release` "" where the system does not tell; `triton`
    "" where it is not installed. `index`: torch's, None for a GPU that need not be there.
    """

    clock_khz: int = 0
    memory_clock_khz: int = 0
    memory_bus_bits: int = 0
    memory_bytes: int = 0
    driver: int = 0
    cudnn: int = 0
    triton: str = ""
    driver_release: str = ""
    index: int | None = None
    runs_programs: ClassVar[bool] = False

    @property
    def model(self) -> str:
        return f"{super().model}_{self.precision}"

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block may have."""
        return self.l1d_bytes

    @property
    def capability(self) -> int:
        """90 of "sm_90"; 0 where it is no NVIDIA GPU."""
        return int(self.isa[3:]) if self.isa.startswith("sm_") else 0

    @property
    def _kernels(self) -> str:
        return str(kernels.triton_hash())

    def __str__(self) -> str:
        return f"{self.name}, {self.isa}, {self.cores} multiprocessors, {self.precision}"


@lru_cache
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
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found and not any(character.isdigit() for character in name):
        name += (
            f" (family {found['cpu family']}, model {found['model']})"  # virtual machines say no more than the brand
        )
    return name


def cpu() -> Machine:
    """The processor at hand, with torch's current number of threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        "cpu",
        _processor_name(),
        kernels.isa(),
        cores,
        torch.get_num_threads(),
        _cache_bytes(1),
        _cache_bytes(2),
        _cache_bytes(3),
    )


def machine_of(device: str, dtype: torch.dtype = torch.float32) -> Machine:
    """The machine of "cpu", or of "cuda", the first GPU, for tensors of `dtype`.

    Raises:
        ValueError: `device` is neither, or torch finds no GPU.
    """
    if device == "cpu":
        return cpu()
    if device != "cuda":
        raise unknown_choice("device", device, ("cpu", "cuda"))
    if not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no GPU that it can use")
    return gpu(0, dtype)


def tf32_allowed() -> bool:
    """Whether torch's switches let a float32 convolution round its factors to TF32."""
    conv = getattr(torch.backends.cudnn, "conv", None)  # torch 2.9 and later; the older switch must not be asked then
    return bool(torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32")


@lru_cache(maxsize=1)
def _triton_version() -> str:
    """Without importing it, of whichever distribution has it: nightly ones and those for Windows have other names."""
    if importlib.util.find_spec("triton") is None:
        return ""
    names = importlib.metadata.packages_distributions().get("triton", ())
    return next(map(importlib.metadata.version, names), "unknown")


def _driver_version() -> int:
    """The newest CUDA that the driver runs, such as 13000 for 13.0; 0 where there is no driver of NVIDIA's."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def _driver_release() -> str:
    """The release of NVIDIA's driver, such as "550.54.15"; "" where the system does not tell."""
    try:
        found = re.search(r"\d+\.[.\d]*\d", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return found[0] if found else ""


def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]


def gpu(device: int = 0, dtype: torch.dtype = torch.float32) -> Gpu:
    """The GPU that torch calls "cuda:`device`", for convolutions of `dtype`."""
    found: Any = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    isa = found.gcnArchName.split(":")[0] if amd else f"sm_{found.major}{found.minor}"
    precision = str(dtype).removeprefix("torch.")
    if precision == "float32" and found.major >= 8 and not amd and tf32_allowed():
        precision = "tf32"

    def known(name: str) -> int:
        """An attribute that not every version of torch has."""
        return int(getattr(found, name, 0))

    return Gpu(
        "cuda",
        found.name,
        isa,
        found.multi_processor_count,
        1,
        known("shared_memory_per_block_optin"),
        known("L2_cache_size"),
        0,
        precision,
        clock_khz=known("clock_rate"),
        memory_clock_khz=known("memory_clock_rate"),
        memory_bus_bits=known("memory_bus_width"),
        memory_bytes=found.total_memory,
        driver=_driver_version(),
        cudnn=_cudnn_version(),
        triton=_triton_version(),
        driver_release=_driver_release(),
        index=device,
    )
