"""The primitives, one file a family. Importing this package fills the registry."""

from convselect.primitives import pointwise  # noqa: F401
