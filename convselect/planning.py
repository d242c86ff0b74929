"""From problems to candidates with costs, and from an assignment to a `Plan`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Graph, Node

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect import calibration, timing
from convselect.costs import MEASURED_STD, TWO_SIDED_90, CostModel, Costs, store
from convselect.graph.assign import Assignment, Candidate
from convselect.graph.capture import ConvSpec, Unconverted
from convselect.graph.operators import kind_of
from convselect.machine import Machine
from convselect.options import Options
from convselect.plan import LayerPlan, OperatorPlan, Plan
from convselect.primitive import Primitive, candidates
from convselect.problem import ConvProblem

VERIFY_FACTOR = 1.3
"""`select="model+verify"` times the candidates predicted within this factor of the best."""


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
    samples = store.load(machine)
    wanted = options.calibrate == "always" or (options.calibrate == "auto" and samples is None)
    if wanted and options.budget_s > 0:
        samples = calibration.calibrate(options.budget_s, problems=problems, able=able)
    choices = Choices(Costs(CostModel.load(), samples, machine), samples is not None, refusals=refusals)
    choices.measured_ms = 1e3 * (time.perf_counter() - start)

    named = list({p.name: p for ables in able.values() for p in ables}.values())
    table, deviations = choices.costs.predict(distinct, [(p.name, p.family) for p in named])
    column = {primitive.name: j for j, primitive in enumerate(named)}
    ms = {p: {q.name: float(table[i, column[q.name]]) for q in able[p]} for i, p in enumerate(distinct)}
    predicted = {p: dict(of) for p, of in ms.items()}
    if options.select != "model":
        start = time.perf_counter()
        _measure(ms, able, options, timing.PrimitiveTimer(machine))
        choices.measured_ms += 1e3 * (time.perf_counter() - start)
    for i, problem in enumerate(distinct):
        choices.log_std[problem] = {
            name: float(deviations[i, column[name]]) if time == predicted[problem].get(name) else MEASURED_STD
            for name, time in ms[problem].items()
        }
        choices.candidates[problem] = [
            Candidate(
                primitive,
                ms[problem][primitive.name],
                primitive.packed_bytes(problem),
                primitive.workspace_bytes(problem, machine.threads),
            )
            for primitive in able[problem]
            if primitive.name in ms[problem]
        ]
    return choices


def _measure(
    ms: dict[ConvProblem, dict[str, float]],
    able: Mapping[ConvProblem, list[Primitive]],
    options: Options,
    timer: timing.PrimitiveTimer,
) -> None:
    """Replaces predictions by timings: of all candidates, or of the close calls within the budget."""
    if options.select == "measure":
        for problem, primitives_of in able.items():
            ms[problem] = timer.time_primitives(problem, primitives_of)
        return
    deadline = time.perf_counter() + options.budget_s
    for problem in sorted(able, key=lambda p: -min(ms[p].values())):
        best = min(ms[problem].values())
        close = [p for p in able[problem] if ms[problem][p.name] <= VERIFY_FACTOR * best]
        if len(close) > 1 and time.perf_counter() < deadline:
            ms[problem] |= timer.time_primitives(problem, close, deadline=deadline)


def plan_of(
    graph: Graph,
    convs: Mapping[Node, ConvSpec],
    others: Sequence[Unconverted],
    choices: Choices,
    assignment: Assignment,
    options: Options,
    machine: Machine,
    select_ms: float,
) -> Plan:
    """The record of `assignment`; transforms are added when lowering has inserted them."""
    layers = [_layer(spec, node, choices, assignment) for node, spec in convs.items()]
    layers += [
        LayerPlan(o.name, o.problem, "aten", "aten", "", "", "identity", False, None, None, None,
                  refusals={"every primitive": o.reason})
        for o in others
    ]  # fmt: skip
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
