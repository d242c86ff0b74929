"""The primitives, one file a family. Importing this package fills the registry."""

from convselect.primitives import direct, im2, pointwise  # noqa: F401
