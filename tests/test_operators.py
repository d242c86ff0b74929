"""`torch.ops.convselect.*` as operators: schemas, fake results, and what they say about tensors they cannot take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import CORNERS, MACHINE, RANDOM

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect.layout import Layout
from convselect.machine import cpu
from convselect.primitive import get, primitives
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

OPS = torch.ops.convselect
PROBLEM = ConvProblem(mb=2, ic=4, ih=9, iw=8, oc=6, kh=3, kw=3, ph=1, pw=1)


def one_of_each_layout() -> list[KernelPrimitive]:
    found = {
        (k.src_layout, k.dst_layout): k
        for k in primitives()
        if isinstance(k, KernelPrimitive) and k.refusal(PROBLEM, None) is None
    }
    return list(found.values())


def arguments(primitive: KernelPrimitive, src: torch.Tensor) -> tuple:
    packed = primitive.prepack(PROBLEM, torch.randn(6, 4, 3, 3))
    return src, packed, torch.randn(6), None, primitive.kernel, PROBLEM.geometry, 1, 0.0, 0.0


def source(layout: Layout, mb: int = 2) -> torch.Tensor:
    return torch.randn(mb, 4, 9, 8).contiguous(memory_format=layout.memory_format)


@pytest.mark.parametrize("primitive", one_of_each_layout(), ids=lambda k: k.name)
@pytest.mark.parametrize("mb", [2, 1, 0])
def test_opcheck_of_conv(primitive: KernelPrimitive, mb: int) -> None:
    args = arguments(primitive, source(primitive.src_layout, mb))
    torch.library.opcheck(OPS.conv.default, args)
    dst = torch.empty(mb, 6, 9, 8).contiguous(memory_format=primitive.dst_layout.memory_format)
    workspace = torch.empty(primitive.workspace_bytes(PROBLEM, cpu()) // 4)
    torch.library.opcheck(OPS.conv_out.default, (dst, workspace, *args))


@pytest.mark.parametrize("primitive", one_of_each_layout(), ids=lambda k: k.name)
def test_opcheck_of_pack(primitive: KernelPrimitive) -> None:
    weight = torch.randn(6, 4, 3, 3)
    torch.library.opcheck(OPS.pack.default, (weight, primitive.kernel, [2, 4, 9, 8], PROBLEM.geometry))


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (0, 3, 4, 5), (1, 40, 7, 9), (2, 1, 3, 3), (2, 5, 1, 1)])
def test_opcheck_of_to_layout(nhwc: bool, size: tuple[int, ...]) -> None:
    src = torch.randn(size).contiguous(memory_format=(Layout.NCHW if nhwc else Layout.NHWC).memory_format)
    torch.library.opcheck(OPS.to_layout.default, (src, nhwc))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16, 17, 33, 64])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 13), (16, 16), (31, 33)])
def test_to_layout_keeps_the_values(channels: int, size: tuple[int, int]) -> None:
    src = torch.randn(2, channels, *size)
    there = OPS.to_layout(src, True)
    assert torch.equal(there, src)
    assert there.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(OPS.to_layout(there, False), src)


@pytest.mark.parametrize("primitive", one_of_each_layout(), ids=lambda k: k.name)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: torch.cat([x, x], 2)[:, :, ::2],
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=["sliced", "expanded", "transposed"],
)
def test_a_tensor_that_is_not_dense_is_copied(primitive: KernelPrimitive, spoil) -> None:
    """Traced strides, which lowering goes by, are not always those that ATen's operators give."""
    src, *rest = arguments(primitive, source(primitive.src_layout))
    sparse = spoil(src)
    dense = sparse.clone(memory_format=primitive.src_layout.memory_format)
    assert torch.equal(OPS.conv(sparse, *rest), OPS.conv(dense, *rest))


