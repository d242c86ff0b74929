"""Training of the cost network from profile tables, in torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from rich.progress import Progress

from convselect.costs.features import describe
from convselect.costs.metrics import mdrae, quality
from convselect.costs.network import CostModel, Statistics
from convselect.costs.operators import OperatorModel
from convselect.costs.tables import Profile, read, read_operators

Array = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """Of the networks and their training."""

    hidden: tuple[int, ...] = (192, 192, 192)
    ensemble: int = 3
    steps: int = 8000
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    validation: float = 0.1
    """Part of the training groups that stops each network early, another part for each."""
    patience: int = 12
    """Evaluations without a better validation error, of `steps` / `evaluations` steps each, before training stops."""
    evaluations: int = 40


def _statistics(profile: Profile, x: F32, target: Array) -> Statistics:
    """`x` [n, F] raw features; `target` [n, P] log residuals, NaN where not timed."""
    mean, std = x.mean(axis=0), x.std(axis=0)
    std = np.where(std < 1e-6, 1, std)
    z = (x - mean) / std
    known = np.isfinite(target)
    low = np.stack([z[rows].min(axis=0) for rows in known.T])
    high = np.stack([z[rows].max(axis=0) for rows in known.T])
    per = {name: getattr(np, f"nan{name}")(target, axis=0) for name in ("mean", "std", "min", "max")}
    return Statistics(
        mean, std, per["mean"].astype(np.float32), np.maximum(per["std"], 0.05).astype(np.float32),
        per["min"].astype(np.float32), per["max"].astype(np.float32),
        np.full(len(profile.primitives), 0.1, np.float32), low, high,
    )  # fmt: skip


def _initial(sizes: Sequence[int], networks: int, generator: torch.Generator) -> list[torch.Tensor]:
    """He-initialised weights f32 [E, in, out] and biases [E, 1, out], in turn; the last layer starts small."""
    parameters = []
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        gain = 0.1 if i == len(sizes) - 2 else 2**0.5
        weight = torch.randn(networks, fan_in, fan_out, generator=generator) * (gain / fan_in**0.5)
        parameters += [weight.requires_grad_(), torch.zeros(networks, 1, fan_out).requires_grad_()]
    return parameters


def _forward(parameters: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """x [E, n, F] -> [E, n, P]."""
    for i in range(0, len(parameters), 2):
        x = torch.baddbmm(parameters[i + 1], x, parameters[i])
        if i + 2 < len(parameters):
            x = torch.nn.functional.silu(x)
    return x


def _masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the masked entries of [E, n, P], for each network [E]."""
    return (values * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1)


def fit(
    profile: Profile, *, settings: Settings = Settings(), seed: int = 0, progress: Progress | None = None,  # noqa: B008
    label: str = "training",
) -> CostModel:  # fmt: skip
    """Networks for all of `profile`: each is trained without, and stopped early by, another part of the groups."""
    x, floor = describe(profile.problems, profile.threads)
    target = np.log(profile.ms) - np.log(floor)[:, None]
    statistics = _statistics(profile, x, target)
    z = torch.from_numpy((x - statistics.feature_mean) / statistics.feature_std)
    known = torch.from_numpy(np.isfinite(target))
    scale = torch.from_numpy(statistics.scale)
    y = torch.from_numpy(np.nan_to_num((target - statistics.mean) / statistics.scale).astype(np.float32))

    e = settings.ensemble
    held = torch.stack([torch.from_numpy(profile.held_out(settings.validation, seed + 101 * i)) for i in range(e)])
    pools = [torch.nonzero(~row).flatten() for row in held]
    generator = torch.Generator().manual_seed(seed)
    parameters = _initial((z.shape[1], *settings.hidden, y.shape[1]), e, generator)
    best = [p.detach().clone() for p in parameters]
    least, stale = torch.full((e,), torch.inf), torch.zeros(e)
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    every = max(1, settings.steps // settings.evaluations)
    task = None if progress is None else progress.add_task(label, total=settings.steps)
    for step in range(1, settings.steps + 1):
        index = torch.stack([pool[torch.randint(len(pool), (settings.batch,), generator=generator)] for pool in pools])
        error = (_forward(parameters, z[index]) - y[index]) * scale
        loss = _masked(torch.nn.functional.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=0.02),
                       known[index]).sum()  # fmt: skip
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 5.0 * e**0.5)
        optimiser.step()
        schedule.step()
        if progress is not None and task is not None:
            progress.advance(task)
        if step % every == 0:
            with torch.no_grad():
                error = (_forward(parameters, z.expand(e, *z.shape)) - y) * scale
                valid = _masked(error.abs(), held[:, :, None] & known)
            better = valid < least
            least, stale = torch.where(better, valid, least), torch.where(better, 0, stale + 1)
            for kept, now in zip(best, parameters, strict=True):
                kept[better] = now.detach()[better]
            if (stale >= settings.patience).all():
                break
    if progress is not None and task is not None:
        progress.update(task, completed=settings.steps)
    layers = tuple(
        (w.numpy(), b.numpy()) for w, b in zip(best[0::2], best[1::2], strict=True)
    )
    return CostModel(profile.primitives, profile.families, layers, statistics, OperatorModel())


def predict_rows(model: CostModel, profile: Profile) -> Array:
    """Predicted ms [n, P] of `profile`'s own rows and primitives."""
    candidates = list(zip(profile.primitives, profile.families, strict=True))
    predicted = np.empty_like(profile.ms)
    for threads in np.unique(profile.threads):
        rows = np.nonzero(profile.threads == threads)[0]
        predicted[rows] = model.predict([profile.problems[i] for i in rows], candidates, int(threads))
    return predicted
