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
from convselect.primitive import IDENTITY, allowed, get, primitives
from convselect.problem import ConvProblem
from convselect.timing import interleaved

LAYERS = (
    (64, 64, 224, 3, 3), (128, 128, 56, 3, 3), (64, 64, 56, 3, 3), (128, 128, 28, 3, 3), (256, 256, 14, 3, 3),
    (512, 512, 14, 3, 3), (512, 512, 7, 3, 3), (256, 256, 56, 3, 3), (512, 512, 28, 3, 3), (64, 192, 27, 5, 5),
    (48, 64, 35, 5, 5), (192, 192, 17, 1, 7), (192, 192, 17, 7, 1), (384, 384, 8, 1, 3), (384, 384, 8, 3, 1),
)  # fmt: skip
"""(ic, oc, pixels along a side, kh, kw) of convolutions of stride 1 that keep the size."""
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
    lines += ["", "| stride 1 | onednn_nhwc GFLOP/s | best Winograd <= 5e-6 | its GFLOP/s | / oneDNN |"]
    lines.append("| --- | ---: | --- | ---: | ---: |")
    for ic, oc, side, kh, kw in LAYERS:
        problem = ConvProblem(1, 1, ic, side, side, oc, kh, kw, ph=kh // 2, pw=kw // 2)
        names = [q.name for q in primitives() if q.family == "winograd" and allowed(q, "default")]
        names = [name for name in names if get(name).refusal(problem, machine.cpu()) is None]
        onednn, *ours = rates(problem, ("onednn_nhwc", *names), rounds)
        best, name = max(zip(ours, names, strict=True))
        layer = f"{ic}x{side}x{side} -> {oc}, {kh}x{kw}"
        lines.append(f"| {layer} | {onednn:.0f} | {name} | {best:.0f} | {best / onednn:.2f} |")
    text = "\n".join(lines) + "\n"
    click.echo(text)
    Path(__file__).with_name("PRIMITIVES.md").write_text(text)


if __name__ == "__main__":
    main()
