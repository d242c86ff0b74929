"""`CostModel`: predicts the time of every primitive on every problem. Inference in numpy; training is `train`'s."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convselect.costs.features import FEATURES, describe
from convselect.costs.operators import OperatorModel
from convselect.machine import Machine
from convselect.problem import ConvProblem

WEIGHTS = Path(__file__).parent / "weights"
SCHEMA = 2

FAMILY_STD = 0.6
"""Log deviation added for a primitive that is predicted by its family; twice as much for one of an unknown family."""
OUTSIDE_STD = 0.25
"""Added log deviation for each standard deviation that a feature lies outside of what a primitive was trained on."""

VIEW = tuple("mb g ic oc oh kh kw sh flops src dst weight patches rows depth threads".split())

Array = npt.NDArray[np.float64]
PrimitiveKey = tuple[str, str]
"""A primitive as cost models know it: its name and its family."""


def shipped(machine: Machine) -> Path:
    """The weights in this package for `machine`: of its instruction set, or AVX2's, the modest one, for any other.

    A GPU's, by its precision, may be missing.
    """
    path = WEIGHTS / f"{machine.model}.safetensors"
    return path if path.exists() or machine.device != "cpu" else WEIGHTS / "cpu_avx2.safetensors"


def silu(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x * sigmoid(x), written so that nothing overflows."""
    y: npt.NDArray[np.float32] = x * np.float32(0.5)
    y *= 1 + np.tanh(y)
    return y


@dataclass(frozen=True)
class Statistics:
    """Statistics of the training data: f32 [F] for each feature, [P] for each primitive, [P, F] for both.

    Residuals are log(ms / floor_ms). `std` is the model's own held-out error on them.
    """

    feature_mean: npt.NDArray[np.float32]
    feature_std: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    domain_low: npt.NDArray[np.float32]
    """[P, F], normalised features."""
    domain_high: npt.NDArray[np.float32]
    profile: npt.NDArray[np.float32]
    """[P, K]. Primitives whose times go up and down with the same problems have profiles close to each other, 1 being
    far enough to share little."""


