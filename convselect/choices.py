"""From problems to candidates with costs, and from an assignment to a `Plan`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

from torch.fx import Graph, Node

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect.costs import MEASURED_STD, TWO_SIDED_90, Costs, OperatorTiming, Samples, Timing, model_for, store
from convselect.graph.assign import Assignment, Candidate
from convselect.graph.capture import ConvSpec, Unconverted
from convselect.graph.operators import kind_of
from convselect.graph.program.slices import CACHE
from convselect.machine import Machine
from convselect.measure import calibration
from convselect.measure.timers import Timer, timer_of
from convselect.options import Options
from convselect.plan.plan import LayerPlan, OperatorPlan, Plan
from convselect.primitive import Primitive, candidates
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

_THROUGH_MEMORY_GBS = 15.0
"""On two Zen 5 cores EfficientNet-B0 at batch 8 lost 1.4 and 1.5 ms by two such layers of 26 and 17 MB, beside the time
that they take alone."""
VERIFY_FACTOR = 1.3
"""`select="model+verify"` times the candidates predicted within this factor of the best."""

Able = Mapping[ConvProblem, Sequence[Primitive]]
"""The primitives that may run each problem."""
Times = dict[ConvProblem, dict[str, float]]
"""Problem -> primitive -> ms."""


@dataclass
class Choices:
    """What can run each problem, what each would cost, and why others cannot."""

    costs: Costs
    calibrated: bool
    candidates: dict[ConvProblem, list[Candidate]] = field(default_factory=dict)
    refusals: dict[ConvProblem, dict[str, str]] = field(default_factory=dict)
    log_std: dict[ConvProblem, dict[str, float]] = field(default_factory=dict)
    """Standard deviation of the logarithm of each candidate's time."""
    measured_ms: float = 0.0
    """Wall-clock time that calibration and measuring took."""


def choices_for(problems: Sequence[ConvProblem], options: Options, machine: Machine) -> Choices:
    """The candidates of each distinct problem, with predicted or measured times as `options` ask."""
    distinct = list(dict.fromkeys(problems))
    start = time.perf_counter()
    left_out = {"onednn": "its packed weights are opaque to Inductor"} if options.remainder == "inductor" else {}
    able, refusals = {}, {}
    for problem in distinct:
        able[problem], refusals[problem] = candidates(problem, machine, options.accuracy, left_out)
    samples = calibrated(problems, able, options, machine)
    choices = Choices(costs_for(machine, samples or Samples()), bool(samples and samples.timings), refusals=refusals)
    choices.measured_ms = 1e3 * (time.perf_counter() - start)

    start = time.perf_counter()
    if options.select == "measure":
        times = measured_ms(able, timer_of(machine))
        choices.log_std = {problem: dict.fromkeys(of, MEASURED_STD) for problem, of in times.items()}
    else:
        if options.select == "model+verify":
            choices.costs = verified(choices.costs, able, options.budget_s, timer_of(machine))
        times, choices.log_std = predict(choices.costs, able)
    if options.select != "model":
        choices.measured_ms += 1e3 * (time.perf_counter() - start)
    choices.candidates = with_times(able, times, machine)
    return choices


def costs_for(machine: Machine, samples: Samples) -> Costs:
    """The shipped model adapted to `samples`, which takes 0.1 s for 250 of them: once for all graphs of a model."""
    return _adapted(machine, tuple(samples.timings), tuple(samples.operators))


@lru_cache(maxsize=4)
def _adapted(machine: Machine, timings: tuple[Timing, ...], operators: tuple[OperatorTiming, ...]) -> Costs:
    return Costs(model_for(machine), Samples(list(timings), list(operators)), machine)


def calibrated(problems: Sequence[ConvProblem], able: Able, options: Options, machine: Machine) -> Samples | None:
    """What was timed on `machine`, now or earlier, as `options.calibrate` asks."""
    if options.calibrate == "never":
        return None
    if options.budget_s == 0:
        return store.load(machine)
    if options.calibrate == "auto":
        return calibration.ensure(options.budget_s, machine, problems, able, partial(timer_of, machine))
    with store.calibrating():
        return calibration.calibrate(options.budget_s, problems=problems, able=able, timer=timer_of(machine))


def predict(costs: Costs, able: Able) -> tuple[Times, dict[ConvProblem, dict[str, float]]]:
    """The times, and in the same form the standard deviations of their logarithms."""
    named = list({p.name: p for ables in able.values() for p in ables}.values())
    tables = costs.predict(list(able), [(p.name, p.family) for p in named])
    column = {primitive.name: j for j, primitive in enumerate(named)}
    ms, log_std = (
        {p: {q.name: float(table[i, column[q.name]]) for q in able[p]} for i, p in enumerate(able)} for table in tables
    )
    return ms, log_std


def measured_ms(able: Able, timer: Timer) -> Times:
    """The time of every candidate: the oracle."""
    return {problem: timer.time_primitives(problem, primitives) for problem, primitives in able.items()}


