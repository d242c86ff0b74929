"""Transfer between machines: `convselect transfer-eval` on pairs of tables; writes transfer.md and transfer.png.

    python benchmarks/transfer.py [PAIR...] --data FOLDER   # with the published tables of FOLDER; else all pairs
    python benchmarks/transfer.py --render                  # tables and plots again from transfer/*.json

The pairs of published tables are left out where FOLDER lacks them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from convselect.bench import markdown
from convselect.study.evaluate import summary

HERE = Path(__file__).parent
PAIRS = {
    "paper": ("Intel to AMD, the tables of arXiv 2010.10621", "paper_intel.parquet", "paper_amd.parquet"),
    "miopen": ("gfx900 to gfx906, MIOpen's find-db", "miopen_gfx900.parquet", "miopen_gfx906.parquet"),
    "threads": ("AMD EPYC, two threads to one, our primitives", ("avx512", 2), ("avx512", 1)),
    "isa": ("AMD EPYC, AVX-512 to AVX2, two threads, our primitives", ("avx512", 2), ("avx2", 2)),
}
"""Name -> title, source and target: files of the data folder, or instruction set and threads of our own profiles."""
LABELS = {
    "none": "no adaptation (NN2)",
    "linear": "linear, a factor each",
    "nn1": "NN1, a factor each",
    "factor": "NN2, a factor each",
    "scratch": "NN2 from scratch",
    "finetune": "NN2, fine-tuned",
    "family": "NN2, fine-tuned on one family",
    "ours_random": "ours, random samples",
    "ours_chosen": "ours, chosen samples",
}
MEASURES = {"mdrae": "MdRAE", "slowdown_total": "slowdown, total", "slowdown_geomean": "slowdown, geomean"}


def results(name: str) -> Path:
    return HERE / "transfer" / f"{name}.json"


def run(name: str, data: Path | None) -> None:
    """Writes `results(name)`."""
    _, source, target = PAIRS[name]
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for part in (source, target):
            if isinstance(part, tuple):
                isa, threads = part
                table = pq.read_table(HERE / "profiles" / f"epyc_{isa}.parquet")
                path = Path(folder) / f"{isa}_{threads}.parquet"
                pq.write_table(table.filter(pc.equal(table["threads"], threads)), path)
            else:
                if data is None or not (data / part).exists():
                    click.echo(f"{name}: left out, there is no {part} in --data")
                    return
                path = data / part
            paths.append(path)
        command = [Path(sys.executable).with_name("convselect"), "transfer-eval"]
        command += ["--source", paths[0], "--target", paths[1]]
        subprocess.run([*map(str, command), "--json", str(results(name))], check=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each method and number of samples; the least of each measure and number in bold."""
    lines = []
    found = summary(rows)
    for method, samples, values in found:
        if method.endswith("(source)"):
            continue
        cells = [LABELS[method], samples]
        for name in MEASURES:
            mean, spread = values[name]
            least = min(v[name][0] for m, s, v in found if s == samples and not m.endswith("(source)"))
            text = f"{mean:.3f} ± {spread:.3f}"
            cells.append(f"**{text}**" if mean == least and samples else text)
        cells.append(f"{100 * values['coverage_90'][0]:.0f}%" if "coverage_90" in values else None)
        seconds = sorted(row["train_s"] for row in rows if (row["method"], row["samples"]) == (method, samples))
        cells.append(f"{seconds[len(seconds) // 2]:.2f} s")
        lines.append(cells)
    head = ["method", "samples", *MEASURES.values(), "90% interval holds", "adapting"]
    return "\n".join(markdown.table(head, lines))


def source_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["method"].endswith("(source)"):
            inside = f"{100 * row['coverage_90']:.0f}%" if row["coverage_90"] is not None else None
            numbers = [f"{row[name]:.4f}" for name in MEASURES]
            lines.append([row["method"].removesuffix(" (source)"), *numbers, inside, f"{row['train_s']:.0f} s"])
    head = ["model of the source machine", *MEASURES.values(), "90% interval holds", "training"]
    return "\n".join(markdown.table(head, lines))


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Learning curves: a row of axes for each pair, a column for each measure, mean and spread over the repeats."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(LABELS, plt.get_cmap("Pastel1").colors, strict=True))
    colors |= {
        "factor": "tab:blue",
        "finetune": "tab:green",
        "scratch": "tab:purple",
        "nn1": "tab:cyan",
        "ours_random": "tab:orange",
        "ours_chosen": "tab:red",
    }
    figure, grid = plt.subplots(len(found), 2, figsize=(10, 3.4 * len(found)), squeeze=False)
    for axes, (name, rows) in zip(grid, found.items(), strict=True):
        kept = [row for row in rows if not row["method"].endswith("(source)") and row["samples"]]
        counts = sorted({row["samples"] for row in kept})
        for ax, measure in zip(axes, ("mdrae", "slowdown_total"), strict=True):
            least, shift = np.inf, 1.0 if measure == "slowdown_total" else 0.0
            for method, label in LABELS.items():
                points = {s: v[measure] for m, s, v in summary(kept) if m == method}
                if not points:
                    continue
                own = method.startswith("ours")
                means = [points[s][0] - shift for s in counts]
                ax.plot(
                    counts,
                    means,
                    marker="o",
                    ms=4,
                    label=label,
                    color=colors[method],
                    lw=2.4 if own else 1.2,
                    zorder=3 if own else 2,
                )
                least = min(least, *means)
                low = [max(m - points[s][1], 1e-6) for m, s in zip(means, counts, strict=True)]
                high = [m + points[s][1] for m, s in zip(means, counts, strict=True)]
                ax.fill_between(counts, low, high, color=colors[method], alpha=0.15, lw=0)
            ax.set(xscale="log", yscale="log", xlabel="samples", xticks=counts, xticklabels=counts)
            ax.set_ylabel("MdRAE" if measure == "mdrae" else "slowdown - 1")
            ax.set_title(PAIRS[name][0], fontsize=9)
            ax.set_ylim(bottom=max(0.7 * least, 1e-4))
            ax.minorticks_off()
            ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
            ax.grid(alpha=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.9 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)


def render() -> None:
    """transfer.md between its markers, and transfer.png, from what results there are."""
    found = {name: json.loads(results(name).read_text()) for name in PAIRS if results(name).exists()}
    plot(found, HERE / "transfer.png")
    parts = [f"### {PAIRS[name][0]}\n\n{source_table(rows)}\n\n{table(rows)}" for name, rows in found.items()]
    page = HERE / "transfer.md"
    before, _, rest = page.read_text().partition("<!-- tables -->")
    after = rest.partition("<!-- end of tables -->")[2]
    page.write_text(before + "<!-- tables -->\n" + "\n\n".join(parts) + "\n<!-- end of tables -->" + after)


@click.command(help=__doc__)
@click.argument("pairs", nargs=-1, type=click.Choice(list(PAIRS)))
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Of the published tables.")
@click.option("--render", "only_render", is_flag=True, help="Only tables and plots.")
def main(pairs: tuple[str, ...], data: Path | None, only_render: bool) -> None:
    for name in () if only_render else pairs or PAIRS:
        run(name, data)
    render()


if __name__ == "__main__":
    main()
