"""Rates of single primitives: the packed GEMM against torch's, and Winograd against oneDNN, interleaved.

    python benchmarks/primitives.py [--threads 2] [--rounds 15]

writes benchmarks/PRIMITIVES.md. A rate is the direct algorithm's FLOPs over the least time, so Winograd's may pass the
machine's peak. Caches are warm; sources, weights and results are as large as the problem says.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import click
import torch

import convselect  # noqa: F401  (fills the registry)
from convselect import machine
from convselect.primitive import IDENTITY, get
from convselect.problem import ConvProblem
from convselect.timing import interleaved

WINOGRAD = ("winograd_f4x4_3x3_nhwc", "winograd_f4x4_3x3_staged_nhwc", "winograd_f2x2_3x3_staged_nhwc")
SHAPES_3X3 = ((64, 224), (128, 56), (64, 56), (128, 28), (256, 14), (512, 7), (256, 56), (512, 28))
"""(channels in and out, pixels along a side)."""
GEMM = ((4096, 1024, 1024), (3136, 256, 64), (784, 512, 128), (196, 1024, 256), (49, 2048, 512))
"""(pixels, ic, oc) of a 1x1 convolution: rows, depth and columns of the product."""


def rates(problem: ConvProblem, names: tuple[str, ...], rounds: int) -> list[float]:
    """GFLOP/s of each primitive."""
    runs = []
    weight = torch.randn(problem.oc, problem.ic, problem.kh, problem.kw)
    for primitive in map(get, names):
        layout = primitive.src_layout.memory_format
        src = torch.randn(problem.mb, problem.ic, problem.ih, problem.iw).contiguous(memory_format=layout)
        packed = primitive.prepack(problem, weight)
        runs.append(lambda p=primitive, s=src, w=packed: p.run(problem, IDENTITY, s, w, None, None))
    interleaved(runs, rounds=3)
    return [problem.flops / ms * 1e-6 for ms in interleaved(runs, rounds=rounds).min(axis=0)]


def large_matrix_rate(rounds: int, size: int = 2048) -> float:
    """GFLOP/s of torch.mm on square matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / interleaved([lambda: a @ b], rounds=rounds)[1:].min() * 1e-6


@click.command(help=__doc__)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@torch.inference_mode()
def main(threads: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    peak = large_matrix_rate(rounds)
    lines = [
        "# Primitives",
        "",
        f"- machine: {machine.cpu()}; torch {torch.__version__}; {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"- command: `python benchmarks/primitives.py --threads {threads} --rounds {rounds}`",
        f"- torch.mm of 2048 x 2048 matrices: {peak:.0f} GFLOP/s",
        "",
        "| 1x1, pixels x ic -> oc | pointwise_nhwc GFLOP/s | onednn_nhwc | of torch.mm's large-matrix rate |",
        "| --- | ---: | ---: | ---: |",
    ]
    for pixels, ic, oc in GEMM:
        ours, onednn = rates(ConvProblem(1, 1, ic, 1, pixels, oc, 1, 1), ("pointwise_nhwc", "onednn_nhwc"), rounds)
        lines.append(f"| {pixels} x {ic} -> {oc} | {ours:.0f} | {onednn:.0f} | {ours / peak:.0%} |")
    lines += ["", f"| 3x3 | onednn_nhwc GFLOP/s | {' | '.join(WINOGRAD)} | best / oneDNN |", "| --- |" + " ---: |" * 5]
    for channels, side in SHAPES_3X3:
        problem = ConvProblem(1, 1, channels, side, side, channels, 3, 3, ph=1, pw=1)
        onednn, *ours = rates(problem, ("onednn_nhwc", *WINOGRAD), rounds)
        cells = " | ".join(f"{rate:.0f}" for rate in ours)
        lines.append(f"| {channels}x{side}x{side} -> {channels} | {onednn:.0f} | {cells} | {max(ours) / onednn:.2f} |")
    text = "\n".join(lines) + "\n"
    click.echo(text)
    Path(__file__).with_name("PRIMITIVES.md").write_text(text)


if __name__ == "__main__":
    main()
