"""The primitives, one file a family. Importing this package fills the registry."""

from convselect.primitives import aten, direct, im2, kn2, onednn, pointwise  # noqa: F401
