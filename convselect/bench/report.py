"""Benchmark results as data, as a Markdown table and as a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from convselect.bench.runner import Protocol, Result
from convselect.machine import Machine

OURS = "convselect"
_VERSIONED = ("convselect", "torchvision", "onnxruntime", "openvino", "ncnn", "numpy")


@dataclass
class Row:
    """One network: the shape of its input and a result for each system."""

    network: str
    shape: tuple[int, ...]
    results: list[Result]

    def median_ms(self, peer: str) -> float | None:
        return next((result.median_ms for result in self.results if result.peer == peer), None)

    def fastest_peer_ms(self) -> float | None:
        """The least median of the systems that are not ours."""
        times = [r.median_ms for r in self.results if r.peer != OURS and r.median_ms is not None]
        return min(times, default=None)


@dataclass
class Report:
    machine: str
    threads: int
    batch: int
    command: str
    protocol: Protocol
    labels: dict[str, str]
    """Peer -> what a reader should call it, in the order of the table's columns."""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    load: float = 0.0
    """The system's load average before the first run: above 0, something else was running."""
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def begin(cls, machine: Machine, batch: int, command: str, protocol: Protocol, labels: dict[str, str]) -> Report:
        """An empty report on this machine, now."""
        report = cls(str(machine), machine.threads, batch, command, protocol, labels)
        report.date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        report.versions = _versions()
        report.load = round(os.getloadavg()[0], 2)
        return report

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        data: dict[str, Any] = json.loads(text)
        rows = [Row(r["network"], tuple(r["shape"]), [Result(**x) for x in r["results"]]) for r in data.pop("rows")]
        return cls(**{**data, "protocol": Protocol(**data["protocol"])}, rows=rows)

    def ratio(self, other: str | None) -> float | None:
        """Geometric mean over the networks of time(`other`) / time(convselect); None stands for the fastest peer."""
        ratios = []
        for row in self.rows:
            ours = row.median_ms(OURS)
            theirs = row.fastest_peer_ms() if other is None else row.median_ms(other)
            if ours is not None and theirs is not None:
                ratios.append(theirs / ours)
        return geomean(ratios) if ratios else None

    def to_markdown(self, plot: str | None = None) -> str:
        """The page `benchmarks/RESULTS.md`."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        protocol = self.protocol
        lines = [
            "# Results",
            "",
            f"- machine: {self.machine}; {platform.system()} {platform.machine()}",
            f"- {self.threads} threads for every system, float32, batch {self.batch}, random weights",
            f"- versions: Python {platform.python_version()}, {versions}",
            f"- date: {self.date}; load average before the first run: {self.load}",
            f"- command: `{self.command}`",
            "",
            f"Milliseconds, median over {protocol.rounds} interleaved rounds. In a round each system runs the network "
            f"for {protocol.settle_ms:g} ms untimed, while the worker threads of the system before may still be "
            f"spinning, and then {protocol.runs} times in a row, of which the median counts.",
            "",
            *self._table("median_ms"),
            "",
        ]
        lines += [f"- {text}" for text in self._ratios()]
        if plot:
            lines += ["", f"![Speed-up over eager]({plot})"]
        lines += ["", "## Quietest round", "", *self._table("min_ms"), "", "## Error", "", *self._errors(), ""]
        missing = sorted({r.absent for row in self.rows for r in row.results if r.absent})
        if missing:
            lines += ["## Not timed", "", *[f"- {text}" for text in missing], ""]
        return "\n".join(lines)

    def _table(self, statistic: str) -> list[str]:
        """Rows of `median_ms` or `min_ms`, the least of each in bold."""
        names = list(self.labels)
        fastest = OURS in names
        head = ["network", *[self.labels[name] for name in names]] + (["fastest peer / ours"] if fastest else [])
        lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        for row in self.rows:
            times = {r.peer: ms for r in row.results if (ms := getattr(r, statistic)) is not None}
            best = min(times.values(), default=None)
            cells = [row.network]
            for name in names:
                ms = times.get(name)
                text = "" if ms is None else f"{ms:.2f}"
                cells.append(f"**{text}**" if ms is not None and ms == best else text)
            if fastest:
                ours = times.pop(OURS, None)
                cells.append(f"{min(times.values()) / ours:.2f}" if ours is not None and times else "")
            lines.append(_line(cells))
        return lines

    def _ratios(self) -> list[str]:
        texts = []
        others = [None, *[name for name in self.labels if name != OURS]]
        for other in others:
            ratio = self.ratio(other)
            if ratio is not None:
                label = "the fastest peer of each network" if other is None else self.labels[other]
                texts.append(f"against {label}: {ratio:.2f}x as fast, geometric mean over {len(self.rows)} networks")
        return texts

    def _errors(self) -> list[str]:
        """rel-L2 of each system's output against eager in float64."""
        lines = [
            "rel-L2 of the output against eager in float64.",
            "",
            _line(["network", *self.labels.values()]),
            _line(["---", *["---:"] * len(self.labels)]),
        ]
        for row in self.rows:
            errors = {r.peer: r.rel_l2 for r in row.results}
            cells = [errors.get(name) for name in self.labels]
            lines.append(_line([row.network, *["" if e is None else f"{e:.1e}" for e in cells]]))
        return lines

    def plot(self, path: Path) -> None:
        """Bars of speed-up over eager, a group for each network, as PNG. Needs matplotlib (the extra `plots`)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        names = [name for name in self.labels if name != "eager"]
        rows = [row for row in self.rows if row.median_ms("eager")]
        figure = Figure(figsize=(max(6.0, 1.25 * len(rows) + 2), 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        width = 0.82 / max(len(names), 1)
        greys = ("#c9ced6", "#aab2bd", "#8a94a3", "#6b7686", "#4e5866")
        shades = iter(greys * (len(names) // len(greys) + 1))
        for index, name in enumerate(names):
            color = "#0f7b6c" if name == OURS else next(shades)
            for position, row in enumerate(rows):
                eager, ms = row.median_ms("eager"), row.median_ms(name)
                if eager is None or ms is None:
                    continue
                x = position + (index - (len(names) - 1) / 2) * width
                axes.bar(x, eager / ms, width * 0.94, color=color, label=self.labels[name] if position == 0 else None)
                if name == OURS:
                    axes.annotate(f"{eager / ms:.1f}", (x, eager / ms), ha="center", va="bottom", fontsize=8)
        axes.axhline(1.0, color="#333333", linewidth=0.8)
        axes.set_xticks(range(len(rows)), [row.network for row in rows], rotation=25, ha="right")
        axes.set_ylabel("times as fast as eager")
        axes.set_title(f"{self.machine}, float32, batch {self.batch}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=max(len(names), 1), loc="upper left")
        axes.margins(y=0.15)
        figure.savefig(path, dpi=150)


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
