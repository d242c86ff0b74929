"""The compiled kernels: loads the operators `torch.ops.convselect.*` and says which instruction set they use."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch

_NAME = "libconvselect_cpu.so"


def _library() -> Path:
    """The compiled library: beside this file, or, in an editable install, in the package's other folder."""
    for folder in __path__:
        if (path := Path(folder, _NAME)).exists():
            return path
    raise ImportError(
        f"{_NAME} is missing from {list(__path__)}: the kernels were not built. "
        "Install with `pip install --no-build-isolation .` in an environment that has torch"
    )


_LIBRARY = _library()
torch.ops.load_library(_LIBRARY)

from convselect.kernels import fake  # noqa: E402, F401  (needs the operators)


def isa() -> str:
    """The instruction set in use: "avx512", "avx2", "neon" or "portable". `CONVSELECT_ISA` caps it."""
    return ("portable", "avx2", "avx512", "neon")[torch.ops.convselect.isa()]


@lru_cache(maxsize=1)
def binary_hash() -> str:
    """A digest of the compiled library, so that timings of other kernels are never taken for these."""
    return hashlib.sha256(_LIBRARY.read_bytes()).hexdigest()[:16]


@lru_cache(maxsize=1)
def triton_hash() -> str:
    """The like of the sources of the Triton kernels."""
    sources = sorted(path for folder in __path__ for path in Path(folder, "triton").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
