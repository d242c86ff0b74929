"""`convselect cache`: what calibration stored on this machine."""

from __future__ import annotations

import click


@click.group()
def cache() -> None:
    """Look at or remove the calibrations stored on this machine."""


@cache.command("path")
def path_() -> None:
    """Print the folder."""
    from convselect.costs import store

    folder = store.directory()
    if folder is None:
        raise click.ClickException("the user has no home directory; set CONVSELECT_CACHE to the folder to use")
    click.echo(folder)


@cache.command("list")
def list_() -> None:
    """Print every entry."""
    from convselect.costs import store

    entries = store.entries()
    for entry in entries:
        state = "sound" if entry.damage is None else f"damaged: {entry.damage}"
        click.echo(
            f"{entry.fingerprint}  {entry.machine}  {entry.saved}  {entry.timings} timings of primitives, "
            f"{entry.operators} of operators, {entry.nbytes} bytes, {state}"
        )
    if not entries:
        click.echo("no entries")


@cache.command()
def verify() -> None:
    """Check every entry; exit with 1 if one is damaged. A damaged entry is never used."""
    from convselect.costs import store

    damaged = store.verify()
    for entry in damaged:
        click.echo(f"{entry.path}: {entry.damage}")
    if damaged:
        raise click.ClickException(f"damaged entries: {len(damaged)}; `convselect cache clear` removes them")
    click.echo("every entry is sound")


@cache.command()
def clear() -> None:
    """Remove all entries."""
    from convselect.costs import store

    try:
        click.echo(f"removed: {store.clear()}")
    except OSError as error:
        raise click.ClickException(str(error)) from error
