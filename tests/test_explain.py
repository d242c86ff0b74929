"""`Explanation`: the text, the JSON and the page hold what the plan holds."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from convselect.plan.explanation import Explanation
from convselect.plan.page import order
from convselect.plan.plan import LayerPlan, OperatorPlan, Plan, TransformPlan, merged
from convselect.problem import ConvProblem


def layer(name: str, problem: ConvProblem, primitive: str, src: str, dst: str, ms: float) -> LayerPlan:
    return LayerPlan(
        name,
        str(problem),
        primitive,
        primitive.split("_")[0],
        src,
        dst,
        "relu",
        name.endswith("conv2"),
        ms,
        "onednn_nhwc",
        1.3 * ms,
        4096,
        65536,
        {"pointwise_nhwc": "only 1x1 kernels are supported (kh=3, kw=3)"},
        interval_ms=(0.8 * ms, 1.25 * ms),
    )


def resnet_like(measured: bool) -> Plan:
    """A stem, four stages of two residual blocks, one stage in the other layout, and one layer that nothing takes."""
    stem = ConvProblem(ic=3, ih=224, iw=224, oc=64, kh=7, kw=7, sh=2, sw=2, ph=3, pw=3)
    layers = [layer("conv1", stem, "im2col_nchw", "nchw", "nhwc", 0.9)]
    operators, edges, transforms = (
        [OperatorPlan("maxpool", "aten.max_pool2d", "nhwc", 0.11)],
        [("conv1", "maxpool")],
        [],
    )
    last = "maxpool"
    for stage in range(4):
        size, channels = 56 >> stage, 64 << stage
        layout = "nchw" if stage == 2 else "nhwc"
        for block in range(2):
            first, second, add = (f"layer{stage + 1}.{block}.{part}" for part in ("conv1", "conv2", "add"))
            problem = ConvProblem(ic=channels, ih=size, iw=size, oc=channels, kh=3, kw=3, ph=1, pw=1)
            layers += [
                layer(first, problem, f"winograd_f4x4_3x3_{layout}", layout, layout, 0.31 + 0.05 * stage),
                layer(second, problem, f"winograd_f4x4_3x3_{layout}", layout, layout, 0.36 + 0.02 * stage),
            ]
            operators.append(OperatorPlan(add, "aten.add", layout, 0.02))
            edges += [(last, first), (first, second), (second, add), (last, add)]
            if block == 0 and stage in (2, 3):
                other = "nhwc" if layout == "nchw" else "nchw"
                transforms.append(TransformPlan(last, (first, add), (1, channels, size, size), other, layout, 0.03))
            last = add
    layers.append(
        LayerPlan(
            "up",
            "",
            "aten",
            "aten",
            "nchw",
            "nchw",
            "identity",
            False,
            None,
            None,
            None,
            0,
            0,
            {"direct_nhwc": "transposed convolutions are not supported"},
        )
    )
    if measured:
        layers = [dataclasses.replace(x, measured_ms=(x.predicted_ms or 0.05) * 1.1) for x in layers]
    total = sum(x.predicted_ms or 0 for x in (*layers, *operators, *transforms))
    return Plan(
        "a processor <& co>, avx512, 2 of 2 cores",
        "0123456789abcdef",
        "default",
        "model",
        True,
        tuple(layers),
        tuple(transforms),
        tuple(operators),
        total,
        0.0,
        12.5,
        tuple(edges),
    )


@pytest.fixture(params=[False, True], ids=["predicted", "measured"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return resnet_like(request.param)


def test_text_has_a_line_for_each_layer_and_transform(plan: Plan) -> None:
    explanation = Explanation(plan)
    lines = str(explanation).splitlines()
    for entry in plan.layers:
        (line,) = [line for line in lines if line.startswith(entry.name + " ") and "runs in" not in line]
        assert entry.primitive in line
        assert entry.problem in line
        if entry.predicted_ms is not None:
            assert f"{entry.predicted_ms:.3f}" in line
        if entry.interval_ms is not None:
            assert "{:.3f}..{:.3f}".format(*entry.interval_ms) in line
    for move in plan.transforms:
        assert any(line.startswith(move.value) and "layer" in line and move.dst_layout in line for line in lines)
    assert ("measured ms" in lines[0]) == (plan.layers[0].measured_ms is not None)


def test_text_columns_are_aligned(plan: Plan) -> None:
    head, *rows = str(Explanation(plan)).split("\n\n")[0].splitlines()
    assert len(rows) == len(plan.layers)
    at = head.index("primitive")
    assert all(row[at : at + len(x.primitive)] == x.primitive for row, x in zip(rows, plan.layers, strict=True))


def test_summary_says_what_runs_in_aten_and_why(plan: Plan) -> None:
    assert "up runs in ATen: transposed convolutions are not supported" in Explanation(plan).summary()


def test_totals(plan: Plan) -> None:
    explanation = Explanation(plan)
    assert explanation.total_predicted_ms == plan.total_predicted_ms
    assert explanation.layers == plan.layers
    assert explanation.transforms == plan.transforms
    measured = explanation.layers_measured_ms
    assert (measured is None) == (plan.layers[0].measured_ms is None)


def test_json_holds_the_plan(plan: Plan) -> None:
    data = json.loads(Explanation(plan).to_json())
    assert data.keys() == {field.name for field in dataclasses.fields(Plan)}
    for written, layer in zip(data["layers"], plan.layers, strict=True):
        interval = None if layer.interval_ms is None else list(layer.interval_ms)
        assert written == vars(layer) | {"interval_ms": interval}
    assert [transform["shape"] for transform in data["transforms"]] == [list(t.shape) for t in plan.transforms]


def test_a_plan_of_several_graphs_says_what_each_runs_on(plan: Plan) -> None:
    """Of those with convolutions: others are planned for the processor."""
    first = dataclasses.replace(plan, machine="a GPU", fingerprint="1", cuda_graph="captured")
    empty = dataclasses.replace(plan, layers=(), machine="a processor", cuda_graph="")
    second = dataclasses.replace(first, cuda_graph="none, as bernoulli draws random numbers")
    whole = merged([empty, first, second, first])
    assert (whole.machine, whole.fingerprint) == ("a GPU", "1")
    assert whole.cuda_graph == "captured; none, as bernoulli draws random numbers"
    assert len(whole.layers) == 3 * len(plan.layers)
    assert whole.total_predicted_ms == pytest.approx(3 * plan.total_predicted_ms)


def test_order_puts_producers_first() -> None:
    plan = resnet_like(False)
    place = {name: index for index, name in enumerate(order(plan))}
    assert len(place) == len(plan.layers) + len(plan.operators)
    assert all(place[producer] < place[consumer] for producer, consumer in plan.edges)


class _Page(HTMLParser):
    """Counts elements and keeps every address that the page would load."""

    void = ("meta", "line", "rect", "path", "br")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.rows = self.titles = 0
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.titles += tag == "title"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.void

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_page_is_whole_and_self_contained(plan: Plan, tmp_path: Path) -> None:
    Explanation(plan, "resnet<18>").to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.stack == []
    assert page.addresses == []
    assert "url(" not in text
    assert "@import" not in text
    assert page.rows == 2 + len(plan.layers) + len(plan.transforms)
    assert page.titles == 1 + 2 * len(plan.layers) + len(plan.operators) + len(plan.transforms)
    assert "resnet&lt;18&gt;" in text
    assert "a processor &lt;&amp; co&gt;" in text


def test_empty_plan(tmp_path: Path) -> None:
    plan = Plan("a machine", "0" * 16, "default", "model", False, (), (), (), 0.0, 0.0, 0.1)
    explanation = Explanation(plan)
    explanation.to_html(tmp_path / "page.html")
    assert "0 convolutions" in str(explanation)
    assert explanation.layers_measured_ms is None


def test_summary_states_the_gap(plan: Plan) -> None:
    assert any("the least possible under" in line for line in Explanation(plan).summary())
    unproven = dataclasses.replace(plan, gap_ms=0.00012)
    assert any("at most 0.00012 ms above the least possible" in line for line in Explanation(unproven).summary())
