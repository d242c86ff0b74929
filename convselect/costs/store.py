"""The calibration cache: what was timed on a machine, kept from run to run.

Two files a machine fingerprint: `F.json` describes the data, `F.<its sha256, 16 digits>.safetensors` holds it.
The data is written first and never changed, then the JSON is replaced: a reader sees the old pair or the new one.
Both carry a hash, and any damage is a miss.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import platformdirs
import safetensors.numpy
from filelock import FileLock
from safetensors import SafetensorError

from convselect.costs.operators import OperatorTiming
from convselect.costs.samples import Samples, Timing
from convselect.errors import ConvselectWarning
from convselect.files import replaced
from convselect.machine import Machine
from convselect.problem import DIMENSIONS, ConvProblem

SCHEMA = 2
_FIELDS = {"machine": str, "saved": str, "timings": int, "operators": int, "sha256": str}
"""What is read of the JSON beside the schema and the check, and its types."""
LOCK_TIMEOUT_S = 20.0
CALIBRATION_TIMEOUT_S = 60.0

_unsaved: dict[tuple[Path | None, str], Samples] = {}
"""(directory, fingerprint) -> what could not be written; it lasts as long as the process."""
_warned: set[Path | None] = set()
_guard = threading.Lock()

T = TypeVar("T")


class Damage(Exception):
    """A file of the cache is not what was written; the message says how."""


@dataclass(frozen=True)
class Entry:
    """A calibration on disk. `damage` says what is wrong with it; None: it is sound."""

    fingerprint: str
    path: Path
    machine: str
    saved: str
    timings: int
    operators: int
    nbytes: int
    damage: str | None


def directory() -> Path | None:
    """`CONVSELECT_CACHE`, or the user's cache directory for convselect; None for a user without a home directory."""
    if chosen := os.environ.get("CONVSELECT_CACHE"):
        return Path(chosen)
    try:
        path = platformdirs.user_cache_path("convselect")
    except RuntimeError:
        return None
    return path if path.is_absolute() else None  # older platformdirs give one that begins with "~"


