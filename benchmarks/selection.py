"""What it is worth to choose for the whole graph: PBQP against simpler ways to choose, predicted and measured.

    python benchmarks/selection.py [--threads 2] [NETWORK...]

writes benchmarks/SELECTION.md. Every way has the shipped model's predictions, uncalibrated, and differs in the
primitives it leaves for each convolution; operators and transforms are then assigned at least cost, so that what greedy
and the others lose is no more than what their primitives make inevitable. Measured is the compiled network without
Dynamo's guards, all ways in turn in one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import click
import torch

from convselect import machine
from convselect.backend import Backend, Prepared, captured
from convselect.bench import markdown
from convselect.bench.networks import DEFAULT, load
from convselect.bench.report import geomean
from convselect.bench.runner import Protocol, interleave
from convselect.choices import Choices, choices_for
from convselect.graph.assign import Assignment, Candidate, OperatorCosts, assign
from convselect.graph.target import Target
from convselect.layout import Layout
from convselect.measure.cpu import interleaved
from convselect.measure.progress import reporting
from convselect.options import Options
from convselect.primitive import primitives
from convselect.problem import ConvProblem
from convselect.runtime.compiled import Run, run_graphs

OPTIONS = Options(calibrate="never")
PROTOCOL = Protocol(rounds=15, runs=5, settle_ms=20)

Policy = Callable[[Sequence[Candidate]], list[Candidate]]
"""Of the candidates of a convolution, those left to choose from."""


def narrowed(*rules: Callable[[Candidate], bool]) -> Policy:
    """The candidates that obey the first rule that any obeys; all where none does."""

    def policy(candidates: Sequence[Candidate]) -> list[Candidate]:
        kept = ([c for c in candidates if rule(c)] for rule in rules)
        return next(filter(None, kept), list(candidates))

    return policy


def only(layout: Layout) -> Policy:
    return narrowed(lambda c: c.primitive.src_layout is c.primitive.dst_layout is layout)


def family(name: str) -> Policy:
    return narrowed(lambda c: c.primitive.family == name, lambda c: c.primitive.family == "onednn")


POLICIES: dict[str, Policy] = {
    "PBQP": list,
    "greedy": lambda candidates: [min(candidates, key=lambda c: c.ms)],
    "NHWC only": only(Layout.NHWC),
    "NCHW only": only(Layout.NCHW),
}
FAMILIES = sorted({primitive.family for primitive in primitives()} - {"aten"})


@dataclass
class Row:
    """A network; times in ms by way to choose, "one family" being the best single one."""

    name: str
    family: str
    convolutions: int
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    gap_ms: float
    select_ms: float
    """Of the assignment by PBQP."""


class Narrowed(Backend):
    def __init__(self, policy: Policy) -> None:
        super().__init__(OPTIONS)
        self.policy = policy

    def choices(self, problems: Sequence[ConvProblem], target: Target) -> Choices:
        choices = super().choices(problems, target)
        return replace(choices, candidates={p: self.policy(every) for p, every in choices.candidates.items()})


def assigned(graphs: Sequence[Prepared], choices: Choices, policy: Policy) -> list[Assignment]:
    costs = OperatorCosts(choices.costs.operator_ms)
    return [
        assign(g.graph, {node: policy(choices.candidates[spec.problem]) for node, spec in g.convs.items()}, costs)
        for g in graphs
    ]


def total_ms(graphs: Sequence[Prepared], choices: Choices, policy: Policy) -> float:
    return sum(assignment.total_ms for assignment in assigned(graphs, choices, policy))


def measured_ms(model: torch.nn.Module, x: torch.Tensor, policies: Mapping[str, Policy]) -> dict[str, float]:
    """Medians of the compiled network, without Dynamo's guards."""

    def call(policy: Policy) -> Callable[[], object]:
        torch._dynamo.reset()
        runs: list[Run] = run_graphs(torch.compile(model, backend=Narrowed(policy)), [x])
        return lambda: [run.graph.run(run.statics, run.rest) for run in runs]

    calls = {name: call(policy) for name, policy in policies.items()}
    with torch.inference_mode():
        return {name: median(times) for name, times in interleave(calls, PROTOCOL).items()}


