"""Benchmark results as data and as a Markdown page."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from convselect.bench import markdown
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
    flops: int = 0
    """Operations of its convolutions."""

    def median_ms(self, peer: str) -> float | None:
        return next((result.median_ms for result in self.results if result.peer == peer), None)

    def fastest_peer_ms(self) -> float | None:
        """The least median of the systems that are not ours."""
        times = [r.median_ms for r in self.results if r.peer != OURS and r.median_ms is not None]
        return min(times, default=None)


@dataclass
class Report:
    machine: str
    fingerprint: str
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
    peak_gflops: dict[str, float] = field(default_factory=dict)
    """Rates of large matrix products, with as many threads; of a CPU."""
    device: str = "cpu"
    dtype: str = "float32"

    @classmethod
    def begin(
        cls,
        machine: Machine,
        batch: int,
        command: str,
        protocol: Protocol,
        labels: dict[str, str],
        dtype: str = "float32",
    ) -> Report:
        """An empty report on this machine, now."""
        report = cls(str(machine), machine.fingerprint, machine.threads, batch, command, protocol, labels)
        report.device, report.dtype = machine.device, dtype
        report.date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        report.versions = _versions()
        report.load = round(os.getloadavg()[0], 2)
        return report

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        data: dict[str, Any] = json.loads(text)
        rows = [
            Row(**{**row, "shape": tuple(row["shape"]), "results": [Result(**x) for x in row["results"]]})
            for row in data.pop("rows")
        ]
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

    def fraction(self, row: Row) -> float | None:
        """The part of the machine's float32 peak that ours reaches on one network. Winograd may pass 1."""
        ms = row.median_ms(OURS)
        return row.flops / ms * 1e-6 / max(self.peak_gflops.values()) if ms and row.flops and self.peak_gflops else None

    def section(self) -> list[str]:
        """The lines of the page that are about this report."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"## {self.title}",
            "",
            f"- machine: {self.machine}; {platform.system()} {platform.machine()}",
            f"- for every system: {self._setting}, {self.dtype}, batch {self.batch}, random weights",
            f"- versions: Python {platform.python_version()}, {versions}",
            f"- date: {self.date}; load average before the first run: {self.load}",
            f"- command: `{self.command}`",
        ]
        if self.peak_gflops:
            rates = ", ".join(f"{name} {rate:.0f}" for name, rate in self.peak_gflops.items())
            lines += [f"- float32 peak, the best of (GFLOP/s): {rates}"]
        lines += ["", *self._table("median_ms"), ""]
        lines += [f"- {text}" for text in (*self._ratios(), *self._shortened())]
        lines += ["", "### Quietest round", "", *self._table("min_ms"), "", "### Error", "", *self._errors(), ""]
        missing = sorted({r.absent for row in self.rows for r in row.results if r.absent})
        if missing:
            lines += ["### Not timed", "", *[f"- {text}" for text in missing], ""]
        return lines

    @property
    def title(self) -> str:
        return f"Batch {self.batch}, {self._setting if self.device == 'cpu' else self.dtype}"

    @property
    def _setting(self) -> str:
        if self.device != "cpu":
            return "this GPU"
        return f"{self.threads} {'threads' if self.threads > 1 else 'thread'}"

    def _table(self, statistic: str) -> list[str]:
        """Rows of `median_ms` or `min_ms`, the least of each in bold."""
        names = list(self.labels)
        ours = OURS in names
        head = ["network", *[self.labels[name] for name in names]] + (
            ["fastest peer / ours", "of peak"] if ours else []
        )
        rows = []
        for row in self.rows:
            times = {r.peer: ms for r in row.results if (ms := getattr(r, statistic)) is not None}
            best = min(times.values(), default=None)
            cells = [row.network]
            for name in names:
                ms = times.get(name)
                text = "" if ms is None else f"{ms:.2f}"
                cells.append(f"**{text}**" if ms is not None and ms == best else text)
            if ours:
                own_ms, fraction = times.pop(OURS, None), self.fraction(row)
                cells.append(f"{min(times.values()) / own_ms:.2f}" if own_ms is not None and times else "")
                cells.append("" if fraction is None or statistic != "median_ms" else f"{fraction:.0%}")
            rows.append(cells)
        return markdown.table(head, rows)

    def _ratios(self) -> list[str]:
        texts = []
        others = [None, *[name for name in self.labels if name != OURS]]
        for other in others:
            ratio = self.ratio(other)
            if ratio is not None:
                label = "the fastest peer of each network" if other is None else self.labels[other]
                texts.append(f"against {label}: {ratio:.2f}x as fast, geometric mean over {len(self.rows)} networks")
        return texts

    def _shortened(self) -> list[str]:
        """Which networks had fewer rounds or runs than the protocol has, so that they took no longer."""
        usual = (self.protocol.rounds, self.protocol.runs)
        texts = []
        for row in self.rows:
            rounds, runs = next(((r.rounds, r.runs) for r in row.results if r.rounds), usual)
            if (rounds, runs) != usual:
                texts.append(f"{row.network}: {rounds} rounds of {runs} timed runs")
        return texts

    def _errors(self) -> list[str]:
        """rel-L2 of each system's output against eager in float64."""
        rows = []
        for row in self.rows:
            errors = {r.peer: f"{r.rel_l2:.1e}" for r in row.results if r.rel_l2 is not None}
            rows.append([row.network, *map(errors.get, self.labels)])
        table = markdown.table(["network", *self.labels.values()], rows)
        return ["rel-L2 of the output against eager in float64.", "", *table]


def page(reports: Sequence[Report], plot: str | None = None) -> str:
    """The page `benchmarks/RESULTS.md`: what holds for all `reports`, of one protocol, and a section for each."""
    protocol = reports[0].protocol
    lines = [
        "# Results",
        "",
        f"Milliseconds, median over {protocol.rounds} interleaved rounds unless stated. In a round each system runs "
        f"the network for {protocol.settle_ms:g} ms untimed, while the worker threads of the system before may still "
        f"be spinning, and then {protocol.runs} times in a row, of which the median counts. Of peak: the FLOPs of the "
        "network's convolutions, as the direct algorithm counts them, over our time and the machine's float32 peak; "
        "Winograd may pass 100%.",
        "",
    ]
    if plot:
        lines += [f"![Speed-up over eager]({plot})", ""]
    for report in reports:
        lines += report.section()
    return "\n".join(lines)


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
