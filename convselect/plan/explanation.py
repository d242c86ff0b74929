"""`Explanation`: a plan that can be read, as text, JSON and one HTML page."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

from convselect.plan.page import page
from convselect.plan.plan import LayerPlan, Plan, TransformPlan

_WIDTH = 400
"""Columns of the console that lays out the text table: wider than any row, so that nothing wraps."""


class Explanation:
    """What was chosen for each convolution of a network, and why.

    `print` it for a table; `to_json` and `to_html` write it out. Times in milliseconds.
    """

    def __init__(self, plan: Plan, title: str = "network") -> None:
        self.plan = plan
        self.title = title

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """One entry for each convolution of the graph, in order of execution."""
        return self.plan.layers

    @property
    def transforms(self) -> tuple[TransformPlan, ...]:
        """The layout transforms that the plan inserts."""
        return self.plan.transforms

    @property
    def total_predicted_ms(self) -> float:
        """Layers, transforms and the operators between them."""
        return self.plan.total_predicted_ms

    @property
    def layers_predicted_ms(self) -> float:
        return sum(layer.predicted_ms or 0.0 for layer in self.layers)

    @property
    def layers_measured_ms(self) -> float | None:
        """Sum over the layers; None where not every layer was timed."""
        times = [layer.measured_ms for layer in self.layers]
        known = [ms for ms in times if ms is not None]
        return sum(known) if times and len(known) == len(times) else None

    def to_json(self) -> str:
        return self.plan.to_json()

    def to_html(self, path: str | Path) -> None:
        """Write one page that needs no other file: the pictures, the table and every refusal."""
        text = page(self.plan, self.title, self.summary(), self.layers_predicted_ms, self.layers_measured_ms)
        Path(path).write_text(text, encoding="utf-8")

    def summary(self) -> list[str]:
        """The sentences below the table: totals, memory, how sure the assignment is, and what was refused."""
        plan = self.plan
        operators_ms = sum(operator.predicted_ms for operator in plan.operators)
        transforms_ms = sum(transform.predicted_ms for transform in plan.transforms)
        measured = self.layers_measured_ms
        timed = "" if measured is None else f" (measured {measured:.3f})"
        proof = "the least possible" if plan.gap_ms == 0 else f"at most {plan.gap_ms:.3g} ms above the least possible"
        lines = [
            f"predicted {plan.total_predicted_ms:.3f} ms: {len(plan.layers)} convolutions "
            f"{self.layers_predicted_ms:.3f}{timed}, {len(plan.operators)} other operators {operators_ms:.3f}, "
            f"{len(plan.transforms)} layout transforms {transforms_ms:.3f}",
            f"assignment: {proof} under the predicted costs; prediction and selection took {plan.select_ms:.1f} ms",
            f"memory: {_mib(plan.packed_bytes)} MiB of packed weights, {_mib(plan.workspace_bytes)} MiB of workspace"
            + ("" if plan.memory_mb is None else f", together at most {plan.memory_mb:g}"),
            f"machine: {plan.machine} ({'calibrated' if plan.calibrated else 'not calibrated'}), "
            f"accuracy {plan.accuracy!r}, select {plan.select!r}",
        ]
        if plan.cuda_graph:
            lines.append(f"CUDA graph: {plan.cuda_graph}")
        unconverted = [layer for layer in plan.layers if layer.primitive == "aten"]
        lines += [f"{layer.name} runs in ATen: {_reasons(layer)}" for layer in unconverted]
        if refused := self.refusals():
            counted = ", ".join(f"{family} {count}" for family, count in refused.most_common())
            lines.append(f"refusals (primitive x layer) by family: {counted}; the reasons are in .layers[i].refusals")
        return lines

    def refusals(self) -> Counter[str]:
        """How often the primitives of each family refused a layer; the family is a primitive's first word."""
        return Counter(name.split("_")[0] for layer in self.layers for name in layer.refusals)

    def __str__(self) -> str:
        from rich.table import Table

        timed = any(layer.measured_ms is not None for layer in self.layers)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
        for head in ("layer", "problem", "primitive", "layouts"):
            table.add_column(head, no_wrap=True)
        for head in ("predicted ms", "90% interval", *(["measured ms"] if timed else [])):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("runner-up", no_wrap=True)
        for head in ("ms", "packed MiB", "workspace MiB"):
            table.add_column(head, justify="right", no_wrap=True)
        for layer in self.layers:
            cells = [
                layer.name,
                layer.problem,
                layer.primitive,
                f"{layer.src_layout} -> {layer.dst_layout}",
                _ms(layer.predicted_ms),
                _interval(layer.interval_ms),
                *([_ms(layer.measured_ms)] if timed else []),
                layer.runner_up or "",
                _ms(layer.runner_up_ms),
                _mib(layer.packed_bytes),
                _mib(layer.workspace_bytes),
            ]
            table.add_row(*cells)
        blocks = [_text(table)]
        if self.transforms:
            moves = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
            for head in ("layout transform of", "before", "shape", "layouts"):
                moves.add_column(head, no_wrap=True)
            moves.add_column("predicted ms", justify="right", no_wrap=True)
            for move in self.transforms:
                shape = "x".join(str(size) for size in move.shape)
                layouts = f"{move.src_layout} -> {move.dst_layout}"
                moves.add_row(move.value, ", ".join(move.consumers), shape, layouts, _ms(move.predicted_ms))
            blocks.append(_text(moves))
        else:
            blocks.append("no layout transforms")
        return "\n\n".join([*blocks, "\n".join(self.summary())])

    def __repr__(self) -> str:
        return f"<Explanation: {len(self.layers)} convolutions, {self.total_predicted_ms:.3f} ms predicted>"


def _text(table: object) -> str:
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=_WIDTH, color_system=None, markup=False, highlight=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(value: tuple[float, float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f}..{value[1]:.3f}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def _reasons(layer: LayerPlan) -> str:
    """The refusals of a layer that no primitive takes, each distinct sentence once."""
    return "; ".join(dict.fromkeys(layer.refusals.values())) or "no primitive was considered"
