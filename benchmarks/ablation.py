"""What each part of the adaptation is worth: a Markdown table of variants on one pair of profile tables.

    python benchmarks/ablation.py SOURCE.parquet TARGET.parquet [--samples 25] [--repeats 5]

The protocol is that of `convselect transfer-eval`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import click
import numpy as np
from rich.progress import Progress

from convselect.bench import markdown
from convselect.costs import gaussian_process
from convselect.costs.gaussian_process import LEVELS, Kin
from convselect.costs.metrics import quality
from convselect.costs.tables import read
from convselect.costs.train import learn
from convselect.costs.transfer import Adapted
from convselect.study.choose import choose
from convselect.study.evaluate import coverage, possible, split
from convselect.study.methods import Source, ours

NONE = -8.0
"""Log of a width that stands for no deviation."""


def without(part: slice) -> Mapping[str, object]:
    """Constants of `gaussian_process` with which `part` of the widths is nought and stays so."""
    typical, tolerance = gaussian_process._TYPICAL.copy(), gaussian_process._TOLERANCE.copy()
    typical[part], tolerance[part] = NONE, 1e-3
    return {"_TYPICAL": typical, "_TOLERANCE": tolerance}


ALIKE = [1, LEVELS + 1, 2 * LEVELS + 1]
VARIANTS: dict[str, Mapping[str, object]] = {
    "all of it, chosen samples": {},
    "random samples": {},
    "typical widths, no search": {"_STEPS": 0},
    "nothing shared by those alike": without(ALIKE),  # type: ignore[arg-type]
    "no deviation of a primitive by itself": without([2, LEVELS + 2, 2 * LEVELS + 2]),  # type: ignore[arg-type]
    "no waves": without(slice(2 * LEVELS, 3 * LEVELS)),
    "no slopes": without(slice(LEVELS, 2 * LEVELS)),
    "neither waves nor slopes: offsets": without(slice(LEVELS, 3 * LEVELS)),
    "no deviation of a problem as a whole": without(slice(gaussian_process._COMMON, gaussian_process._COMMON + 1)),
    "all primitives alike": {},
}


HEAD = ("variant", "MdRAE", "slowdown, total", "slowdown, geomean", "90% interval holds")


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(exists=True, path_type=Path))
@click.option("--samples", default=25, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(source: Path, target: Path, samples: int, repeats: int) -> None:
    """Print the table."""
    train, _, pool, held = split(read([possible(source)]), read([possible(target)]), 0.2)
    with Progress(transient=True) as bar:
        model = learn(train, progress=bar)[0]
    known = Source(train, None, None, None, model)  # type: ignore[arg-type]
    same_for_all = Adapted._kin

    def all_alike(self: Adapted, candidates: list[tuple[str, str]]) -> Kin:
        kin = same_for_all(self, candidates)
        return Kin(np.ones_like(kin.alike), kin.same)

    print("\n".join(markdown.table(HEAD, [])))
    for name, constants in VARIANTS.items():
        found = []
        for repeat in range(repeats):
            drawn = np.random.default_rng(repeat).permutation(len(pool))[:samples]
            rows = drawn if name == "random samples" else choose(model, pool, samples, repeat)
            kin = all_alike if name == "all primitives alike" else same_for_all
            with (
                patch.multiple(gaussian_process, **{"_STEPS": gaussian_process._STEPS, **constants}),
                patch.object(Adapted, "_kin", kin),
            ):
                prediction = ours(known, pool.take(rows), held, repeat)
            found.append((*quality(np.exp(prediction.log_ms), held.ms), coverage(prediction, held)))
        mean, spread = np.mean(np.array(found, float), axis=0), np.std(np.array(found, float), axis=0)
        cells = [f"{m:.4f} ± {s:.4f}" for m, s in zip(mean[:3], spread[:3], strict=True)]
        print(markdown.table(HEAD, [[name, *cells, f"{100 * mean[3]:.0f}%"]])[-1], flush=True)


if __name__ == "__main__":
    main()
