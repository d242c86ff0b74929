"""The primitives, one file a family. Importing this package fills the registry."""

from convselect.primitives import depthwise, direct, im2, pointwise, winograd  # noqa: F401
