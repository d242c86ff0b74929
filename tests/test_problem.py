"""`ConvProblem`: its grammar both ways, and what it refuses to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from convselect.problem import ConvProblem

EXAMPLE = ConvProblem(ic=64, ih=56, iw=56, oc=64, kh=3, kw=3, ph=1, pw=1)
TEXT = "mb1_g1ic64ih56iw56oc64oh56ow56kh3kw3sh1sw1ph1pw1dh1dw1"


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    """Any problem whose kernel fits, a 4096th of an exabyte and more included."""
    size = st.integers(1, 1 << 20)
    small = st.integers(1, 12)
    groups = draw(small)
    sizes = {
        "mb": draw(size),
        "g": groups,
        "ic": groups * draw(size),
        "ih": draw(size),
        "iw": draw(size),
        "oc": groups * draw(size),
        "kh": draw(small),
        "kw": draw(small),
        "sh": draw(small),
        "sw": draw(small),
        "ph": draw(st.integers(0, 12)),
        "pw": draw(st.integers(0, 12)),
        "dh": draw(small),
        "dw": draw(small),
    }
    assume(sizes["dh"] * (sizes["kh"] - 1) < sizes["ih"] + 2 * sizes["ph"])
    assume(sizes["dw"] * (sizes["kw"] - 1) < sizes["iw"] + 2 * sizes["pw"])
    return ConvProblem(**sizes)


@given(problems())
def test_parse_inverts_str(problem: ConvProblem) -> None:
    assert ConvProblem.parse(str(problem)) == problem


@given(st.text())
def test_any_other_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="is not a problem"):
        ConvProblem.parse(text)


def test_grammar_is_fixed() -> None:
    assert str(EXAMPLE) == TEXT
    assert ConvProblem.parse(TEXT) == EXAMPLE


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_output_size_is_torchs(ih: int, iw: int, kh: int, kw: int, stride: int, padding: int, dilation: int) -> None:
    assume(dilation * (kh - 1) < ih + 2 * padding)
    assume(dilation * (kw - 1) < iw + 2 * padding)
    steps = {"sh": stride, "sw": stride, "ph": padding, "pw": padding, "dh": dilation, "dw": dilation}
    p = ConvProblem(mb=2, ic=3, ih=ih, iw=iw, oc=5, kh=kh, kw=kw, **steps)
    layer = torch.nn.Conv2d(3, 5, (kh, kw), stride, padding, dilation, device="meta")
    assert layer(torch.empty(2, 3, ih, iw, device="meta")).shape == (2, 5, p.oh, p.ow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mb": 0}, "mb is 0, must be an integer of at least 1"),
        ({"ph": -1}, "ph is -1, must be an integer of at least 0"),
        ({"sh": 1.0}, "sh is 1.0, must be an integer"),
        ({"g": 3}, "g is 3, must divide ic=64 and oc=64"),
        ({"kh": 60}, "the kernel 60x3 .* does not fit into 56x56"),
    ],
)
def test_impossible_problems(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(EXAMPLE, **change)


def test_sizes_go_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        ConvProblem(1, 1, 64, 56, 56, 64, 3, 3)  # type: ignore[misc]


def test_contradicting_text() -> None:
    with pytest.raises(ValueError, match="gives the output 55x56, but its geometry gives 56x56"):
        ConvProblem.parse(TEXT.replace("oh56", "oh55"))


def test_sizes() -> None:
    assert EXAMPLE.flops == 2 * 64 * 64 * 9 * 56 * 56
    assert EXAMPLE.src_bytes == EXAMPLE.dst_bytes == 4 * 64 * 56 * 56
    assert EXAMPLE.weight_bytes == 4 * 64 * 64 * 9
    assert EXAMPLE.with_batch(7).mb == 7
    assert not EXAMPLE.is_depthwise
    assert replace(EXAMPLE, g=64).is_depthwise