@pytest.mark.parametrize("primitive", one_of_each_layout(), ids=lambda k: k.name)
def test_invalid_arguments_are_named(primitive: KernelPrimitive) -> None:
    src, packed, bias, *rest = arguments(primitive, source(primitive.src_layout))
    for message, bad in {
        "src must be a float32 tensor": (src.double(), packed, bias),
        "packed has": (src, packed[..., :-1], bias),
        "bias must be contiguous": (src, packed, bias[:-1]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            OPS.conv(*bad, *rest)


def calls() -> dict[str, tuple[torch._ops.OpOverload, dict[str, object]]]:
    """Each operator that takes tensors, with arguments it accepts, by name."""
    direct = get("direct_nhwc")
    geometry, sizes = PROBLEM.geometry, [2, 4, 9, 8]
    nhwc = source(Layout.NHWC)
    end = {"activation": 1, "alpha": 0.0, "beta": 0.0}
    convolution = {
        "src": nhwc,
        "packed": direct.prepack(PROBLEM, torch.randn(6, 4, 3, 3)),
        "bias": torch.randn(6),
        "residual": torch.randn(2, 6, 9, 8).contiguous(memory_format=torch.channels_last),
        "kernel": direct.kernel,
        "geometry": geometry,
        **end,
    }
    dst = torch.empty(2, 6, 9, 8).contiguous(memory_format=torch.channels_last)
    workspace = torch.empty(direct.workspace_bytes(PROBLEM, cpu()) // 4)
    words = [torch.get_num_threads(), 16, 1, 0, 0, 4, *nhwc.shape, *nhwc.stride()]
    return {
        "conv": (OPS.conv.default, convolution),
        "conv_out": (OPS.conv_out.default, {"dst": dst, "workspace": workspace, **convolution}),
        "pack": (
            OPS.pack.default,
            {"weight": torch.randn(6, 4, 3, 3), "kernel": direct.kernel, "sizes": sizes, "geometry": geometry},
        ),
        "to_layout": (OPS.to_layout.default, {"src": nhwc, "nhwc": False}),
        "scale_shift": (
            OPS.scale_shift.default,
            {"src": nhwc, "scale": torch.randn(4), "shift": torch.randn(4), **end},
        ),
        "linear": (
            OPS.linear.default,
            {"src": torch.randn(2, 5), "weight": torch.randn(7, 5), "bias": torch.randn(7), **end},
        ),
        "pool2d": (
            OPS.pool2d.default,
            {"src": nhwc, "geometry": [3, 3, 2, 2, 1, 1, 1, 1, 5, 4], "max": True, "include_pad": False, "divisor": 0},
        ),
        "upsample2d": (
            OPS.upsample2d.default,
            {"src": nhwc, "size": [12, 12], "linear": True, "align_corners": False, "scale_h": None, "scale_w": None},
        ),
        "run": (
            OPS.run.default,
            {
                "program": torch.tensor(words),
                "arena": torch.empty(16),
                "inputs": [nhwc],
                "nanoseconds": torch.zeros(1, dtype=torch.int64),
            },
        ),
        "verify": (OPS.verify.default, {"program": torch.tensor(words), "constants": [torch.randn(3)]}),
        "fingerprint": (OPS.fingerprint.default, {"table": torch.zeros(0, 2, dtype=torch.int64)}),
    }


TENSORS = [
    (operator, name)
    for operator, (_, arguments) in calls().items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor) or (isinstance(value, list) and isinstance(value[0], torch.Tensor))
]


def gone(x: torch.Tensor) -> torch.Tensor:
    """A view of memory that was given back since."""
    x = x.clone()
    x.untyped_storage().resize_(max(x.nbytes - 4, 0))
    return x


def sparse(x: torch.Tensor) -> torch.Tensor:
    """The same values, with a gap after each."""
    return torch.stack([x, x], -1)[..., 0]


def shorter(x: torch.Tensor) -> torch.Tensor:
    return x[..., : x.shape[-1] - 1] if x.dim() != 4 else x[:, :, :-1].clone(memory_format=torch.preserve_format)


@pytest.mark.parametrize("operator", calls())
def test_right_arguments_are_taken(operator: str) -> None:
    function, arguments = calls()[operator]
    function(*arguments.values())


@pytest.mark.parametrize(("operator", "name"), TENSORS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (torch.Tensor.double, r"must be an? (float32|int64) tensor on the CPU|must be a contiguous"),
        (torch.Tensor.to_sparse, r"must be an? (float32|int64) tensor on the CPU|Could not run"),
        (gone, r"has \d+ elements from 0 on in a storage of \d+ bytes"),
        (sparse, r"must be (a )?(dense|contiguous)|side by side"),
        (shorter, r"has size|has \d+|must have|must be contiguous|must be a contiguous|ends within"),
    ],
    ids=["dtype", "layout", "storage", "strides", "size"],
)
def test_a_wrong_tensor_is_named(operator: str, name: str, spoil: Callable, message: str) -> None:
    """Whatever is wrong with it; but a shorter src of an operator that takes any is another right one."""
    function, arguments = calls()[operator]
    value = arguments[name]
    tensor = value[0] if isinstance(value, list) else value
    any_size = (operator, name) in {
        ("to_layout", "src"),
        ("scale_shift", "src"),
        ("pool2d", "src"),
        ("upsample2d", "src"),
        ("verify", "constants"),
        ("run", "nanoseconds"),
    }
    is_copied = name in ("src", "residual", "inputs") or operator in ("run", "pack")
    if tensor.numel() == 0 or (spoil is shorter and any_size) or (spoil is sparse and is_copied):
        pytest.skip("it would be right")
    wrong = [spoil(tensor)] if isinstance(value, list) else spoil(tensor)
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        function(*{**arguments, name: wrong}.values())


@pytest.mark.parametrize(
    ("operator", "name"), [*((o, n) for o, n in TENSORS if n in ("src", "residual")), ("pack", "weight")]
)
def test_gaps_in_a_tensor_are_skipped(operator: str, name: str) -> None:
    function, arguments = calls()[operator]
    results = []
    for value in (arguments[name], sparse(arguments[name])):
        arguments = {**arguments, name: value}
        result = function(*arguments.values())
        results.append(arguments["dst"].clone() if operator == "conv_out" else result)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("operator", "changed", "message"),
    [
        ("conv", {"kernel": 10**6}, "kernel is 1000000, must be below"),
        ("conv", {"geometry": [6, 3, 3]}, "geometry has 3 numbers, must have 10"),
        ("conv", {"geometry": [6, 3, 3, 0, 1, 1, 1, 1, 1, 1]}, "sh is 0, must be at least 1"),
        ("conv", {"geometry": [6, 3, 3, 1, 1, -1, 1, 1, 1, 1]}, "ph is -1, must be at least 0"),
        ("conv", {"geometry": [6, 3, 3, 1, 1, 1, 1, 2**62, 1, 1]}, "dh is .*, must be at least 1 and at most 2\\^40"),
        ("conv", {"geometry": [6, 12, 3, 1, 1, 1, 1, 1, 1, 1]}, "does not fit into 9x8 padded by 1x1"),
        ("conv", {"geometry": [6, 3, 3, 1, 1, 1, 1, 1, 1, 3]}, "g is 3, must divide ic=4 and oc=6"),
        ("conv", {"activation": 10}, "activation is 10, must be an index of ACTIVATIONS"),
        ("pack", {"sizes": [2**39, 4, 2**39, 8]}, "sizes multiply to more than 2\\^40"),
        ("pack", {"kernel": get("pointwise_nhwc").kernel}, "pointwise_nhwc does not take mb2_g1ic4ih9iw8oc6oh9ow8kh3"),
        ("pool2d", {"geometry": [3, 3, 2, 2, 3, 1, 1, 1, 5, 4]}, "a window lies outside of src: ih is 9"),
        ("pool2d", {"geometry": [3, 3, 2, 2, 1, 1, 1, 1, 5, 6]}, "a window lies outside of src: iw is 8"),
        ("pool2d", {"geometry": [3, 0, 2, 2, 1, 1, 1, 1, 5, 4]}, "kw is 0, must be at least 1"),
        ("pool2d", {"divisor": -1}, "divisor is -1, must be at least 0"),
    ],
)
def test_a_wrong_number_is_named(operator: str, changed: dict[str, object], message: str) -> None:
    function, arguments = calls()[operator]
    with pytest.raises(RuntimeError, match=message):
        function(*{**arguments, **changed}.values())


def test_what_is_written_must_lie_apart() -> None:
    """Some kernels keep pointers in the workspace."""
    function, arguments = calls()["conv_out"]
    with pytest.raises(RuntimeError, match="dst and residual overlap"):
        function(*{**arguments, "residual": arguments["dst"]}.values())
    for name in ("dst", "src", "packed", "bias", "residual"):
        value = arguments[name]
        inside = arguments["workspace"][: value.numel()].as_strided(value.shape, value.stride())
        with pytest.raises(RuntimeError, match=f"workspace and {name} overlap"):
            function(*{**arguments, name: inside}.values())


def test_a_kernel_takes_what_its_primitive_does_not_refuse() -> None:
    """The rules stand in the kernels, for safety, and in the primitives, with the reasons."""
    kernels = [k for k in primitives() if isinstance(k, KernelPrimitive)]
    for p in CORNERS + RANDOM[::20]:
        for kernel in kernels:
            if kernel.refusal(p, MACHINE) is None:
                assert kernel.packed_bytes(p, MACHINE) > 0
            else:
                with pytest.raises(RuntimeError, match=f"{kernel.name} does not take {p}"):
                    kernel.packed_bytes(p, MACHINE)
