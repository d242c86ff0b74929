"""convselect: a `torch.compile` backend that makes a trained CNN fast on the machine at hand."""

from convselect.api import calibrate, compile, explain
from convselect.errors import ConvselectWarning, UnconvertedError
from convselect.primitive import primitives

__version__ = "0.1.0"
__all__ = ["ConvselectWarning", "UnconvertedError", "calibrate", "compile", "explain", "primitives"]
