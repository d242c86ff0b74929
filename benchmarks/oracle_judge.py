"""One network in a process of its own: `python oracle_judge.py NETWORK THREADS WEIGHTS OUT`. See oracle.py."""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from convselect.bench.networks import load
from convselect.bench.oracle import judge
from convselect.costs import CostModel
from convselect.machine import cpu
from convselect.options import Options

BUDGET_S = 2.0
"""For calibration, and again for verification."""


def main(network: str, threads: str, weights: str, out: str) -> None:
    torch.set_num_threads(int(threads))
    model, x = load(network)
    verdict = judge(network, model, x, Options(budget_s=BUDGET_S), CostModel.load(Path(weights)))
    date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"
    Path(out).write_text(json.dumps({"machine": str(cpu()), "date": date, **asdict(verdict)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