def verified(costs: Costs, able: Able, budget_s: float, timer: Timer) -> Costs:
    """`costs` with the close calls timed, those of the longest first, as far as the budget goes."""
    samples = Samples()
    predicted, _ = predict(costs, able)
    deadline = time.perf_counter() + budget_s
    for problem in sorted(able, key=lambda p: -min(predicted[p].values())):
        best = min(predicted[problem].values())
        close = [p for p in able[problem] if predicted[problem][p.name] <= VERIFY_FACTOR * best]
        if len(close) > 1 and time.perf_counter() < deadline:
            for name, ms in timer.time_primitives(problem, close, deadline=deadline).items():
                samples.add(problem, name, costs.machine.threads, ms)
    return costs.with_samples(samples)


def with_times(able: Able, times: Times, machine: Machine) -> dict[ConvProblem, list[Candidate]]:
    """The candidates of each problem; those without a time are left out."""
    return {
        problem: [
            Candidate(
                q,
                times[problem][q.name] + leaving_ms(q, problem, machine),
                q.packed_bytes(problem, machine),
                q.workspace_bytes(problem, machine),
            )
            for q in primitives
            if q.name in times[problem]
        ]
        for problem, primitives in able.items()
    }


def leaving_ms(primitive: Primitive, problem: ConvProblem, machine: Machine) -> float:
    """What a library's convolution of a large batch costs beside its own time.

    It ends the program, the head of which runs in slices that the caches hold (`graph/program/slices.py`): what comes
    before and after it then moves its activations through memory.
    """
    moved = problem.src_bytes + problem.dst_bytes
    in_slices = machine.runs_programs and problem.mb > 1 and moved > CACHE * machine.threads
    return moved / _THROUGH_MEMORY_GBS * 1e-6 if in_slices and not isinstance(primitive, KernelPrimitive) else 0.0


def plan_of(
    graph: Graph,
    convs: Mapping[Node, ConvSpec],
    others: Sequence[Unconverted],
    choices: Choices,
    assignment: Assignment,
    options: Options,
    select_ms: float,
) -> Plan:
    """The record of `assignment`; transforms are added when lowering has inserted them."""
    layers = [_layer(spec, node, choices, assignment) for node, spec in convs.items()]
    layers += map(_unconverted, others)
    operators = [
        OperatorPlan(node.name, kind, str(assignment.chosen[node].gives), assignment.chosen[node].ms)
        for node in graph.nodes
        if (kind := kind_of(node)) is not None
    ]
    names = {node: spec.name for node, spec in convs.items()}
    edges = [
        (names.get(source, source.name), names.get(node, node.name))
        for node in graph.nodes
        for source in node.all_input_nodes
    ]
    machine = choices.costs.machine
    return Plan(
        machine=str(machine),
        fingerprint=machine.fingerprint,
        accuracy=options.accuracy,
        select=options.select,
        calibrated=choices.calibrated,
        layers=tuple(layers),
        transforms=(),
        operators=tuple(operators),
        total_predicted_ms=assignment.total_ms,
        gap_ms=assignment.gap_ms,
        select_ms=select_ms,
        memory_mb=options.memory_mb,
        edges=tuple(edges),
    )


def unconverted_plan(others: Sequence[Unconverted], options: Options, where: str) -> Plan:
    """The plan of a graph on the device `where` that stays as it is."""
    layers = tuple(map(_unconverted, others))
    return Plan(where, "", options.accuracy, options.select, False, layers, (), (), 0.0, 0.0, 0.0)


def _unconverted(other: Unconverted) -> LayerPlan:
    return LayerPlan(
        other.name,
        other.problem,
        "aten",
        "aten",
        "",
        "",
        "identity",
        False,
        None,
        None,
        None,
        refusals={"every primitive": other.reason},
    )


def _layer(spec: ConvSpec, node: Node, choices: Choices, assignment: Assignment) -> LayerPlan:
    chosen = assignment.chosen[node].candidate
    assert chosen is not None
    primitive = chosen.primitive
    others = [c for c in choices.candidates[spec.problem] if c.primitive is not primitive]
    second = min(others, key=lambda c: c.ms, default=None)
    spread = math.exp(TWO_SIDED_90 * choices.log_std[spec.problem][primitive.name])
    return LayerPlan(
        name=spec.name,
        problem=str(spec.problem),
        primitive="aten" if primitive.family == "aten" else primitive.name,
        family=primitive.family,
        src_layout=str(primitive.src_layout),
        dst_layout=str(primitive.dst_layout),
        activation=spec.activation.kind,
        residual=node.args[3] is not None,
        predicted_ms=chosen.ms,
        runner_up=second.primitive.name if second else None,
        runner_up_ms=second.ms if second else None,
        packed_bytes=chosen.packed_bytes,
        workspace_bytes=chosen.workspace_bytes,
        refusals=choices.refusals[spec.problem],
        interval_ms=(chosen.ms / spread, chosen.ms * spread),
    )
