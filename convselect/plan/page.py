"""The page of an `Explanation`: where everything is drawn; how it looks is the template's business."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from convselect.plan.plan import LayerPlan, Plan

BAR_HEIGHT = 190
ARC_HEIGHT = 84
_WIDTH = 1290
"""Pixels that a picture fills; a long network takes more, and scrolls."""


@dataclass(frozen=True)
class Bar:
    """A layer of the bar chart. Heights in pixels above the axis; None where unknown."""

    x: float
    layout: str
    predicted: float | None
    interval: tuple[float, float] | None
    measured: float | None
    runner_up: float | None
    caption: str


@dataclass(frozen=True)
class Node:
    """A layer or operator of the layout ribbon; `src` and `dst` are layouts."""

    x: float
    name: str
    kind: str
    src: str
    dst: str
    caption: str


@dataclass(frozen=True)
class Arc:
    """An edge between nodes of the ribbon that are not neighbours."""

    path: str
    layout: str


@dataclass(frozen=True)
class Move:
    """A layout transform in the ribbon, before the node at `x`."""

    x: float
    src: str
    dst: str
    caption: str


@dataclass(frozen=True)
class Tick:
    y: float
    label: str


def page(plan: Plan, title: str, summary: list[str], predicted_ms: float, measured_ms: float | None) -> str:
    """The HTML page, complete in itself. `predicted_ms` and `measured_ms` are sums over the convolutions."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("convselect", "plan"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    bar_step = _step(len(plan.layers), 16, 60)
    node_step = _step(len(plan.layers) + len(plan.operators), 18, 48)
    bars, ticks = _bars(plan, bar_step)
    nodes, arcs, moves = _ribbon(plan, node_step)
    families: dict[str, float] = {}
    for layer in plan.layers:
        families[layer.family] = families.get(layer.family, 0.0) + (layer.predicted_ms or 0.0)
    return environment.get_template("explain.html").render(
        title=title,
        plan=plan,
        summary=summary,
        bars=bars,
        ticks=ticks,
        bar_step=bar_step,
        bar_height=BAR_HEIGHT,
        bars_width=max(len(bars) * bar_step, 1),
        nodes=nodes,
        arcs=arcs,
        moves=moves,
        node_step=node_step,
        ribbon_width=max(len(nodes) * node_step, 1),
        arc_height=ARC_HEIGHT,
        measured_ms=measured_ms,
        layers_ms=predicted_ms,
        families=sorted(families.items(), key=lambda item: -item[1]),
    )


def _bars(plan: Plan, step_x: int) -> tuple[list[Bar], list[Tick]]:
    times = [
        ms
        for layer in plan.layers
        for ms in (layer.predicted_ms, layer.measured_ms, layer.runner_up_ms)
        if ms is not None
    ]
    # The runner-up may be far off the scale of what was chosen; it is cut off at the top.
    chosen = [ms for layer in plan.layers for ms in (layer.predicted_ms, layer.measured_ms) if ms is not None]
    step = _nice(max(chosen or times or [1.0]) / 4)
    top = step * math.ceil(max(chosen or [1.0]) / step + 1e-9)
    ticks = [Tick(BAR_HEIGHT * (1 - k * step / top), f"{k * step:g}") for k in range(round(top / step) + 1)]

    def scaled(ms: float) -> float:
        return round(BAR_HEIGHT * min(ms / top, 1.0), 2)

    def height(ms: float | None) -> float | None:
        return None if ms is None else scaled(ms)

    bars = [
        Bar(
            x=index * step_x,
            layout=layer.dst_layout,
            predicted=height(layer.predicted_ms),
            interval=layer.interval_ms and (scaled(layer.interval_ms[0]), scaled(layer.interval_ms[1])),
            measured=height(layer.measured_ms),
            runner_up=height(layer.runner_up_ms),
            caption=_caption(layer),
        )
        for index, layer in enumerate(plan.layers)
    ]
    return bars, ticks