def compare(name: str) -> Row:
    torch._dynamo.reset()
    model, x = load(name)
    graphs = captured(model, x)
    problems = [spec.problem for g in graphs for spec in g.convs.values()]
    choices = choices_for(problems, OPTIONS, machine.cpu())
    gap_ms = sum(assignment.gap_ms for assignment in assigned(graphs, choices, list))
    (times,) = interleaved([lambda: assigned(graphs, choices, list)], rounds=5).T
    best = min(FAMILIES, key=lambda f: total_ms(graphs, choices, family(f)))
    policies = {**POLICIES, "one family": family(best)}
    predicted = {way: total_ms(graphs, choices, policy) for way, policy in policies.items()}
    return Row(name, best, len(problems), predicted, measured_ms(model, x, policies), gap_ms, min(times))


def table(rows: Sequence[Row], times: Callable[[Row], Mapping[str, float]]) -> list[str]:
    """PBQP's ms, and the other ways' time over it."""
    _, *others = times(rows[0])
    lines: list[list[object]] = []

    def ratio(row: Row, way: str) -> float:
        return times(row)[way] / times(row)["PBQP"]

    for row in rows:
        cells = [f"{ratio(row, way):.3f}" + (f" ({row.family})" if way == "one family" else "") for way in others]
        lines.append([row.name, f"{times(row)['PBQP']:.3f}", *cells])
    means = [f"{geomean([ratio(row, way) for row in rows]):.3f}" for way in others]
    lines.append(["geometric mean", None, *means])
    return [*markdown.table(["network", "PBQP, ms", *others], lines), ""]


@click.command(help=__doc__)
@click.argument("networks", nargs=-1)
@click.option("--threads", default=2, show_default=True)
def main(networks: tuple[str, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    names = networks or DEFAULT
    rows = []
    with reporting("Comparing", len(names), None) as report:
        for name in names:
            report(len(rows), name)
            rows.append(compare(name))
    exact = [row.name for row in rows if row.gap_ms == 0]
    gaps = [f"{row.name} {row.gap_ms:.3g} ms ({row.gap_ms / row.predicted['PBQP']:.2g})" for row in rows if row.gap_ms]
    slowest = max(rows, key=lambda row: row.select_ms)
    lines = [
        "# Selection",
        "",
        f"- machine: {machine.cpu()}; {threads} threads; torch {torch.__version__}; batch 1",
        f"- date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"- command: `{' '.join(['python benchmarks/selection.py --threads', str(threads), *networks])}`",
        f"- proven optimal under the predicted costs: {len(exact)} of {len(rows)} networks"
        + (f"; the gap of the others: {', '.join(gaps)}" if gaps else ""),
        f"- an assignment takes {math.ceil(slowest.select_ms)} ms at most ({slowest.name}, {slowest.convolutions} "
        "convolutions), predictions aside",
        "",
        "The time of each way to choose over PBQP's. Greedy takes each convolution's fastest primitive and pays for "
        "the transforms. NHWC only and NCHW only take the fastest primitive in that layout. One family is the best "
        "single family for the network, with oneDNN where it refuses a layer.",
        "",
        "## Predicted",
        "",
        *table(rows, lambda row: row.predicted),
        "## Measured",
        "",
        f"Medians of {PROTOCOL.rounds} interleaved rounds of {PROTOCOL.runs} runs.",
        "",
        *table(rows, lambda row: row.measured),
    ]
    text = "\n".join(lines)
    click.echo(text)
    Path(__file__).with_name("SELECTION.md").write_text(text)


if __name__ == "__main__":
    main()
