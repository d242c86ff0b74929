"""Speed that is promised, each with its limit; exits with 1 where one is missed. The tests never look at a clock.

    python benchmarks/limits.py

Limits are of processor time, so that a busy machine meets them too, the least of several runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from convselect import machine
from convselect.backend import captured
from convselect.bench.networks import load
from convselect.choices import choices_for
from convselect.costs import CostModel, Costs, Samples, model_for, shipped
from convselect.costs.transfer import Adapted
from convselect.graph.assign import Candidate, Instance, OperatorCosts
from convselect.options import Options
from convselect.problem import ConvProblem
from convselect.selection import solve

NETWORK = "densenet121"


def least_ms(call: Callable[[], object], runs: int = 10) -> float:
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return min(times)


def long_chain() -> Callable[[], object]:
    rng, n = np.random.default_rng(0), 1000
    nodes = [rng.random(20) for _ in range(n)]
    edges = {(i, i + 1): rng.random((20, 20)) for i in range(n - 1)}
    return lambda: solve(nodes, edges, budget_s=0.0)


def of_a_network() -> dict[str, Callable[[], object]]:
    """Predicting, selecting and solving for `NETWORK`, with the shipped model."""
    with FakeTensorMode():
        (prepared,) = captured(*load(NETWORK))
    specs, here = prepared.convs, machine.cpu()
    problems = [spec.problem for spec in specs.values()]
    options = Options(calibrate="never")
    choices = choices_for(problems, options, here)
    candidates: dict[torch.fx.Node, list[Candidate]] = {
        node: choices.candidates[spec.problem] for node, spec in specs.items()
    }
    instance = Instance.of(prepared.graph, candidates, OperatorCosts(choices.costs.operator_ms))
    named = {c.primitive.name: c.primitive.family for every in candidates.values() for c in every}
    costs = Costs(model_for(here), None, here)
    return {
        f"predict the {len(problems)} layers of {NETWORK}": lambda: costs.predict(problems, list(named.items())),
        f"candidates and costs of {NETWORK}": lambda: choices_for(problems, options, here),
        f"solve {NETWORK}": lambda: solve(instance.nodes, instance.edges),
    }


def adapting() -> Callable[[], object]:
    """To 240 timings, as a calibration does again and again."""
    model, samples, rng = CostModel.load(shipped(machine.cpu())), Samples(), np.random.default_rng(0)
    problems = [ConvProblem(ic=16 * i, ih=28, iw=28, oc=64, kh=3, kw=3, ph=1, pw=1) for i in range(1, 31)]
    candidates = list(zip(model.primitives, model.families, strict=True))
    for problem in problems:
        for j in rng.choice(len(candidates), 8, replace=False):
            samples.add(problem, candidates[j][0], 2, float(rng.uniform(0.5, 2)))
    return lambda: Adapted(model, samples).log_predict(problems, candidates, 2)


@click.command(help=__doc__)
def main() -> None:
    limits = (100.0, 500.0, 100.0)
    rows = [(what, call, limit) for (what, call), limit in zip(of_a_network().items(), limits, strict=True)]
    rows += [("solve a chain of 1000", long_chain(), 1000.0), ("adapt to 240 timings", adapting(), 200.0)]
    click.echo(str(machine.cpu()))
    missed = 0
    for what, call, limit in rows:
        ms = least_ms(call)
        missed += ms > limit
        click.echo(f"{what:40s} {ms:8.1f} ms, at most {limit:.0f}{'' if ms <= limit else ': MISSED'}")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
