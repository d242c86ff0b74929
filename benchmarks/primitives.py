"""Single primitives on the layers of real networks, against oneDNN and against the machine's floor.

    python benchmarks/primitives.py [--threads 2] [NETWORK...]

writes benchmarks/PRIMITIVES.md. Times are those of a plan: weights cold, the source just written, bias and ReLU. The
floor of a layer is the larger of the direct algorithm's FLOPs at the machine's float32 peak and of its bytes (source,
weights, result, once each) at the rate of a copy of as many bytes; Winograd, which saves FLOPs, may pass 100%.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import click
import numpy as np
import torch

from convselect import machine
from convselect.bench import markdown
from convselect.bench.networks import convolutions
from convselect.bench.peak import gemm_gflops
from convselect.measure.cpu import PrimitiveTimer, interleaved
from convselect.measure.progress import reporting
from convselect.primitive import candidates, get
from convselect.problem import ConvProblem

NETWORKS = {
    "alexnet": 224,
    "vgg16": 224,
    "googlenet": 224,
    "inception_v3": 299,
    "resnet18": 224,
    "resnet50": 224,
    "squeezenet1_1": 224,
    "mobilenet_v2": 224,
    "efficientnet_b0": 224,
    "densenet121": 224,
}
"""Network -> image size."""


def copy_gbs() -> list[tuple[float, float]]:
    """(bytes read and written, GB/s) of copies from those of one L1 to those of memory."""
    found = []
    for nbytes in (2**k for k in range(15, 28)):
        src, dst = torch.rand(nbytes // 8), torch.rand(nbytes // 8)
        repeats = max(1, 2**20 // nbytes)

        def copy(src: torch.Tensor = src, dst: torch.Tensor = dst, repeats: int = repeats) -> None:
            for _ in range(repeats):
                dst.copy_(src)

        found.append((float(nbytes), nbytes * repeats / interleaved([copy], rounds=15)[1:].min() * 1e-6))
    return found


def floor_ms(p: ConvProblem, gflops: float, copies: list[tuple[float, float]]) -> tuple[float, str]:
    """The least time, and what bounds it."""
    nbytes = 4.0 * (p.mb * p.ic * p.ih * p.iw + p.oc * p.ic // p.g * p.kh * p.kw + p.mb * p.oc * p.oh * p.ow)
    sizes, rates = np.array(copies).T
    memory = nbytes / np.interp(np.log(nbytes), np.log(sizes), rates) * 1e-6
    arithmetic = p.flops / gflops * 1e-6
    return (arithmetic, "FLOPs") if arithmetic > memory else (float(memory), "bytes")


def kind(p: ConvProblem) -> str:
    if p.g == p.ic == p.oc:
        return "depthwise"
    if p.kh == p.kw == 1:
        return "1x1, K >= 256" if p.ic >= 256 else "1x1, K < 256"
    if (p.sh, p.sw) == (1, 1) and min(p.ic, p.oc) >= 64 and p.kh == p.kw == 3:
        return "3x3 of stride 1, ic, oc >= 64, " + ("28 pixels or more" if min(p.oh, p.ow) >= 28 else "smaller maps")
    return "other"


@click.command(help=__doc__)
@click.argument("networks", nargs=-1)
@click.option("--threads", default=2, show_default=True)
@torch.inference_mode()
def main(networks: Iterable[str], threads: int) -> None:
    torch.set_num_threads(threads)
    here = machine.cpu()
    names = tuple(networks) or tuple(NETWORKS)
    count = Counter(problem for name in names for problem in convolutions(name, NETWORKS[name]))
    peaks, copies, timer = gemm_gflops(), copy_gbs(), PrimitiveTimer(here)
    peak_name = max(peaks, key=peaks.__getitem__)
    rows = []
    with reporting("Timing", len(count), None) as report:
        for p in count:
            report(len(rows), str(p))
            able, _ = candidates(p, here, "default")
            onednn = [q for q in map(get, ("onednn_nhwc", "onednn_nchw")) if q.refusal(p, here) is None]
            ms = timer.time_primitives(p, [q for q in able if q.family not in ("aten", "onednn")] + onednn, rounds=9)
            theirs = min((ms.pop(q.name) for q in onednn if q.name in ms), default=float("nan"))
            best = min(ms, key=ms.__getitem__)
            rows.append((p, best, ms[best], theirs, *floor_ms(p, peaks[peak_name], copies)))

    kinds = []
    for what in sorted({kind(p) for p in count}):
        some = [row for row in rows if kind(row[0]) == what]
        ratios = np.array([row[3] / row[2] for row in some])
        fractions = np.array([row[4] / row[2] for row in some])
        ratio, fraction = (np.exp(np.nanmean(np.log(values))) for values in (ratios, fractions))
        kinds.append((what, len(some), f"{ratio:.2f}", f"{np.nanmin(ratios):.2f}", f"{fraction:.0%}"))
    layers = []
    for p, best, ms_best, theirs, floor, bound in sorted(rows, key=lambda row: (kind(row[0]), str(row[0]))):
        gflops = f"{p.flops / ms_best * 1e-6:.0f}"
        cells = (f"{ms_best:.3f}", gflops, f"{theirs / ms_best:.2f}", f"{floor / ms_best:.0%}")
        layers.append((f"`{p}`", count[p], best, *cells, bound))
    lines = [
        "# Primitives",
        "",
        f"- machine: {here}; {threads} threads; torch {torch.__version__}",
        f"- date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"- command: `python benchmarks/primitives.py --threads {threads} {' '.join(networks)}`".rstrip(" `") + "`",
        f'- layers: all different convolutions of {", ".join(names)}, batch 1; accuracy "default"',
        f"- float32 peak: {peaks[peak_name]:.0f} GFLOP/s ({peak_name})",
        "- copies, GB/s read and written: " + ", ".join(f"{n / 2**20:.3g} MiB {rate:.0f}" for n, rate in copies),
        "",
        "Geometric means over the layers of a kind. The fraction is the floor's time over ours.",
        "",
        *markdown.table(["kind", "layers", "oneDNN's time / ours", "least of them", "fraction of the floor"], kinds),
        "",
        *markdown.table(
            ["layer", "times", "primitive", "ms", "GFLOP/s", "oneDNN's / ours", "of the floor", "bound by"],
            layers,
            left=(0, 2, 7),
        ),
    ]
    text = "\n".join(lines) + "\n"
    click.echo(text)
    Path(__file__).with_name("PRIMITIVES.md").write_text(text)


if __name__ == "__main__":
    main()
