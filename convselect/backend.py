"""The `torch.compile` backend: captures, selects, lowers. The orchestration, and nothing else."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._dispatch.python import no_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Graph, GraphModule, Node

from convselect.choices import Choices, choices_for, plan_of, unconverted_plan
from convselect.errors import ConvselectWarning, UnconvertedError, brief
from convselect.graph.assign import Assignment, OperatorCosts
from convselect.graph.budget import assign_within
from convselect.graph.capture import (
    ConvSpec,
    Unconverted,
    constants,
    convolution,
    find_convolutions,
    nbytes,
    size_hint,
    static_inputs,
)
from convselect.graph.constants import Prepack, pack, split_constants
from convselect.graph.fold import fold_batch_norms
from convselect.graph.fuse import fuse_activations_into_norms, fuse_epilogues
from convselect.graph.inplace import write_in_place
from convselect.graph.linear import replace_linears
from convselect.graph.lower import Lowered, lower
from convselect.graph.nodes import args_of
from convselect.graph.program.segment import split
from convselect.graph.remainder import compile_remainder
from convselect.graph.results import eager_strides
from convselect.graph.simplify import simplify
from convselect.graph.target import Target, devices_of, target_of
from convselect.graph.undecomposed import undecomposed
from convselect.options import Options
from convselect.plan.plan import Plan, TransformPlan
from convselect.problem import ConvProblem
from convselect.runtime.compiled import CompiledGraph
from convselect.runtime.cuda_graphs import CAPTURED, Cuda, CudaGraphs, refusal
from convselect.runtime.weights import Constants


class Backend:
    """A backend with its options: `torch.compile(model, backend=Backend(Options(...)))`."""

    __name__ = "convselect"

    def __init__(
        self, options: Options, held: Callable[[CompiledGraph], Callable[[list[Any]], Any]] = lambda graph: graph
    ) -> None:
        """`held` is told of each graph, and gives what torch's caches are to hold of it, which outlive the model."""
        self.options, self._held = options, held

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        wants_gradient = any(isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs)
        if torch.is_grad_enabled() and wants_gradient:
            self._fall_back(
                "the model runs unconverted because gradients are enabled; "
                "call it under torch.inference_mode() (or torch.no_grad()) to have it converted"
            )
            return gm.forward
        compiler = partial(self._compile, gm, example_inputs)
        with undecomposed():
            return aot_autograd(fw_compiler=compiler, inference_compiler=compiler)(gm, example_inputs)

    def choices(self, problems: Sequence[ConvProblem], target: Target) -> Choices:
        """What can run each problem, and what it costs. A subclass may choose among less."""
        return choices_for(problems, self.options, target.machine())

    def _fall_back(self, message: str) -> None:
        if self.options.strict:
            raise UnconvertedError(message)
        warnings.warn(message, ConvselectWarning, stacklevel=2)

    def _compile(
        self, dynamo_module: GraphModule, dynamo_inputs: Sequence[Any], gm: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[[list[Any]], Any]:
        target = target_of(gm.graph)
        if isinstance(target, str):
            return self._unconverted(gm, target)
        try:
            with _blamed():
                graph = copied(gm)
                with _plain_torch():
                    graph.output_node().meta["strides"] = eager_strides(graph, dynamo_module, dynamo_inputs)
                static = static_inputs(graph, dynamo_module.graph.find_nodes(op="placeholder"))
                prepared = prepare(graph, static, target)
            self._report(prepared.others)
            return self._converted(prepared, static, target, example_inputs)
        except _DefectError as defect:
            reason = f"an error in convselect ({defect}); please report it"
            self._fall_back(f"the model, or a part of it, runs in ATen because of {reason}")
            return self._unconverted(gm, reason)

    def _converted(
        self, prepared: Prepared, static: set[Node], target: Target, example_inputs: Sequence[Any]
    ) -> Callable[[list[Any]], Any]:
        selected = self._select(prepared, target)
        prepacks = _prepacks(prepared.graph, selected.assignment)
        fake = _fake_mode(prepared.graph)
        with _blamed():
            with fake:
                lowered = lower(prepared.graph, selected.assignment.chosen, len(prepacks))
                if self.options.remainder != "inductor":  # which does the same
                    write_in_place(lowered.module.graph)
            module = split(lowered.module, len(prepacks))
        transforms = tuple(_transforms(lowered, prepared.convs, selected.costs))
        plan = replace(selected.plan, transforms=transforms)
        body: Callable[..., Any] = module
        if self.options.remainder == "inductor":
            with fake:
                fakes = pack(prepared.fold, prepacks, [example_inputs[position] for position in prepared.positions])
            body = compile_remainder(lowered.module, fake, fakes)
        weights = Constants(prepared.fold, prepacks, target.device)
        compiled = CompiledGraph(plan, module, body, weights, prepared.positions, lowered.arguments, target.device)
        if target.is_gpu and prepared.convs:
            fixed = [node in static for node in prepared.graph.find_nodes(op="placeholder")]
            self._capture(compiled, lowered, [fixed[position] for position in lowered.arguments])
        return self._held(compiled)

    def _select(self, prepared: Prepared, target: Target) -> Selected:
        """A primitive for each convolution, and a layout for each value."""
        graph, convs = prepared.graph, prepared.convs
        start = time.perf_counter()
        with _plain_torch():
            choices = self.choices([spec.problem for spec in convs.values()], target)
        candidates = {node: choices.candidates[spec.problem] for node, spec in convs.items()}
        costs = OperatorCosts(choices.costs.operator_ms)
        memory = math.inf if self.options.memory_mb is None else self.options.memory_mb * 2**20
        assignment = assign_within(graph, candidates, costs, memory)
        select_ms = 1e3 * (time.perf_counter() - start) - choices.measured_ms
        plan = plan_of(graph, convs, prepared.others, choices, assignment, self.options, select_ms)
        return Selected(assignment, costs, plan)

    def _capture(self, compiled: CompiledGraph, lowered: Lowered, weights_read: Sequence[bool]) -> None:
        """Lets `compiled` replay CUDA graphs, unless its plan says why not. weights_read: of each argument, whether it
        is a weight, which is read where it is.
        """
        reason = 'cuda_graphs is "never"' if self.options.cuda_graphs == "never" else None
        reason = reason or refusal(lowered.module.graph, compiled.device)
        compiled.plan = replace(compiled.plan, cuda_graph=f"none, as {reason}" if reason else CAPTURED)

        def uncaptured(sentence: str) -> None:
            """Not for `strict`: what is converted runs as planned, only launch by launch."""
            compiled.plan = replace(compiled.plan, cuda_graph=f"{compiled.plan.cuda_graph}; {sentence}")
            warnings.warn(sentence, ConvselectWarning, stacklevel=2)

        if reason is None:
            compiled.body = CudaGraphs(compiled.body, Cuda(compiled.device), weights_read, uncaptured)

    def _unconverted(self, gm: GraphModule, reason: str) -> Callable[[list[Any]], Any]:
        """The graph as it was captured, with a plan that says why."""
        others = find_convolutions(gm.graph, set(), reason)
        self._report(others)
        placeholders = gm.graph.find_nodes(op="placeholder")
        device = next((args_of(other.node)[0].meta["val"].device for other in others), None) or devices_of(gm.graph)[0]
        body = compile_remainder(gm, _fake_mode(gm.graph), []) if self.options.remainder == "inductor" else None
        with gm.graph.inserting_before(placeholders[0]):
            gm.graph.placeholder("packed")  # there are no constants
        nothing = Graph()
        nothing.output(())
        module = GraphModule(gm, gm.graph)
        compiled = CompiledGraph(
            unconverted_plan(others, self.options, str(device)),
            module,
            body or module,
            Constants(GraphModule({}, nothing), []),
            [],
            range(len(placeholders)),
        )
        return self._held(compiled)

    def _report(self, others: Sequence[Unconverted]) -> None:
        for other in others:
            self._fall_back(f"{other.name} runs in ATen: {other.reason}")


class Selected(NamedTuple):
    """What primitives and layouts were chosen, by which costs."""

    assignment: Assignment
    costs: OperatorCosts
    plan: Plan
    """Without transforms, which lowering inserts."""


class _DefectError(Exception):
    """An error in this package."""


@contextmanager
def _blamed() -> Iterator[None]:
    """Rewriting a captured graph must not fail. If it does all the same, the model still has to run: as it is."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise _DefectError(brief(error)) from error


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Without the modes that a graph is captured under, and without torch's decompositions in Python."""
    with (
        torch.utils._python_dispatch._disable_current_modes(),
        no_python_dispatcher(),
        torch.no_grad(),
        torch._C._DisableAutocast(),
    ):
        yield


def copied(gm: GraphModule) -> Graph:
    """A copy of the graph, for rewriting; what it reads of `gm` stays there."""
    graph = Graph()
    nodes: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        nodes[node] = graph.node_copy(node, nodes.__getitem__)
    return GraphModule(gm, graph).graph


@dataclass(frozen=True)
class Prepared:
    """A captured graph with everything folded and fused that can be: what primitives are selected for."""

    graph: Graph
    convs: Mapping[Node, ConvSpec]
    others: Sequence[Unconverted]
    """Convolutions that stay with ATen."""
    fold: GraphModule
    """Computes what depends on the weights alone, from the inputs at `positions`."""
    positions: list[int]


def prepare(graph: Graph, static: set[Node], target: Target) -> Prepared:
    """Rewrites `graph`, of which the inputs `static` are weights, to `convolution` nodes for `target`."""
    constant = constants(graph, static)
    others = find_convolutions(graph, constant, target)
    constant = constants(graph, static)
    fold_batch_norms(graph, constant)
    simplify(graph, constant)
    fuse_epilogues(graph)
    fuse_activations_into_norms(graph)
    replace_linears(graph)
    convs = {node: node.meta["conv"] for node in graph.find_nodes(op="call_function", target=convolution)}
    return Prepared(graph, convs, others, *split_constants(graph, constant))


def captured(model: Callable[..., Any], *inputs: torch.Tensor) -> list[Prepared]:
    """The graphs for which `compile(model)` selects primitives when it is called with `inputs`; each has a target.

    Runs the model once, as it is. Under a `FakeTensorMode`, with a model made there, this computes nothing.
    """
    found: list[Prepared] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        placeholders = gm.graph.find_nodes(op="placeholder")

        def keep(traced: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            graph, target = traced.graph, target_of(traced.graph)
            if isinstance(target, Target):
                found.append(prepare(graph, static_inputs(graph, placeholders), target))
            return traced.forward

        with undecomposed():
            aot_autograd(fw_compiler=keep, inference_compiler=keep)(gm, example_inputs)
        return gm.forward

    with torch.inference_mode():
        torch.compile(model, backend=backend)(*inputs)
    return found


def _fake_mode(graph: Graph) -> Any:
    """In which the graph was traced."""
    return torch._guards.detect_fake_mode([node.meta.get("val") for node in graph.nodes])


def _prepacks(graph: Graph, assignment: Assignment) -> list[Prepack | None]:
    """How to pack each constant of the graph, in the order of `split_constants`; None for those used as they are."""
    prepacks: dict[int, Prepack | None] = {}
    for node in graph.nodes:
        constants = [position for position in node.meta.get("constants", ()) if position is not None]
        prepacks |= dict.fromkeys(constants)
        if node.target is convolution:
            chosen = assignment.chosen[node].candidate
            assert chosen is not None
            prepacks[constants[0]] = partial(chosen.primitive.prepack, node.meta["conv"].problem)
    return [prepacks[position] for position in range(len(prepacks))]


def _transforms(lowered: Lowered, convs: Mapping[Node, ConvSpec], costs: OperatorCosts) -> Iterator[TransformPlan]:
    def name(node: Node) -> str:
        return convs[node].name if node in convs else str(node.name)

    for value, src, dst, readers in lowered.transforms:
        yield TransformPlan(
            value=name(value),
            consumers=tuple(name(reader) for reader in readers),
            shape=tuple(size_hint(size) for size in value.meta["val"].shape),
            src_layout=str(src or "strided"),
            dst_layout=str(dst),
            predicted_ms=costs.transform_ms(nbytes(value), src, dst),
        )


def convselect(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., Any]:
    """The entry point `torch.compile(model, backend="convselect", options={...})`.

    What it raises arrives as the `inner_exception` of Dynamo's `BackendCompilerFailed`.
    """
    if mode is not None:
        raise ValueError(f"mode is {mode!r}, but the convselect backend has no modes; use options={{...}}")
    return Backend(Options.of(options))(gm, example_inputs)
