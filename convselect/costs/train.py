"""Training of the cost network from profile tables, in torch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from rich.progress import Progress

from convselect.costs.features import describe
from convselect.costs.metrics import TWO_SIDED_90, mdrae, quality
from convselect.costs.model import CostModel, Statistics
from convselect.costs.operators import OperatorModel
from convselect.costs.tables import Profile, group, read, read_operators

Array = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]


_PROFILE_ROWS, _PROFILE_PARTS = 1000, 16
_PROFILE_UNIT = 0.55
"""Part of the median distance of two primitives at which they share little."""


@dataclass(frozen=True)
class Settings:
    """The size of the networks, and their training."""

    hidden: tuple[int, ...] = (128, 128, 128)
    ensemble: int = 3
    steps: int = 4000
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
        mean,
        std,
        per["mean"].astype(np.float32),
        np.maximum(per["std"], 0.05).astype(np.float32),
        per["min"].astype(np.float32),
        per["max"].astype(np.float32),
        np.full(len(profile.primitives), 0.1, np.float32),
        low,
        high,
        np.zeros((len(profile.primitives), 1), np.float32),
    )


def _profiles(model: CostModel, profile: Profile) -> F32:
    """`Statistics.profile`: the principal parts of what the model predicts for the rows, so that the distance of two
    primitives is that of their log times over the rows, each centred, in units of most pairs' distance.
    """
    some = profile.take(np.random.default_rng(0).permutation(len(profile))[:_PROFILE_ROWS])
    logs = np.log(predict_rows(model, some)[0])
    logs -= logs.mean(axis=0)
    parts, sizes, _ = np.linalg.svd(logs.T / len(some) ** 0.5, full_matrices=False)
    points = (parts * sizes)[:, :_PROFILE_PARTS]
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)[np.triu_indices(len(points), 1)]
    unit = np.median(distances) * _PROFILE_UNIT if distances.size else 1.0
    result: F32 = (points / max(unit, 1e-6)).astype(np.float32)
    return result


def initial(sizes: Sequence[int], networks: int, generator: torch.Generator) -> list[torch.Tensor]:
    """He-initialised weights f32 [E, in, out] and biases [E, 1, out], in turn; the last layer starts small."""
    parameters = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        gain = 0.1 if i == len(sizes) - 2 else 2**0.5
        weight = torch.randn(networks, fan_in, fan_out, generator=generator) * (gain / fan_in**0.5)
        parameters += [weight.requires_grad_(), torch.zeros(networks, 1, fan_out).requires_grad_()]
    return parameters


def forward(parameters: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """x [E, n, F] -> [E, n, P]."""
    for i in range(0, len(parameters), 2):
        x = torch.baddbmm(parameters[i + 1], x, parameters[i])
        if i + 2 < len(parameters):
            x = torch.nn.functional.silu(x)
    return x


def _masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the masked entries of [E, n, P], for each network [E]."""
    return (values * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and on a busy machine wait for it: 5 s became 180 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def fit(
    profile: Profile,
    *,
    settings: Settings = Settings(),
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "training",
) -> CostModel:
    """Networks for all of `profile`: each is trained without, and stopped early by, another part of the groups.

    Raises `ValueError` where the profile has fewer than two groups of (ic, oc, ih).
    """
    profile = profile.timed()
    if len(set(map(group, profile.problems))) < 2:
        raise ValueError("the profile has problems of one (ic, oc, ih) only; training needs two at least")
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
    parameters = initial((z.shape[1], *settings.hidden, y.shape[1]), e, generator)
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
        error = (forward(parameters, z[index]) - y[index]) * scale
        loss = _masked(
            torch.nn.functional.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=0.02),
            known[index],
        ).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 5.0 * e**0.5)
        optimiser.step()
        schedule.step()
        if progress is not None and task is not None:
            progress.advance(task)
        if step % every == 0:
            with torch.no_grad():
                error = (forward(parameters, z.expand(e, *z.shape)) - y) * scale
                valid = _masked(error.abs(), held[:, :, None] & known)
            better = valid < least
            least, stale = torch.where(better, valid, least), torch.where(better, 0, stale + 1)
            for kept, now in zip(best, parameters, strict=True):
                kept[better] = now.detach()[better]
            if (stale >= settings.patience).all():
                break
    if progress is not None and task is not None:
        progress.update(task, completed=settings.steps)
    layers = tuple((w.numpy(), b.numpy()) for w, b in zip(best[0::2], best[1::2], strict=True))
    model = CostModel(profile.primitives, profile.families, layers, statistics, OperatorModel())
    return replace(model, statistics=replace(statistics, profile=_profiles(model, profile)))


def predict_rows(model: CostModel, profile: Profile) -> tuple[Array, Array]:
    """Predicted ms and log deviation, both [n, P], of `profile`'s own rows and primitives."""
    candidates = list(zip(profile.primitives, profile.families, strict=True))
    mean, std = np.empty_like(profile.ms), np.empty_like(profile.ms)
    for threads in np.unique(profile.threads):
        rows = np.nonzero(profile.threads == threads)[0]
        mean[rows], std[rows] = model.log_predict([profile.problems[i] for i in rows], candidates, int(threads))
    return np.exp(mean), std


