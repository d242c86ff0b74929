"""What is wrong in a step of a program is named before it runs."""

from __future__ import annotations

import pytest
import torch

from convselect.graph.program.steps import STEPS
from convselect.machine import cpu
from convselect.primitive import primitives
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

OPS = torch.ops.convselect
PROBLEM = ConvProblem(mb=2, g=1, ic=4, ih=5, iw=6, oc=8, kh=3, kw=3, ph=1, pw=1)
ARENA = 1 << 14
SRC, DST = 2 << 48, 3 << 48  # the only input and output
PACKED = torch.zeros(64 * 1024)
AT = PACKED.data_ptr()


def kernel_of(name: str) -> int:
    (found,) = (k.kernel for k in primitives() if isinstance(k, KernelPrimitive) and k.name == name)
    return found


def fields(kind: str) -> dict[str, int]:
    p = PROBLEM
    activation = {"act": 0, "alpha": 0, "beta": 0}
    windows = {"kh": 3, "kw": 3, "sh": 1, "sw": 1, "ph": 1, "pw": 1, "dh": 1, "dw": 1}
    return {
        "conv": {
            "kernel": kernel_of("direct_nhwc"),
            "mb": p.mb,
            "ic": p.ic,
            "ih": p.ih,
            "iw": p.iw,
            "oc": p.oc,
            "kh": p.kh,
            "kw": p.kw,
            "sh": p.sh,
            "sw": p.sw,
            "ph": p.ph,
            "pw": p.pw,
            "dh": p.dh,
            "dw": p.dw,
            "g": p.g,
            "src": SRC,
            "packed": AT,
            "dst": DST,
            "dst_stride": p.oc,
            "workspace": 1 << 48,
            "bias": AT,
            "residual": 0,
            **activation,
        },
        "to_layout": {"nhwc": 1, "mb": 2, "channels": 4, "pixels": 30, "src": SRC, "dst": DST},
        "scale_shift": {
            "mb": 2,
            "channels": 4,
            "pixels": 30,
            "nhwc": 1,
            "src": SRC,
            "scale": AT,
            "shift": AT,
            "addend": 0,
            "dst": DST,
            "src_stride": 4,
            "dst_stride": 4,
            "scale_stride": 0,
            **activation,
        },
        "linear": {"m": 2, "n": 7, "k": 120, "src": SRC, "weight": AT, "bias": AT, "dst": DST, **activation},
        "pool": {
            "mb": 2,
            "channels": 4,
            "ih": 5,
            "iw": 6,
            "oh": 5,
            "ow": 6,
            **windows,
            "max": 1,
            "include_pad": 0,
            "divisor": 0,
            "src": SRC,
            "dst": DST,
            "dst_stride": 4,
        },
        "upsample": {
            "mb": 2,
            "channels": 4,
            "ih": 5,
            "iw": 6,
            "oh": 10,
            "ow": 6,
            "linear": 1,
            "align_corners": 0,
            "step_h": 0,
            "step_w": 0,
            "src": SRC,
            "dst": DST,
            "dst_stride": 4,
        },
    }[kind]


def verify(kind: str, **changed: int) -> None:
    """A program of one step between an input f32 [2, 4, 5, 6] and an output f32 [2, 8, 5, 6], both in NHWC."""
    step = {**fields(kind), **changed}
    head = [cpu().threads, ARENA, 1, 1, 1, 4, 2, 4, 5, 6, 120, 1, 24, 4, 4, 2, 8, 5, 6, 240, 1, 48, 8]
    OPS.verify(torch.tensor([*head, STEPS.index(kind), len(step) + 2, *step.values()]), [PACKED])


@pytest.mark.parametrize("kind", STEPS)
def test_the_right_step_passes(kind: str) -> None:
    verify(kind)


NAN = 0x7FF8 << 48  # as the bits of a double


