"""Maps with values that are not like the others, and what of a result they reach: for the class "strict"."""

from __future__ import annotations

import torch
from conv_data import Data

from convselect.problem import ConvProblem

OUTLIERS = {"NaN": torch.nan, "infinity": torch.inf, "no data": -9999.0, "huge": 1e20}


def with_outliers(p: ConvProblem, data: Data, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`data.src` with a block of `value` in the last channel of the last image, and which outputs it does not reach."""
    src = data.src.clone()
    rows, columns = (slice(size // 2, size // 2 + 3) for size in (p.ih, p.iw))
    src[-1, -1, rows, columns] = torch.nan
    free = data.convolve(p, src).isfinite()
    src[-1, -1, rows, columns] = value
    return src, free