def _residual_std(error: Array, rest: Array, families: Sequence[str]) -> F32:
    """For each primitive, what `rest` [n, P] (deviation explained otherwise) lacks to cover 90% of `error` [n, P].

    `error` is of log(ms), NaN where not timed. A primitive with few timings takes its family's, or all of them.
    """
    result = np.empty(error.shape[1], np.float32)
    for j, family in enumerate(families):
        for columns in ([j], [i for i, name in enumerate(families) if name == family], list(range(len(families)))):
            known = np.isfinite(error[:, columns])
            if known.sum() >= 20 or len(columns) == len(families):
                break
        if not known.any():
            result[j] = 0.1
            continue
        covered = np.quantile(np.abs(error[:, columns][known]), 0.9) / TWO_SIDED_90
        result[j] = np.sqrt(max(covered**2 - np.median(rest[:, columns][known]) ** 2, 1e-4))
    return result


def _evaluate(model: CostModel, held: Profile) -> tuple[CostModel, dict[str, Any]]:
    """`model` with its deviations set by the held-out rows, and its errors on them as plain data."""
    bare = replace(model, statistics=replace(model.statistics, std=np.zeros_like(model.statistics.std)))
    predicted, rest = predict_rows(bare, held)
    error = np.log(held.ms / predicted)
    column = {name: i for i, name in enumerate(held.primitives)}
    order = [column[name] for name in model.primitives]
    std = _residual_std(error[:, order], rest[:, order], model.families)
    model = replace(model, statistics=replace(model.statistics, std=std))
    known = np.isfinite(held.ms)
    inside = np.abs(error) <= TWO_SIDED_90 * predict_rows(model, held)[1]
    by_family = {}
    for family in sorted(set(held.families)):
        columns = [i for i, name in enumerate(held.families) if name == family]
        if known[:, columns].any():
            by_family[family] = {
                "timings": int(known[:, columns].sum()),
                "mdrae": mdrae(predicted[:, columns], held.ms[:, columns]),
            }
    return model, {
        "problems": len(set(held.problems)),
        "timings": held.timings,
        **quality(predicted, held.ms)._asdict(),
        "coverage_90": float(inside[known].mean()),
        "families": by_family,
    }


def learn(
    profile: Profile,
    *,
    holdout: float = 0.2,
    refit: bool = True,
    seed: int = 0,
    settings: Settings = Settings(),
    progress: Progress | None = None,
) -> tuple[CostModel, dict[str, Any]]:
    """A model whose deviations were measured on held-out rows, and its errors there. The arguments are `train`'s."""
    held = profile.held_out(holdout, seed)
    model = fit(profile.take(~held), settings=settings, seed=seed, progress=progress)
    errors: dict[str, Any] = {}
    if held.any():
        model, errors = _evaluate(model, profile.take(held))
    if refit and held.any():
        measured = dict(zip(model.primitives, model.statistics.std, strict=True))
        model = fit(profile, settings=settings, seed=seed, progress=progress, label="training on all rows")
        worst = max(measured.values())
        std = np.array([measured.get(name, worst) for name in model.primitives], np.float32)
        model = replace(model, statistics=replace(model.statistics, std=std))
    return model, errors


def train(
    tables: Sequence[Path | str | pa.Table],
    *,
    operators: Sequence[Path | str | pa.Table] = (),
    out: Path | None = None,
    families: Mapping[str, str] | None = None,
    machine: str = "",
    holdout: float = 0.2,
    refit: bool = True,
    seed: int = 0,
    settings: Settings = Settings(),
    progress: bool = True,
) -> CostModel:
    """Fits a cost model to profile tables, writes it to `out` and returns it.

    Args:
        tables: in the long format, of one machine; those of another ISA belong to another model.
        operators: tables with columns key, bytes, threads, ms; of layout transforms and of other operators.
        families: primitive -> family, where the tables do not say.
        machine: description, where the tables do not say.
        holdout: part of the (ic, oc, ih) groups that the reported errors are measured on.
        refit: train once more on all rows after measuring the errors on the held-out ones.

    `model.info` has machines, date, problems, timings, threads, held_out {problems, timings, mdrae,
    slowdown_total, slowdown_geomean, coverage_90, families {name: {timings, mdrae}}}, operators {key: error}, train_s.
    """
    start = time.perf_counter()
    profile = read(tables, families)
    lines = OperatorModel.fit(read_operators(operators))
    with Progress(disable=not progress, transient=True) as bar:
        model, errors = learn(profile, holdout=holdout, refit=refit, seed=seed, settings=settings, progress=bar)
    info = {
        "machines": sorted({name for name in profile.machines if name} | ({machine} if machine else set())),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "problems": len(set(profile.problems)),
        "timings": profile.timings,
        "threads": sorted({int(t) for t in profile.threads}),
        "held_out": errors,
        "operators": {key: max(line.error for line in by.values()) for key, by in lines.lines.items()},
        "train_s": round(time.perf_counter() - start, 1),
    }
    model = replace(model, operators=lines, info=info)
    if out is not None:
        model.save(out)
    return model
