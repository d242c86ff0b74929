"""Writes MODEL.md, the card of the shipped cost model, from what training left in the weights.

convselect train benchmarks/profiles/*_avx512.parquet --out convselect/costs/weights/cpu.safetensors
python benchmarks/model_card.py
"""

from __future__ import annotations

from pathlib import Path

from convselect.costs import CostModel

PAGE = Path(__file__).parent / "MODEL.md"


def card(model: CostModel) -> str:
    info, held = model.info, model.info["held_out"]
    networks, inputs, width = model.layers[0][0].shape
    families = "\n".join(
        f"| {name} | {found['timings']} | {found['mdrae']:.3f} |" for name, found in sorted(held["families"].items())
    )
    command = "convselect train benchmarks/profiles/*_avx512.parquet --out convselect/costs/weights/cpu.safetensors"
    threads = " and ".join(map(str, info["threads"]))
    return f"""# The shipped cost model

`convselect/costs/weights/cpu.safetensors`: the time of a float32 convolution by each primitive.
Written by `python benchmarks/model_card.py` from what training left in the file.

- **Primitives:** {len(model.primitives)}, of {len(set(model.families))} families.
- **Machines:** {"; ".join(info["machines"])}.
  On others it is adapted by calibration, or asked as it is, with wide intervals.
- **Data:** {info["timings"]} timings of {info["problems"]} problems on {threads} threads, our own, in
  `benchmarks/profiles/` (`convselect profile`); no published table is in it.
- **Model:** {networks} networks of {inputs} features and {len(model.layers) - 1} hidden layers of {width};
  they predict the log of the time over an analytic floor.
- **Split:** one fifth of the groups of equal (ic, oc, ih) held out for the errors below, then trained again on all.
- **Trained:** {info["date"]}, in {info["train_s"]} s on the machine above. Again, in one command:
  `{command}`

Held out: {held["problems"]} problems, {held["timings"]} timings. MdRAE {held["mdrae"]:.4f}; slowdown
{held["slowdown_total"]:.4f} in total, {held["slowdown_geomean"]:.4f} as a geometric mean; the 90% interval holds
{100 * held["coverage_90"]:.1f}%.

| family | held-out timings | MdRAE |
|---|---|---|
{families}
"""


if __name__ == "__main__":
    PAGE.write_text(card(CostModel.load()))