def _caption(layer: LayerPlan) -> str:
    lines = [layer.name, layer.problem, f"{layer.primitive}, {layer.src_layout} -> {layer.dst_layout}"]
    for label, ms in (("predicted", layer.predicted_ms), ("measured", layer.measured_ms)):
        if ms is not None:
            lines.append(f"{label} {ms:.3f} ms")
    if layer.interval_ms is not None:
        lines.append(f"90% interval {layer.interval_ms[0]:.3f} to {layer.interval_ms[1]:.3f} ms")
    if layer.runner_up is not None and layer.runner_up_ms is not None:
        lines.append(f"runner-up {layer.runner_up}, {layer.runner_up_ms:.3f} ms")
    return "\n".join(line for line in lines if line)


def _step(count: int, least: int, most: int) -> int:
    """Horizontal distance of `count` things, in pixels."""
    return min(max(_WIDTH // max(count, 1), least), most)


def _nice(value: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is at least `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= value * (1 - 1e-9))


def order(plan: Plan) -> list[str]:
    """Names of layers and operators so that producers come before consumers: layers in the plan's order, each operator
    right after the last thing it reads. Without edges: layers, then operators. Names on a cycle come last.
    """
    rank = {layer.name: index for index, layer in enumerate(plan.layers)}
    names = list(dict.fromkeys([*rank, *(operator.name for operator in plan.operators)]))
    consumers: dict[str, list[str]] = {name: [] for name in names}
    waiting = dict.fromkeys(names, 0)
    for producer, consumer in plan.edges:
        if producer in consumers and consumer in consumers:
            consumers[producer].append(consumer)
            waiting[consumer] += 1
    end = len(rank)
    ready = [(rank.get(name, end), index, name) for index, name in enumerate(names) if waiting[name] == 0]
    heapq.heapify(ready)
    done: list[str] = []
    while ready:
        key, _, name = heapq.heappop(ready)
        done.append(name)
        for consumer in consumers[name]:
            waiting[consumer] -= 1
            if waiting[consumer] == 0:
                heapq.heappush(ready, (rank.get(consumer, key), len(names) + len(done), consumer))
    placed = set(done)
    return done + [name for name in names if name not in placed]


def _ribbon(plan: Plan, step: int) -> tuple[list[Node], list[Arc], list[Move]]:
    layers = {layer.name: layer for layer in plan.layers}
    operators = {operator.name: operator for operator in plan.operators}
    place = {name: index for index, name in enumerate(order(plan))}
    nodes = []
    for name, index in place.items():
        x = index * step
        if name in layers:
            layer = layers[name]
            nodes.append(Node(x, name, layer.family, layer.src_layout, layer.dst_layout, _caption(layer)))
        else:
            operator = operators[name]
            caption = f"{name}\n{operator.operator}, {operator.layout}\npredicted {operator.predicted_ms:.3f} ms"
            nodes.append(Node(x, name, "operator", operator.layout, operator.layout, caption))
    layout = {node.name: node.dst for node in nodes}
    arcs = []
    for producer, consumer in plan.edges:
        if producer not in place or consumer not in place or place[consumer] - place[producer] < 2:
            continue
        start = (place[producer] + 0.5) * step
        end = (place[consumer] + 0.5) * step
        rise = min(ARC_HEIGHT - 8.0, 14 + 0.5 * (end - start))
        top = ARC_HEIGHT - rise
        path = f"M{start:g} {ARC_HEIGHT} C{start:g} {top:g} {end:g} {top:g} {end:g} {ARC_HEIGHT}"
        arcs.append(Arc(path, layout[producer]))
    moves = []
    for move in plan.transforms:
        at = [place[name] for name in move.consumers if name in place]
        index = min(at) if at else place.get(move.value, -1) + 1
        shape = "x".join(str(size) for size in move.shape)
        caption = (
            f"transform of {move.value} before {', '.join(move.consumers)}\n{shape}, {move.src_layout} -> "
            f"{move.dst_layout}\npredicted {move.predicted_ms:.3f} ms"
        )
        moves.append(Move(index * step, move.src_layout, move.dst_layout, caption))
    return nodes, arcs, moves