WRONG: list[tuple[str, dict[str, int], str]] = [
    ("upsample", {"oh": 0}, "a height or width is 0, must be at least 1"),
    ("upsample", {"iw": 2**31}, "a height or width is 2147483648"),
    ("upsample", {"step_w": NAN}, "a step is -?nan, must be finite"),
    ("upsample", {"ih": 6}, "src, 288 floats from 0 on, is not inside of base 2, which has 240"),
    ("upsample", {"oh": 11}, "dst, 528 floats from 0 on, is not inside of base 3, which has 480"),
    ("upsample", {"dst_stride": 3}, "the stride of dst is 3, must be at least 4"),
    ("conv", {"kernel": 10**6}, "kernel is 1000000, must be below"),
    ("conv", {"kernel": -1}, "kernel is -1"),
    ("conv", {"kernel": kernel_of("pointwise_nhwc")}, "pointwise_nhwc does not take mb2_g1ic4ih5iw6oc8oh5ow6kh3kw3"),
    ("conv", {"kernel": kernel_of("winograd_f2x2_3x3_nhwc"), "sh": 2}, "does not take"),
    ("conv", {"mb": 0}, "mb is 0, must be at least 1"),
    ("conv", {"sw": 0}, "sw is 0, must be at least 1"),
    ("conv", {"ph": -1}, "ph is -1, must be at least 0"),
    ("conv", {"g": 3}, "g is 3, must divide ic=4 and oc=8"),
    ("conv", {"kh": 8}, r"the kernel 8x3 \(dilation 1x1\) does not fit into 5x6 padded by 1x1"),
    ("conv", {"ih": 2**39, "iw": 2**39}, "multiply to more than 2\\^40"),
    ("conv", {"sh": 2**40, "sw": 2**40}, "multiply to more than 2\\^40"),
    ("conv", {"src": SRC + 4}, "src, 240 floats from 1 on, is not inside of base 2, which has 240"),
    ("conv", {"src": 4 << 48}, "the base of src is 4, must be at most 3"),
    ("conv", {"src": SRC + 2}, "src is at byte 2, must be aligned to 4"),
    ("conv", {"packed": AT + 4 * PACKED.numel() - 4}, "packed, .* is in no constant"),
    ("conv", {"packed": 0}, "packed, .* is in no constant"),
    ("conv", {"bias": 8}, "bias, 8 floats at 0x8, is in no constant"),
    ("conv", {"dst": DST + 4}, "dst, 480 floats from 1 on, is not inside of base 3, which has 480"),
    ("conv", {"dst": SRC, "src": DST}, "dst, 480 floats from 0 on, is not inside of base 2"),
    ("conv", {"dst": AT}, "dst is written and at an absolute address"),
    ("conv", {"dst_stride": 7}, "the stride of dst is 7, must be at least 8"),
    ("conv", {"dst_stride": 9}, "dst, .* is not inside of base 3"),
    ("conv", {"workspace": (1 << 48) + 4}, "workspace is at byte 4, must be aligned to 64"),
    ("conv", {"workspace": (1 << 48) + 4 * ARENA}, "workspace, .* is not inside of base 1, which has 16384"),
    ("conv", {"workspace": DST}, "workspace and dst overlap|dst and workspace overlap|workspace, .* is not inside"),
    ("conv", {"dst": 1 << 48, "workspace": 1 << 48}, "dst and workspace overlap"),
    ("conv", {"residual": DST}, "dst and residual overlap"),
    ("conv", {"act": 10}, "activation is 10, must be an index of ACTIVATIONS"),
    ("conv", {"act": 2**32}, "activation is 4294967296"),
    ("to_layout", {"pixels": 31}, "src, 248 floats"),
    ("to_layout", {"mb": 0}, "mb is 0"),
    ("to_layout", {"channels": -4, "pixels": -30}, "channels is -4"),
    ("to_layout", {"dst": SRC}, "dst is written and in base 2, which is an input"),
    ("to_layout", {"src": DST, "dst": DST + 4}, "dst and src overlap"),
    ("scale_shift", {"pixels": 31}, "src, .* is not inside of base 2"),
    ("scale_shift", {"src_stride": 5}, "src, .* is not inside of base 2"),
    ("scale_shift", {"src_stride": 0}, "the stride of src is 0, must be at least 4"),
    ("scale_shift", {"dst_stride": 3}, "the stride of dst is 3, must be at least 4"),
    ("scale_shift", {"dst_stride": -4}, "the stride of dst is -4"),
    ("scale_shift", {"scale_stride": 1}, "the stride of scale is 1, must be at least 4"),
    ("scale_shift", {"scale": AT + 4 * PACKED.numel(), "scale_stride": 4}, "scale, 8 floats at"),
    ("scale_shift", {"shift": 64}, "shift, 4 floats at 0x40, is in no constant"),
    ("scale_shift", {"addend": SRC + 4}, "addend, 240 floats from 1 on, is not inside of base 2"),
    ("scale_shift", {"dst": DST, "src": DST + 4}, "dst and src overlap"),
    ("scale_shift", {"src": DST, "src_stride": 8, "dst": DST + 12, "dst_stride": 8}, "dst and src overlap"),
    ("scale_shift", {"act": -1}, "activation is -1"),
    ("linear", {"m": 0}, "m is 0, must be at least 1"),
    ("linear", {"m": 3}, "src, 360 floats from 0 on, is not inside of base 2"),
    ("linear", {"n": 600, "weight": AT}, "dst, 1200 floats|weight, 72000 floats"),
    ("linear", {"k": 2**39, "n": 2**39}, "multiply to more than 2\\^40"),
    ("linear", {"bias": SRC + 4 * 234}, "bias, 7 floats from 234 on, is not inside of base 2"),
    ("linear", {"act": 11}, "activation is 11"),
    ("pool", {"iw": 7}, "src, 280 floats from 0 on, is not inside of base 2"),
    ("pool", {"kh": 0}, "kh is 0, must be at least 1"),
    ("pool", {"ph": 3}, "a window lies outside of src: ih is 5, with 5 windows of 3, stride 1, padding 3"),
    ("pool", {"oh": 7}, "a window lies outside of src: ih is 5, with 7 windows of 3, stride 1, padding 1"),
    ("pool", {"divisor": -1}, "divisor is -1, must be at least 0"),
    ("pool", {"dst_stride": 2}, "the stride of dst is 2, must be at least 4"),
    ("pool", {"dst": DST + 4 * 241 + 4 * 120}, "dst, 240 floats from 361 on, is not inside of base 3"),
]


def name(x: str | dict[str, int]) -> str:
    """Without addresses, which differ from process to process."""
    return x[:60] if isinstance(x, str) else ",".join(x)


@pytest.mark.parametrize(("kind", "changed", "message"), WRONG, ids=name)
def test_a_wrong_step_is_named(kind: str, changed: dict[str, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"step 0 \({kind}\): .*({message})"):
        verify(kind, **changed)


def test_channels_of_one_tensor_may_be_read_and_written_side_by_side() -> None:
    verify("scale_shift", src=DST, src_stride=8, dst=DST + 16, dst_stride=8)
    verify("scale_shift", src=DST, dst=DST)
    verify("scale_shift", src=DST, src_stride=8, dst=DST, dst_stride=8)


def test_what_is_read_may_be_an_input_or_the_arena_too() -> None:
    verify("linear", src=1 << 48, weight=1 << 48, bias=SRC)
    verify("conv", residual=(1 << 48) + 4 * (ARENA - 480))
