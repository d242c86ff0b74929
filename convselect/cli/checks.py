"""Options that several commands have, and what is checked before the work starts, so that it is a sentence and not a
traceback after minutes of timing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

DEVICE = click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
DTYPE = click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of a GPU's tensors; float32 is TF32 where torch's switch allows it.",
)


@contextmanager
def usage_errors() -> Iterator[None]:
    """For checks of arguments: `ValueError` is wrong usage; `ModuleNotFoundError` says what to install."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from error


def out_file(*names: str, help: str, required: bool = False) -> Callable[[Any], Any]:
    """An option that names a file to write, which must be possible."""
    return click.option(
        *names,
        required=required,
        help=help,
        callback=_can_be_written,
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
    )


def _can_be_written(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """`click.Path` looks only at a file that exists."""
    if path is not None and not path.exists() and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise click.BadParameter(f"{str(path.parent)!r} is no folder that can be written.", ctx, param)
    return path


def check_model(model: str | None, shape: str | None) -> None:
    """Raises a usage error unless a network of the user's own and the shape of its input are given together."""
    if (model is None) != (shape is None):
        raise click.UsageError("--model and --input go together")
