"""The protocol: split, sample, predict, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from convselect.costs.metrics import TWO_SIDED_90, quality
from convselect.costs.tables import Profile, group, read, with_defaults
from convselect.costs.train import learn
from convselect.study.choose import choose
from convselect.study.learners import linear, nn1, nn2
from convselect.study.methods import CHOSEN, NEEDS_SAMPLES, RANDOM, Method, Prediction, Source, as_is, unadapted

Row = dict[str, Any]


def possible(source: Path | str | pa.Table) -> pa.Table:
    """The table without the rows whose kernel does not fit into the padded map: MIOpen's find-db has a few."""
    table = with_defaults(source if isinstance(source, pa.Table) else pq.read_table(source))

    def fits(size: str, pad: str, dilation: str, kernel: str) -> Any:
        n, p, d, k = (table[name].to_numpy() for name in (size, pad, dilation, kernel))
        return n + 2 * p > d * (k - 1)

    return table.filter(pa.array(fits("ih", "ph", "dh", "kh") & fits("iw", "pw", "dw", "kw")))


def groups(profile: Profile, rows: npt.NDArray[np.bool_]) -> set[tuple[int, int, int]]:
    """Those of the problems in `rows`."""
    return {group(p) for p, held in zip(profile.problems, rows, strict=True) if held}


def split(source: Profile, target: Profile, holdout: float) -> tuple[Profile, Profile, Profile, Profile]:
    """Training and held-out rows of the source, then of the target.

    Whole groups of the target's problems are held out, and no problem of theirs stays in the source's training rows.
    """
    held = target.held_out(holdout)
    out = groups(target, held)
    elsewhere = np.array([group(p) in out for p in source.problems])
    if elsewhere.all() or held.all() or not held.any():
        raise ValueError(
            f"holdout is {holdout}; it must leave groups of (ic, oc, ih) on both sides, and the target has "
            f"{len(groups(target, np.ones_like(held)))} of them"
        )
    return source.take(~elsewhere).timed(), source.take(elsewhere), target.take(~held), target.take(held)


def evaluate(
    source: Path | str | pa.Table,
    target: Path | str | pa.Table,
    *,
    samples: Sequence[int] = (0, 5, 25, 125),
    repeats: int = 5,
    holdout: float = 0.2,
    progress: bool = True,
) -> list[Row]:
    """One row for each method, number of samples and repeat; beside the fixed keys `coverage_90`, where known.

    A sample is one problem of the target's training rows with every primitive that was timed on it. A repeat draws
    samples, and seeds what is trained on them, anew. Rows of a method "... (source)" are of the source machine's
    models on its own held-out problems, and `train_s` is how long they were trained; elsewhere it is adaptation.
    """
    profiles = read([possible(source)]), read([possible(target)])
    train, source_held, pool, held = split(*profiles, holdout)
    counts = sorted({min(count, len(pool)) for count in samples})
    with Progress(disable=not progress, transient=True) as bar:
        learned, rows = _learn(train, source_held, bar)
        task = bar.add_task("adapting", total=repeats)
        for repeat in range(repeats):
            drawn = np.random.default_rng(repeat).permutation(len(pool))
            chosen = choose(learned.ours, pool, counts[-1], repeat)
            for count in counts:
                for methods, order in ((RANDOM, drawn), (CHOSEN, chosen)):
                    for name, method in methods.items():
                        if count or name not in NEEDS_SAMPLES:
                            sampled = pool.take(order[:count])
                            rows.append(_row(name, method, learned, sampled, held, repeat))
                bar.advance(task, 1 / len(counts))
    return rows


def _learn(train: Profile, held: Profile, bar: Progress) -> tuple[Source, list[Row]]:
    """The source machine's models, and how good they are on its own held-out rows."""
    models: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    learners: dict[str, Callable[[Profile], Any]] = {
        "linear": linear,
        "nn1": nn1,
        "nn2": nn2,
        "ours": lambda profile: learn(profile, progress=bar)[0],
    }
    task = bar.add_task("learning the source machine", total=len(learners))
    for name, learner in learners.items():
        start = time.perf_counter()
        models[name] = learner(train)
        seconds[name] = time.perf_counter() - start
        bar.advance(task)
    source = Source(train, **models)
    rows = []
    for name in learners if len(held) else ():
        row = _row(
            f"{name} (source)", unadapted if name == "ours" else as_is(name), source, train.take(np.arange(0)), held, 0
        )
        rows.append({**row, "train_s": seconds[name]})
    return source, rows


def _row(name: str, method: Method, source: Source, samples: Profile, held: Profile, repeat: int) -> Row:
    start = time.perf_counter()
    prediction = method(source, samples, held, repeat)
    seconds = time.perf_counter() - start
    row = {"method": name, "samples": len(samples), "repeat": repeat}
    row |= quality(np.exp(prediction.log_ms), held.ms)._asdict()
    return {**row, "train_s": seconds, "coverage_90": coverage(prediction, held)}


def coverage(prediction: Prediction, held: Profile) -> float | None:
    """Part of the held-out timings inside the 90% intervals."""
    if prediction.std is None:
        return None
    inside = np.abs(np.log(held.ms) - prediction.log_ms) <= TWO_SIDED_90 * prediction.std
    return float(inside[np.isfinite(held.ms)].mean())


def summary(rows: Sequence[Row]) -> list[tuple[str, int, dict[str, tuple[float, float]]]]:
    """(method, samples, {measure: (mean, standard deviation) over the repeats}), in the order of `rows`."""
    keys = dict.fromkeys((row["method"], row["samples"]) for row in rows)
    result = []
    for method, samples in keys:
        mine = [row for row in rows if (row["method"], row["samples"]) == (method, samples)]
        values = {
            name: np.array([row[name] for row in mine], dtype=np.float64)
            for name in ("mdrae", "slowdown_total", "slowdown_geomean", "coverage_90", "train_s")
            if all(row[name] is not None for row in mine)
        }
        result.append((method, samples, {name: (float(v.mean()), float(v.std())) for name, v in values.items()}))
    return result