def _encode(samples: Samples) -> bytes:
    """safetensors: problem int64 [n, 14] as in `ConvProblem`, primitive and key int64 indices into `names`,
    threads int64, nbytes int64, ms f64; seconds f64 [1]; `names` uint8, a JSON list of strings."""
    names: dict[str, int] = {}
    dimensions = [list(asdict(ConvProblem.parse(t.problem)).values()) for t in samples.timings]

    def integers(values: Iterator[int] | list[list[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array(list(values), dtype=np.int64)

    tensors = {
        "problem": integers(dimensions).reshape(len(dimensions), 14),
        "primitive": integers(names.setdefault(t.primitive, len(names)) for t in samples.timings),
        "threads": integers(t.threads for t in samples.timings),
        "ms": np.array([t.ms for t in samples.timings], dtype=np.float64),
        "operator.key": integers(names.setdefault(t.key, len(names)) for t in samples.operators),
        "operator.nbytes": integers(t.nbytes for t in samples.operators),
        "operator.threads": integers(t.threads for t in samples.operators),
        "operator.ms": np.array([t.ms for t in samples.operators], dtype=np.float64),
        "seconds": np.array([samples.seconds], dtype=np.float64),
    }
    tensors["names"] = np.frombuffer(json.dumps(list(names)).encode(), dtype=np.uint8)
    return safetensors.numpy.save(tensors)


def _decode(data: bytes) -> Samples:
    t = safetensors.numpy.load(data)
    names = json.loads(t["names"].tobytes())
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("the names are not a list of strings")
    times = np.concatenate([t["ms"], t["operator.ms"]])
    if not (np.isfinite(times) & (times > 0)).all():
        raise ValueError("a time is not positive and finite")
    columns = (t["primitive"], t["threads"], t["ms"])
    operators = (t["operator.key"], t["operator.nbytes"], t["operator.threads"], t["operator.ms"])
    return Samples(
        [
            Timing(str(ConvProblem(**dict(zip(DIMENSIONS, dims, strict=True)))), names[name], threads, ms)
            for dims, name, threads, ms in zip(t["problem"].tolist(), *(c.tolist() for c in columns), strict=True)
        ],
        [
            OperatorTiming(names[key], nbytes, threads, ms)
            for key, nbytes, threads, ms in zip(*(c.tolist() for c in operators), strict=True)
        ],
        float(t["seconds"][0]),
    )


def _check(record: dict[str, Any]) -> str:
    """sha256 of the other fields of the JSON."""
    rest = {key: value for key, value in record.items() if key != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _record(path: Path) -> dict[str, Any]:
    """The JSON at `path`. Raises `Damage`; `OSError` where it cannot be read."""
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        whole = isinstance(record, dict) and record.get("check") == _check(record)
    except (ValueError, RecursionError) as error:
        raise Damage(f"{path} is not JSON: {error}") from error
    if not whole:
        raise Damage(f"{path} does not match its own hash")
    if record.get("schema") != SCHEMA:
        raise Damage(f"{path} is not of schema {SCHEMA}, which is what this version reads")
    for name, kind in _FIELDS.items():
        if not isinstance(record.get(name), kind):
            raise Damage(f"{path} has no {name} that is {kind.__name__}")
    if not re.fullmatch("[0-9a-f]{64}", record["sha256"]):
        raise Damage(f"{path} has no sha256 of 64 digits")
    return record


def _data_path(path: Path, sha256: str) -> Path:
    """The path of the data with that digest, which the JSON at `path` describes."""
    return path.with_name(f"{path.stem}.{sha256[:16]}.safetensors")


def _read(path: Path) -> Samples:
    """The samples that the JSON at `path` names. Raises `Damage`; `OSError` where it cannot be read."""
    record = _record(path)
    data_path = _data_path(path, record["sha256"])
    data = data_path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise Damage(f"{data_path} does not match the hash in {path.name}")
    try:
        return _decode(data)
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise Damage(f"{data_path} does not hold timings: {error!r}") from error


def _version(path: Path) -> tuple[int, int] | None:
    """Differs where the file at `path` was replaced; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _settled(path: Path, read: Callable[[Path], T]) -> T:
    """`read(path)`, again where it fails because another process has just replaced the JSON at `path` and its data."""
    while True:
        before = _version(path)
        try:
            return read(path)
        except (OSError, Damage):
            if _version(path) == before:
                raise


def _on_disk(folder: Path | None, fingerprint: str) -> Samples | None:
    if folder is None:
        return None
    try:
        return _settled(folder / f"{fingerprint}.json", _read)
    except (OSError, Damage):
        return None


def load(machine: Machine) -> Samples | None:
    """What was timed on `machine`, by this process or an earlier one; None if nothing was, or if it is damaged."""
    folder = directory()
    stored = _on_disk(folder, machine.fingerprint)
    with _guard:
        unsaved = _unsaved.get((folder, machine.fingerprint))
    if stored is None or unsaved is None:
        return unsaved if stored is None else stored
    return stored.merged(unsaved)


@contextmanager
def _locked(folder: Path | None, name: str = ".lock", timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[Path]:
    """Creates `folder` and holds its lock `name`. `OSError` where that is impossible, `filelock.Timeout` among them."""
    if folder is None:
        raise FileNotFoundError("the user has no home directory")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / name, timeout=timeout_s):
        yield folder


@contextmanager
def calibrating() -> Iterator[None]:
    """Waits while another thread or process calibrates, as side by side they would time each other.

    Not where the cache cannot be written, which `save` warns of, nor longer than `CALIBRATION_TIMEOUT_S`.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(_locked(directory(), ".calibrating.lock", CALIBRATION_TIMEOUT_S))
        yield


def _write(path: Path, data: bytes) -> None:
    with replaced(path) as new:
        new.write_bytes(data)


def save(machine: Machine, samples: Samples) -> Samples:
    """Adds `samples` to what is stored for `machine`, and returns all of it.

    Where the cache cannot be written, the samples last as long as the process, and one `ConvselectWarning` for the
    directory says why.
    """
    wanted, fingerprint = directory(), machine.fingerprint
    key = wanted, fingerprint
    with _guard:
        samples = _unsaved.pop(key, Samples()).merged(samples)
    try:
        with _locked(wanted) as folder:
            merged = (_on_disk(folder, fingerprint) or Samples()).merged(samples)
            data = _encode(merged)
            digest = hashlib.sha256(data).hexdigest()
            record = {
                "schema": SCHEMA,
                "fingerprint": fingerprint,
                "machine": str(machine),
                "description": asdict(machine),
                "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "timings": len(merged.timings),
                "operators": len(merged.operators),
                "sha256": digest,
            }
            record["check"] = _check(record)
            path = folder / f"{fingerprint}.json"
            _write(_data_path(path, digest), data)
            _write(path, json.dumps(record, indent=1).encode())
            for old in {*folder.glob(f"{fingerprint}.*.safetensors"), *folder.glob(f".{fingerprint}.*")}:
                if old != _data_path(path, digest):  # earlier data, or what a process was writing when it was killed
                    old.unlink(missing_ok=True)
            return merged
    except OSError as error:
        with _guard:
            _unsaved[key] = samples
            first = wanted not in _warned
            _warned.add(wanted)
        if first:
            where = "" if wanted is None else f" in {wanted}"
            warnings.warn(
                f"the calibration cannot be kept{where} ({error}); it lasts until this process ends. "
                "Set CONVSELECT_CACHE to a directory that can be written",
                ConvselectWarning,
                stacklevel=2,
            )
        return load(machine) or samples


def _entry(path: Path) -> Entry:
    record: dict[str, Any] = {}
    damage = None
    size = 0
    try:
        record = _settled(path, _record)
        size = path.stat().st_size + _data_path(path, record["sha256"]).stat().st_size
        _settled(path, _read)
    except (OSError, Damage) as error:
        damage = str(error)
    return Entry(
        path.stem,
        path,
        record.get("machine", ""),
        record.get("saved", ""),
        record.get("timings", 0),
        record.get("operators", 0),
        size,
        damage,
    )


def entries() -> list[Entry]:
    """All calibrations in the cache, sound or damaged, in order of fingerprint."""
    folder = directory()
    if folder is None or not os.path.isdir(folder):
        return []
    return [_entry(path) for path in sorted(folder.glob("*.json"))]


def verify() -> list[Entry]:
    """The damaged ones among `entries`."""
    return [entry for entry in entries() if entry.damage is not None]


def clear() -> int:
    """Removes all calibrations, on disk and of this process; the number of those on disk.

    Raises `OSError` where the directory cannot be written.
    """
    folder = directory()
    with _guard:
        for key in [key for key in _unsaved if key[0] == folder]:
            del _unsaved[key]
    if folder is None or not os.path.isdir(folder):
        return 0
    with _locked(folder):
        found = list(folder.glob("*.json"))
        for pattern in ("*.json", "*.safetensors", ".*.json.*", ".*.safetensors.*"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
    return len(found)
