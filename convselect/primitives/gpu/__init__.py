"""The primitives of GPUs, one file a family. Importing this package imports no Triton and asks for no GPU."""

from convselect.primitives.gpu import cudnn, depthwise, grouped, igemm, im2row, pointwise, stem, winograd  # noqa: F401
