"""The page of a GPU's results, from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compare import ALLOWED, LABELS, MOST_ERROR, OURS, SYSTEMS, Job

from convselect.bench import markdown
from convselect.bench.report import geomean

Record = Mapping[str, Any]
"""Of networks.json: {"network", "batch", "precision", "floor_ms", "model", "systems"}, the last from `compare`."""


def ratio(record: Record) -> float | None:
    """How much faster than the faster peer; None until ours and both peers are there."""
    times = [record["systems"].get(system, {}).get("median_ms") for system in SYSTEMS]
    return None if None in times else min(times[1:]) / times[0]


def missing(jobs: Sequence[Job], records: Sequence[Record], failures: Sequence[Record]) -> list[str]:
    """What was neither measured nor failed, a line for each setting."""
    have = {(Job(r["network"], r["batch"], r["precision"]), system) for r in records for system in r["systems"]}
    have |= {(Job(f["network"], f["batch"], f["precision"]), f["system"]) for f in failures if "system" in f}
    lines = []
    for setting in dict.fromkeys((job.precision, job.batch) for job in jobs):
        for system in SYSTEMS:
            lack = [job.network for job in jobs if (job.precision, job.batch) == setting and (job, system) not in have]
            if lack:
                lines.append(f"{setting[0]}, batch {setting[1]}, {LABELS[system]}: {', '.join(lack)}")
    return lines


def page(
    about: Record,
    ceilings: Record,
    models: Mapping[str, Record],
    records: Sequence[Record],
    failures: Sequence[Record],
    jobs: Sequence[Job],
) -> str:
    """Markdown. `about`: {"machine", "date", "command", "versions", "tests"}; `models`: precision -> its info."""
    lines = [
        "# Results on a GPU",
        "",
        f"{about['machine']}, {about['date']}; {about['versions']}. Command: `{about['command']}`. "
        f"The tests on this GPU: {about['tests']}.",
        "",
        "Milliseconds by events on the GPU, medians over interleaved rounds, all systems in one process and in "
        "channels_last. convselect: default options, each network calibrated on its own, as in a user's first run. "
        "cuDNN: eager mode with `benchmark=True`. Inductor: `max-autotune`, with CUDA graphs, and with freezing, so "
        "that it folds batch norms too. The speed-up is over the faster of the two. A system has no time where its "
        f"output errs by more than {MOST_ERROR:g} times what eager does against float64, and by more than {ALLOWED:g} "
        "(rel-L2). Of floor: the least time by two measured ceilings, layer by layer "
        "(FLOPs at the rate of a large matrix product, or bytes at that of a copy), over ours; values that stay in the "
        "L2 and Winograd may pass it. First call: with compilation and calibration, and with Triton's kernels cached "
        "as far as they were compiled before.",
        "",
        f"Ceilings: a copy moves {ceilings['copy_gbs']:.0f} GB/s; a product of 8192 x 8192 matrices runs at "
        + ", ".join(
            f"{ceilings[f'{p}_tflops']:.0f} TFLOP/s in {p}"
            for p in ("float16", "tf32", "float32")
            if f"{p}_tflops" in ceilings
        )
        + ".",
        "",
    ]
    for precision, batch in dict.fromkeys((job.precision, job.batch) for job in jobs):
        some = [r for r in records if (r["precision"], r["batch"]) == (precision, batch)]
        if some:
            lines += _section(precision, batch, some)
    if models:
        rows = []
        for precision, info in models.items():
            error, slowdown = info["held_out"]["mdrae"], info["held_out"]["slowdown_total"]
            rows.append((precision, info["problems"], info["timings"], f"{error:.1%}", f"{slowdown:.3f}"))
        head = ["precision", "problems", "timings", "held-out error, median", "slow-down of its choices"]
        lines += ["## The cost model", "", *markdown.table(head, rows), ""]
    if failures:
        lines += ["## What failed", ""]
        for failure in failures:
            what = ", ".join(f"{failure[key]}" for key in failure if key not in ("error", "log", "traceback"))
            lines.append(f"- {what}: {failure['error']}")
        lines.append("")
    if lack := missing(jobs, records, failures):
        lines += ["## Not measured yet", "", *(f"- {line}" for line in lack), ""]
    return "\n".join(lines)


def _section(precision: str, batch: int, records: Sequence[Record]) -> list[str]:
    rows = []
    for record in records:
        ours = record["systems"].get(OURS, {})
        cells = [_ms(record["systems"].get(system)) for system in SYSTEMS]
        over = ratio(record)
        cells.append("-" if over is None else f"{over:.2f}")
        cells.append(f"{record['floor_ms'] / ours['median_ms']:.0%}" if "median_ms" in ours else "-")
        cells.append(f"{ours['first_s']:.1f}" if "first_s" in ours else "-")
        rows.append([record["network"], *cells])
    head = ["network", *(LABELS[system] for system in SYSTEMS), "speed-up", "of floor", "first call, s"]
    lines = [f"## {precision}, batch {batch}", "", *markdown.table(head, rows)]
    ratios = [over for record in records if (over := ratio(record)) is not None]
    if ratios:
        slow = [r["network"] for r in records if (over := ratio(r)) is not None and over < 0.98]
        verdict = f"slower by more than 2%: {', '.join(slow)}" if slow else "none is slower by more than 2%"
        lines += ["", f"Geometric mean of the speed-up over {len(ratios)} networks: {geomean(ratios):.2f}; {verdict}."]
    models = {record["model"]: [r["network"] for r in records if r["model"] == record["model"]] for record in records}
    for model, names in models.items():
        lines += ["", f"Chosen by {model}" + (f": {', '.join(names)}." if len(models) > 1 else ".")]
    for record in records:
        for system, found in record["systems"].items():
            for said in (found.get("absent"), *found.get("warnings", ())):
                lines += ["", f"{record['network']}, {LABELS[system]}: {said}."] if said else []
    while lines[-1] == "":
        lines.pop()
    return [*lines, ""]


def _ms(found: Record | None) -> str:
    return "-" if found is None or "median_ms" not in found else f"{found['median_ms']:.3f}"
