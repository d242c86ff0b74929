"""Writes MODEL.md, the card of the shipped cost models, from what training left in the weights.

convselect train benchmarks/profiles/*_ISA.parquet --out convselect/costs/weights/cpu_ISA.safetensors
python benchmarks/model_card.py
"""

from __future__ import annotations

from pathlib import Path

from convselect.bench import markdown
from convselect.costs import CostModel
from convselect.costs.model import WEIGHTS

PAGE = Path(__file__).parent / "MODEL.md"
HEAD = """# The shipped cost models

The time of a float32 convolution by each primitive, one model for each instruction set; any other set takes AVX2's.
On a machine that is not named here a model is adapted by calibration, or asked as it is, with wide intervals. Written
by `python benchmarks/model_card.py` from what training left in the files.

- **Data:** timings of our own, in `benchmarks/profiles/` (`convselect profile`); no published table is in them.
- **Split:** one fifth of the groups of equal (ic, oc, ih) held out for the errors below, then trained again on all.
"""


def card(path: Path) -> str:
    model = CostModel.load(path)
    info, held = model.info, model.info["held_out"]
    networks, inputs, width = model.layers[0][0].shape
    families = [(name, found["timings"], f"{found['mdrae']:.3f}") for name, found in sorted(held["families"].items())]
    table = "\n".join(markdown.table(("family", "held-out timings", "MdRAE"), families))
    isa = path.stem.partition("_")[2]
    command = f"convselect train benchmarks/profiles/*_{isa}.parquet --out convselect/costs/weights/{path.name}"
    threads = " and ".join(map(str, info["threads"]))
    return f"""
## `{path.name}`

- **Primitives:** {len(model.primitives)}, of {len(set(model.families))} families.
- **Machines:** {"; ".join(info["machines"])}.
- **Data:** {info["timings"]} timings of {info["problems"]} problems on {threads} threads.
- **Model:** {networks} networks of {inputs} features and {len(model.layers) - 1} hidden layers of {width};
  they predict the log of the time over an analytic floor.
- **Trained:** {info["date"]}, in {info["train_s"]} s on the machine above. Again, in one command:
  `{command}`

Held out: {held["problems"]} problems, {held["timings"]} timings. MdRAE {held["mdrae"]:.4f}; slowdown
{held["slowdown_total"]:.4f} in total, {held["slowdown_geomean"]:.4f} as a geometric mean; the 90% interval holds
{100 * held["coverage_90"]:.1f}%.

{table}
"""


if __name__ == "__main__":
    PAGE.write_text(HEAD + "".join(card(path) for path in sorted(WEIGHTS.glob("cpu_*.safetensors"))))
