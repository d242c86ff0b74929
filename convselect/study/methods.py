"""The methods that are compared: each makes predictions for a machine from models of another and samples of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from convselect.costs.model import CostModel
from convselect.costs.samples import Samples
from convselect.costs.tables import Profile
from convselect.costs.transfer import Adapted
from convselect.study.learners import Networks, nn2, tune

Array = npt.NDArray[np.float64]
_SCRATCH_STEPS, _TUNE_STEPS = 500, 300


@dataclass(frozen=True)
class Source:
    """What was learned from the source machine. `profile` names the primitives of `linear`, `nn1` and `nn2`."""

    profile: Profile
    linear: Networks
    nn1: Networks
    nn2: Networks
    ours: CostModel


@dataclass(frozen=True)
class Prediction:
    """log(ms), f64 [n, P], and its deviation where the method knows one."""

    log_ms: Array
    std: Array | None = None


Method = Callable[[Source, Profile, Profile, int], Prediction]
"""(source, samples, asked, seed): predictions for `asked`'s rows and primitives; all three may differ in primitives."""


def columns(values: Array, have: Profile, want: Profile) -> Array:
    """`values` [n, have's primitives] for `want`'s; one that is missing gets its family's mean, or that of all."""
    at = {name: i for i, name in enumerate(have.primitives)}
    result = np.empty((len(values), len(want.primitives)))
    for j, (name, family) in enumerate(zip(want.primitives, want.families, strict=True)):
        members = [i for i, other in enumerate(have.families) if other == family] or list(range(len(have.families)))
        result[:, j] = values[:, at[name]] if name in at else values[:, members].mean(axis=1)
    return result


def factors(log_ms: Array, samples: Profile) -> Array:
    """What to add to the log of each primitive's time: the median over its samples, or its family's, or all."""
    rest = np.log(samples.ms) - log_ms
    result = np.zeros(rest.shape[1])
    for j, family in enumerate(samples.families):
        for members in ([j], [i for i, name in enumerate(samples.families) if name == family], slice(None)):
            known = rest[:, members][np.isfinite(rest[:, members])]
            if known.size:
                result[j] = np.median(known)
                break
    return result


def as_is(name: str) -> Method:
    """The source machine's model `name`, without adaptation."""

    def predict(source: Source, samples: Profile, asked: Profile, seed: int) -> Prediction:
        return Prediction(columns(getattr(source, name).log_ms(asked), source.profile, asked))

    return predict


def factor(name: str) -> Method:
    """The source machine's model `name`, with a factor for each primitive."""

    def predict(source: Source, samples: Profile, asked: Profile, seed: int) -> Prediction:
        known, wanted = (columns(getattr(source, name).log_ms(p), source.profile, p) for p in (samples, asked))
        return Prediction(wanted + factors(known, samples))

    return predict


def scratch(source: Source, samples: Profile, asked: Profile, seed: int) -> Prediction:
    """NN2 on the samples alone."""
    samples = samples.timed()
    network = nn2(samples, seed=seed, steps=_SCRATCH_STEPS)
    return Prediction(columns(network.log_ms(asked), samples, asked))


def fine_tuned(source: Source, samples: Profile, asked: Profile, seed: int) -> Prediction:
    """NN2 of the source machine, scaled to the samples by one factor and then trained further on them."""
    at = {name: i for i, name in enumerate(samples.primitives)}
    ms = np.full((len(samples), len(source.profile.primitives)), np.nan)
    for j, name in enumerate(source.profile.primitives):
        if name in at:
            ms[:, j] = samples.ms[:, at[name]]
    known = replace(samples, primitives=source.profile.primitives, families=source.profile.families, ms=ms)
    start, rest = source.nn2, np.log(ms) - source.nn2.log_ms(known)
    if np.isfinite(rest).any():
        shifted = replace(start.scaling, y_mean=start.scaling.y_mean + np.nanmedian(rest))
        start = tune(replace(start, scaling=shifted), known, steps=_TUNE_STEPS, rate=3e-4, seed=seed)
    return Prediction(columns(start.log_ms(asked), source.profile, asked))


def family_wise(source: Source, samples: Profile, asked: Profile, seed: int) -> Prediction:
    """Fine-tuning where only one family, the one with most timings in the samples, was timed on the target."""
    counts: Counter[str] = Counter()
    for name, count in zip(samples.families, np.isfinite(samples.ms).sum(axis=0), strict=True):
        counts[name] += int(count)
    family = max(counts, key=lambda name: counts[name])
    mask = np.array([name == family for name in samples.families])
    part = replace(samples, ms=np.where(mask, samples.ms, np.nan))
    return fine_tuned(source, part.take(np.nonzero(np.isfinite(part.ms).any(axis=1))[0]), asked, seed)


def ours(source: Source, samples: Profile, asked: Profile, seed: int) -> Prediction:
    """What the product does: `costs.Adapted`."""
    timings = Samples()
    for problem, threads, row in zip(samples.problems, samples.threads, samples.ms, strict=True):
        for name, ms in zip(samples.primitives, row, strict=True):
            if np.isfinite(ms):
                timings.add(problem, name, int(threads), float(ms))
    families = dict(zip(asked.primitives, asked.families, strict=True))
    return Prediction(*_by_threads(Adapted(source.ours, timings, families=families).log_predict, asked))


def unadapted(source: Source, samples: Profile, asked: Profile, seed: int) -> Prediction:
    """Our model of the source machine on that machine itself."""
    return Prediction(*_by_threads(source.ours.log_predict, asked))


def _by_threads(predict: Callable[..., tuple[Array, Array]], asked: Profile) -> tuple[Array, Array]:
    """Mean and deviation of log(ms) [n, P] from what predicts for one number of threads at a time."""
    candidates = list(zip(asked.primitives, asked.families, strict=True))
    mean, std = np.empty_like(asked.ms), np.empty_like(asked.ms)
    for threads in np.unique(asked.threads):
        rows = np.nonzero(asked.threads == threads)[0]
        mean[rows], std[rows] = predict([asked.problems[i] for i in rows], candidates, int(threads))
    return mean, std


RANDOM: Mapping[str, Method] = {
    "none": as_is("nn2"),
    "linear": factor("linear"),
    "nn1": factor("nn1"),
    "factor": factor("nn2"),
    "scratch": scratch,
    "finetune": fine_tuned,
    "family": family_wise,
    "ours_random": ours,
}
"""Method -> what it does with random samples."""
NEEDS_SAMPLES = frozenset({"scratch"})
"""Methods that say nothing without samples."""
CHOSEN: Mapping[str, Method] = {"ours_chosen": ours}
"""The same with samples that were chosen."""
