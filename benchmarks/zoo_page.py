"""The zoo's table: benchmarks/ZOO.md from its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

from convselect.bench import markdown

FAULTS = ("wrong", "crash", "raises", "out of time", "defect", "form")
"""Statuses that are ours to mend, the worst first."""
SLOWER = 1.05
"""Both the ratio of least times and the median ratio are above this where a network counts as slower than eager."""
LONG_S = 15.0

Row = dict[str, Any]

INTRO = """\
Every network of torchvision, one architecture of each family of timm, and blocks of our own, with random weights and
small inputs, `calibrate="never"`, one thread, each in a process of its own. `make zoo` makes this page.

- *error*: relative L2 against eager in float64, the worst of all results for batch 1 and then batch 2, each called
  twice; beside it eager's own in float32.
- *right*: the error is at most 2e-5, or 20 times eager's; strides and shared memory are eager's. *form*: they are not.
  *defect*: the network ran as eager runs it, as an error of the package was caught.
  *chaotic*: eager float32 itself errs by more than 1e-3 (detections are sorted by score and suppressed by overlap), so
  that the results tell nothing; the rows `:heads` compare what such networks compute before they decide.
- *left to ATen*: convolutions that no primitive of ours runs. *not captured*: those that ran outside of all graphs.
- *first call*: seconds in a process that has compiled something before; *capture*: of the same with the backend
  `aot_eager`, which is Dynamo's and AOTAutograd's part.
- *time*: of a call, ours over eager's, the least and the median of interleaved rounds.
"""


def said(row: Row) -> str:
    """A row in a line."""
    if row["status"] == "timed":
        return (
            f"first call {row['convselect_first_s']:.1f} s (capture {row['aot_eager_first_s']:.1f}), "
            f"{row['ms']:.2f} ms, {row['ratio']:.2f} of eager's"
        )
    parts = [row["status"]]
    if "error" in row:
        parts.append(f"{row['error']:.1e} (eager {row['eager_error']:.1e})")
    parts += [str(row[key]) for key in ("raised", "where", "torch_raised", "float64") if row.get(key)]
    parts += row.get("form", [])[:2]
    parts += row.get("warnings", [])[:2] if row["status"] == "defect" else []
    return "; ".join(parts)


def page(results: dict[str, Row], times: dict[str, Row]) -> str:
    """Faults first, then what is slower than eager, then what is left to ATen, then all rows."""
    counts = Counter(row["status"] for row in results.values())
    slow = [name for name, row in times.items() if is_slower(row)]
    timed = [row for row in times.values() if row["status"] == "timed"]
    measured = Counter(row["measured"] for row in chain(results.values(), times.values()))
    lines = ["# The zoo", "", INTRO, *(f"- {count} rows: {where}" for where, count in measured.items()), ""]
    lines.append(f"{len(results)} networks: " + ", ".join(f"{n} {status}" for status, n in counts.most_common()) + ".")
    if timed:
        long = sum(row["convselect_first_s"] > LONG_S for row in timed)
        lines.append(f"{len(timed)} timed: {len(slow)} slower than eager, {long} first calls above {LONG_S:g} s.")
    for status in FAULTS:
        lines += section(status, ((name, row) for name, row in results.items() if row["status"] == status))
    lines += section("raises when timed", ((name, row) for name, row in times.items() if row["status"] != "timed"))
    lines += section(
        "slower than eager", ((name, times[name]) for name in sorted(slow, key=lambda n: -times[n]["ratio"]))
    )
    convolutions, networks = Counter[str](), Counter[str]()
    for row in results.values():
        for reason, count in row.get("unconverted", {}).items():
            convolutions[reason] += count
            networks[reason] += 1
    reasons = [(reason, count, networks[reason]) for reason, count in convolutions.most_common()]
    lines += ["", "## Convolutions left to ATen", "", *markdown.table(["why", "convolutions", "networks"], reasons)]
    lines += ["", "## All", "", *table(results, times)]
    return "\n".join(lines) + "\n"


def is_slower(row: Row) -> bool:
    return row["status"] == "timed" and min(row["ratio"], row["ratio_median"]) > SLOWER


def section(title: str, rows: Iterable[tuple[str, Row]]) -> list[str]:
    found = [f"- `{name}`: {said(row)}" for name, row in rows]
    return ["", f"## {title.capitalize()}", "", *found] if found else []


def table(results: dict[str, Row], times: dict[str, Row]) -> list[str]:
    head = ["network", "inputs", "result", "error", "eager's", "graphs", "convolutions", "left to ATen", "not captured"]
    head += ["first call, s", "capture, s", "ms", "time, least", "median"]
    lines = []
    for name in sorted(results | times):
        row, timed = results.get(name, {}), times.get(name, {})
        inputs = ", ".join("x".join(map(str, shape)) for shape in row.get("inputs", ()))
        cells = [name, inputs, row.get("status")]
        cells += [f"{row[key]:.1e}" if key in row else None for key in ("error", "eager_error")]
        captured = row.get("captured")
        outside = None if captured is None else row["convolutions"] - captured
        cells += [row.get("graphs"), row.get("convolutions"), sum(row.get("unconverted", {}).values()), outside]
        cells += [f"{timed[key]:.1f}" if key in timed else None for key in ("convselect_first_s", "aot_eager_first_s")]
        cells += [f"{timed[key]:.2f}" if key in timed else None for key in ("ms", "ratio", "ratio_median")]
        lines.append(cells)
    return markdown.table(head, lines, left=range(3))