@dataclass(frozen=True)
class CostModel:
    """An ensemble of small networks, one output for each primitive: the log of its time over the analytic prior.

    layers: (weight f32 [E, in, out], bias f32 [E, 1, out]) for each layer, E networks at once, SiLU between.
    info: what is known of the model: machine, date, dataset sizes, held-out errors overall and by family.
    """

    primitives: tuple[str, ...]
    families: tuple[str, ...]
    layers: tuple[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]], ...]
    statistics: Statistics
    operators: OperatorModel
    info: Mapping[str, Any] = field(default_factory=dict)

    def _residuals(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Normalised features [n, F] to log(ms / floor_ms) [E, n, P], kept to the range seen in training."""
        s = self.statistics
        h = np.broadcast_to(x, (self.layers[0][0].shape[0], *x.shape))
        for weight, bias in self.layers[:-1]:
            h = silu(np.matmul(h, weight) + bias)
        weight, bias = self.layers[-1]
        residuals: npt.NDArray[np.float32] = (np.matmul(h, weight) + bias) * s.scale + s.mean
        return residuals.clip(s.low - 1, s.high + 1)

    def view(self, problems: Sequence[ConvProblem], threads: npt.NDArray[np.int64] | int) -> Array:
        """What a deviation from the model may depend on: normalised features `VIEW`, f64 [n, len(VIEW)].

        Kept near the training data, as a slope reaches far.
        """
        s = self.statistics
        x = (describe(problems, threads)[0] - s.feature_mean) / s.feature_std
        x = np.clip(x, s.domain_low.min(axis=0) - 1, s.domain_high.max(axis=0) + 1)
        result: Array = x[:, [FEATURES.index(f"log_{name}") for name in VIEW]].astype(np.float64)
        return result

    @property
    def profile_parts(self) -> int:
        """Length of what `profile` returns."""
        return int(self.statistics.profile.shape[1])

    def profile(self, primitive: str, family: str) -> npt.NDArray[np.float32] | None:
        """The primitive's row of `statistics.profile`, or its family's mean; None if the model knows neither."""
        members = [i for i, name in enumerate(self.primitives) if name == primitive] or [
            i for i, name in enumerate(self.families) if name == family
        ]
        return self.statistics.profile[members].mean(axis=0) if members else None

    def prior_std(self, primitive: str, family: str) -> float:
        """Log deviation for want of training data: 0 for a primitive of the model, more for a family's prior."""
        if primitive in self.primitives:
            return 0.0
        return FAMILY_STD if family in self.families else 2 * FAMILY_STD

    def log_predict(
        self, problems: Sequence[ConvProblem], candidates: Sequence[PrimitiveKey], threads: int
    ) -> tuple[Array, Array]:
        """Mean and standard deviation of log(ms), both f64 [n, len(candidates)].

        The deviation is the held-out error, the disagreement of the ensemble and the distance from the
        training data, together. A primitive that the model does not know gets the geometric mean of those
        members of its family that were trained near the problem; of a family that it does not know, of all.
        """
        shape = (len(problems), len(candidates))
        if not problems or not candidates:
            return np.zeros(shape), np.zeros(shape)
        s = self.statistics
        raw, floor = describe(problems, threads)
        x = (raw - s.feature_mean) / s.feature_std
        nets = self._residuals(np.clip(x, s.domain_low.min(axis=0) - 1, s.domain_high.max(axis=0) + 1))
        known = nets.mean(axis=0, dtype=np.float64) + np.log(floor)[:, None]
        outside = np.maximum(s.domain_low[None] - x[:, None], x[:, None] - s.domain_high[None]).clip(min=0).max(axis=2)
        variance = s.std.astype(np.float64) ** 2 + nets.var(axis=0) + (OUTSIDE_STD * outside) ** 2

        column = {name: index for index, name in enumerate(self.primitives)}
        mean, std = np.empty(shape), np.empty(shape)
        for j, (primitive, family) in enumerate(candidates):
            if primitive in column:
                mean[:, j] = known[:, column[primitive]]
                std[:, j] = np.sqrt(variance[:, column[primitive]])
                continue
            members = [i for i, name in enumerate(self.families) if name == family]
            if members:
                weight = np.exp(-outside[:, members]) + 1e-9
                weight /= weight.sum(axis=1, keepdims=True)
                mean[:, j] = (known[:, members] * weight).sum(axis=1)
                std[:, j] = np.sqrt((variance[:, members] * weight).sum(axis=1) + FAMILY_STD**2)
            else:
                mean[:, j] = known.mean(axis=1)
                std[:, j] = np.sqrt(variance.mean(axis=1) + (2 * FAMILY_STD) ** 2)
        return mean, std

    def predict(self, problems: Sequence[ConvProblem], candidates: Sequence[PrimitiveKey], threads: int) -> Array:
        """Milliseconds, f64 [n, len(candidates)], whether or not a primitive can run the problem."""
        result: Array = np.exp(self.log_predict(problems, candidates, threads)[0])
        return result

    def save(self, path: Path) -> None:
        """Writes the weights as safetensors, with everything else as JSON in its header."""
        tensors = {f"statistics.{name}": value for name, value in vars(self.statistics).items()}
        for i, (weight, bias) in enumerate(self.layers):
            tensors |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": bias}
        header = {
            "schema": SCHEMA,
            "features": FEATURES,
            "primitives": self.primitives,
            "families": self.families,
            "operators": self.operators.to_json(),
            "info": dict(self.info),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in tensors.items()},
            path,
            metadata={"convselect": json.dumps(header)},
        )

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """What `save` wrote; `shipped` names the weights of this package.

        Raises `FileNotFoundError` where there are none, `ValueError` for a file that is damaged or was trained
        for other features.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no cost model at {path}; make one with: convselect profile --out P.parquet && "
                f"convselect train P.parquet --out {path}"
            )
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {})["convselect"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a cost model of convselect: {error}") from error
        if header["schema"] != SCHEMA or tuple(header["features"]) != FEATURES:
            raise ValueError(
                f"{path} was trained for other features than this version's (schema {header['schema']}, here {SCHEMA});"
                " train it again with: convselect train"
            )
        depth = sum(name.endswith(".bias") for name in tensors)
        return cls(
            tuple(header["primitives"]),
            tuple(header["families"]),
            tuple((tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]) for i in range(depth)),
            Statistics(**{k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("statistics.")}),
            OperatorModel.from_json(header["operators"]),
            header["info"],
        )
