"""Benchmark results as a plot. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convselect.bench.report import OURS, Report

_OURS = "#0f7b6c"
_OTHERS = ("#d5dae1", "#bcc4ce", "#a1acb9", "#8593a3", "#6b7a8c", "#53616f")


def plot(reports: Sequence[Report], path: Path) -> None:
    """Bars of speed-up over eager as PNG: a panel for each report, a group for each network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = max(len(report.rows) for report in reports)
    figure = Figure(figsize=(max(9.0, 1.25 * most + 2), 0.6 + 3.4 * len(reports)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(reports), squeeze=False)[:, 0]
    for axes, report in zip(panels, reports, strict=True):
        _panel(axes, report)
        axes.set_title(f"{report.title}: {report.machine}, float32", fontsize=9, loc="left")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(labels), loc="outside upper left")
    figure.savefig(path, dpi=150)


def _panel(axes: Any, report: Report) -> None:
    names = [name for name in report.labels if name != "eager"]
    rows = [row for row in report.rows if row.median_ms("eager")]
    width = 0.82 / max(len(names), 1)
    for index, name in enumerate(names):
        places, ratios = [], []
        for position, row in enumerate(rows):
            eager, ms = row.median_ms("eager"), row.median_ms(name)
            if eager is not None and ms is not None:
                places.append(position + (index - (len(names) - 1) / 2) * width)
                ratios.append(eager / ms)
        color = _OURS if name == OURS else _OTHERS[index % len(_OTHERS)]
        bars = axes.bar(places, ratios, width * 0.94, color=color, label=report.labels[name])
        if name == OURS:
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axhline(1.0, color="#333333", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row.network for row in rows], rotation=20, ha="right", fontsize=8)
    axes.set_ylabel("times as fast as eager", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01, y=0.1)
