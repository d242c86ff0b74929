"""The models of Mulder, Radu and Dubach (arXiv 2010.10621): linear, NN1 and NN2, on the logs of a problem's dimensions.

NN1 is one network for each primitive, all of them trained at once as a batch of matrices; NN2 one with an output for
each primitive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from convselect.costs.tables import Profile
from convselect.costs.train import forward, initial, one_thread
from convselect.problem import DIMENSIONS

Array = npt.NDArray[np.float64]

NN1_HIDDEN, NN2_HIDDEN = (16, 64, 64, 16), (128, 512, 512, 128)
_BATCH = 128
_RIDGE = 1e-3
"""The penalty of the linear model, on normalised columns."""


def dimensions(profile: Profile) -> Array:
    """log2 of the dimensions, paddings plus 1, and of the threads: f64 [n, 15]."""
    rows = [[getattr(p, name) + (name in ("ph", "pw")) for name in DIMENSIONS] for p in profile.problems]
    table = np.array(rows, dtype=np.float64).reshape(-1, len(DIMENSIONS))
    result: Array = np.log2(np.concatenate([table, profile.threads[:, None]], axis=1))
    return result


@dataclass(frozen=True)
class Scaling:
    """Mean and deviation of the inputs [F], and of log(ms) for each primitive [P]."""

    x_mean: Array
    x_std: Array
    y_mean: Array
    y_std: Array

    @classmethod
    def of(cls, profile: Profile) -> Scaling:
        x, y = dimensions(profile), np.log(profile.ms)
        overall = np.nanmean(y)
        known = np.isfinite(y).sum(axis=0)
        filled = np.where(known > 0, y, overall)
        std = np.nanstd(filled, axis=0)
        return cls(
            x.mean(axis=0),
            np.where(x.std(axis=0) < 1e-6, 1, x.std(axis=0)),
            np.nanmean(filled, axis=0),
            np.where(known > 1, np.maximum(std, 0.1), np.nanstd(y)),
        )

    def inputs(self, profile: Profile) -> torch.Tensor:
        return torch.from_numpy(((dimensions(profile) - self.x_mean) / self.x_std).astype(np.float32))


@dataclass(frozen=True)
class Networks:
    """`each`: a network for each primitive (NN1), or one for all of them (NN2 and, without hidden layers, linear)."""

    scaling: Scaling
    parameters: list[torch.Tensor]
    each: bool

    def log_ms(self, profile: Profile) -> Array:
        """log(ms) of the primitives that it was trained on, f64 [n, P]."""
        x = self.scaling.inputs(profile)
        with torch.no_grad():
            y = forward(self.parameters, x.expand(len(self.parameters[0]), *x.shape))
        result: Array = (y[:, :, 0].T if self.each else y[0]).numpy().astype(np.float64)
        return result * self.scaling.y_std + self.scaling.y_mean


@one_thread()
def tune(start: Networks, profile: Profile, *, steps: int, rate: float, seed: int) -> Networks:
    """`start` trained further on `profile`, each network on random batches of the rows that it has timings for."""
    x = start.scaling.inputs(profile)
    target = (np.log(profile.ms) - start.scaling.y_mean) / start.scaling.y_std
    known = torch.from_numpy(np.isfinite(target))
    y = torch.from_numpy(np.nan_to_num(target).astype(np.float32))
    known, y = (t.T[:, :, None] if start.each else t[None] for t in (known, y))
    # Each network's rows, padded to one length, so that a batch is one gather.
    rows = [torch.nonzero(mask.any(dim=1)).flatten() for mask in known]
    pools = torch.stack([r.repeat(-(-len(x) // len(r)))[: len(x)] if len(r) else torch.arange(len(x)) for r in rows])
    counts = torch.tensor([max(len(r), 1) for r in rows])
    generator = torch.Generator().manual_seed(seed)
    parameters = [p.detach().clone().requires_grad_() for p in start.parameters]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    network = torch.arange(len(pools))[:, None]
    batch = min(_BATCH, len(x))
    for _ in range(steps):
        at = pools.gather(1, (torch.rand(len(pools), batch, generator=generator) * counts[:, None]).long())
        error = torch.nn.functional.smooth_l1_loss(
            forward(parameters, x[at]), y[network, at], reduction="none", beta=0.05
        )
        mask = known[network, at]
        loss = ((error * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1)).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 5.0 * len(pools) ** 0.5)
        optimiser.step()
        schedule.step()
    return replace(start, parameters=[p.detach() for p in parameters])


def _untrained(profile: Profile, hidden: tuple[int, ...], each: bool, seed: int) -> Networks:
    scaling = Scaling.of(profile)
    outputs = len(profile.primitives)
    sizes = (len(scaling.x_mean), *hidden, 1 if each else outputs)
    generator = torch.Generator().manual_seed(seed)
    return Networks(scaling, initial(sizes, outputs if each else 1, generator), each)


def nn1(profile: Profile, *, seed: int = 0, steps: int = 2000) -> Networks:
    """One network for each primitive of `profile`."""
    return tune(_untrained(profile, NN1_HIDDEN, True, seed), profile, steps=steps, rate=4e-3, seed=seed)


def nn2(profile: Profile, *, seed: int = 0, steps: int = 3000) -> Networks:
    """One network for all primitives of `profile`."""
    return tune(_untrained(profile, NN2_HIDDEN, False, seed), profile, steps=steps, rate=1e-3, seed=seed)


def linear(profile: Profile) -> Networks:
    """Ridge regression of log(ms) for each primitive."""
    scaling = Scaling.of(profile)
    x = scaling.inputs(profile).numpy().astype(np.float64)
    y = (np.log(profile.ms) - scaling.y_mean) / scaling.y_std
    basis = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    weights = np.zeros((basis.shape[1], y.shape[1]))
    for j, column in enumerate(y.T):
        rows = basis[np.isfinite(column)]
        gram = rows.T @ rows + _RIDGE * np.eye(basis.shape[1])
        weights[:, j] = np.linalg.solve(gram, rows.T @ column[np.isfinite(column)])
    parts = (weights[None, :-1], weights[None, -1:])
    return Networks(scaling, [torch.from_numpy(part.astype(np.float32)) for part in parts], False)
