"""The primitives, one file a family; those of GPUs in `gpu`. Importing this package fills the registry."""

from convselect.primitives import aten, depthwise, direct, fft, gpu, grouped, im2, kn2, mec, onednn, pointwise, winograd  # noqa: F401
