"""The command line. One file for each group of commands; what they need is imported when they run."""

from __future__ import annotations

import click

from convselect.cli.bench import bench
from convselect.cli.cache import cache
from convselect.cli.demo import demo
from convselect.cli.doctor import doctor
from convselect.cli.model import calibrate, profile, train
from convselect.cli.show import explain, primitives
from convselect.cli.study import transfer_eval


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="convselect", prog_name="convselect")
def main() -> None:
    """Run a trained CNN with the convolution routines and data layouts that a cost model picks for this machine."""


for command in (demo, bench, explain, calibrate, profile, train, transfer_eval, primitives, cache, doctor):
    main.add_command(command)
