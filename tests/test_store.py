"""The calibration cache: kept, merged, and never an exception, whatever happened to its files."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from convselect.costs import Samples, store
from convselect.errors import ConvselectWarning
from convselect.machine import Machine

MACHINE = Machine("cpu", "made up", "avx2", 2, 2, 32768, 1 << 20, 0)
PROBLEM = "mb1_g1ic64ih56iw56oc64oh56ow56kh3kw3sh1sw1ph1pw1dh1dw1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_unsaved", {})
    monkeypatch.setattr(store, "_warned", set())
    return tmp_path / "cache"


def samples(*names: str, ms: float = 1.25) -> Samples:
    found = Samples()
    for name in names:
        found.add(PROBLEM, name, 2, ms)
    found.add_operator("to_nhwc", 802_816, 2, 0.1)
    return found


def names(found: Samples | None) -> set[str]:
    return {t.primitive for t in found.timings} if found else set()


def test_what_is_saved_is_loaded() -> None:
    assert store.load(MACHINE) is None
    store.save(MACHINE, samples("direct_nhwc", "im2row_nhwc"))
    found = store.load(MACHINE)
    assert found == samples("direct_nhwc", "im2row_nhwc")
    assert store.load(Machine("cpu", "another", "avx2", 2, 2, 32768, 1 << 20, 0)) is None


def test_saving_merges_and_keeps_the_least(folder: Path) -> None:
    store.save(MACHINE, samples("a", ms=2.0))
    store.save(MACHINE, samples("b", "a", ms=1.0))
    merged = store.save(MACHINE, samples("a", ms=3.0))
    assert merged == store.load(MACHINE)
    assert {t.primitive: t.ms for t in merged.timings} == {"a": 1.0, "b": 1.0}
    assert len(merged.operators) == 1
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_seconds_add_up() -> None:
    store.save(MACHINE, Samples(seconds=0.5))
    store.save(MACHINE, Samples(seconds=0.25))
    assert store.load(MACHINE) == Samples(seconds=0.75)


def test_one_calibration_at_a_time() -> None:
    order = []

    def work() -> None:
        with store.calibrating():
            order.append("a")
            time.sleep(0.05)
            order.append("b")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "".join(order) == "ababab"


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "absent", "bits"])
def test_any_damage_is_a_miss(folder: Path, suffix: str, damage: str) -> None:
    store.save(MACHINE, samples("a"))
    path = next(folder.glob(f"*{suffix}"))
    whole = path.read_bytes()
    if damage == "absent":
        path.unlink()
        assert store.load(MACHINE) is None
    for position in range(0, len(whole), 37) if damage == "bits" else ():
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert store.load(MACHINE) is None, position
    if damage in ("truncated", "empty"):
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
        assert store.load(MACHINE) is None
    if not (damage == "absent" and suffix == ".json"):
        assert [entry.fingerprint for entry in store.verify()] == [MACHINE.fingerprint]
    store.save(MACHINE, samples("b"))
    assert names(store.load(MACHINE)) == {"b"}
    assert store.verify() == []


@pytest.mark.parametrize(
    "text", ["[]", "3", '"x"', "{}", '{"schema": 1}', "null", pytest.param("[" * 100_000, id="deep")]
)
def test_json_that_is_no_record_is_a_miss(folder: Path, text: str) -> None:
    store.save(MACHINE, samples("a"))
    (folder / f"{MACHINE.fingerprint}.json").write_text(text)
    assert store.load(MACHINE) is None
    assert len(store.verify()) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", "a\0"),
        ("sha256", "../../x"),
        ("sha256", None),
        ("timings", "x"),
        ("operators", None),
        ("machine", 3),
        ("saved", {}),
    ],
)
def test_a_field_that_is_none_is_a_miss(folder: Path, field: str, value: object) -> None:
    """Even where the JSON is made to match its hash."""
    store.save(MACHINE, samples("a"))
    path = folder / f"{MACHINE.fingerprint}.json"
    record = {**json.loads(path.read_text()), field: value}
    path.write_text(json.dumps({**record, "check": store._check(record)}))
    assert store.load(MACHINE) is None
    (entry,) = store.entries()
    assert field in str(entry.damage)
    assert (entry.timings, entry.operators, entry.machine) == (0, 0, "")


def test_another_schema_is_a_miss(folder: Path) -> None:
    store.save(MACHINE, samples("a"))
    path = folder / f"{MACHINE.fingerprint}.json"
    record = {**json.loads(path.read_text()), "schema": store.SCHEMA + 1}
    path.write_text(json.dumps({**record, "check": store._check(record)}))
    assert store.load(MACHINE) is None
    assert "schema" in str(store.entries()[0].damage)


@pytest.mark.parametrize("names", ['[3, "to_nhwc"]', '{"0": 1}', '"ab"', pytest.param("[" * 100_000, id="deep")])
def test_names_that_are_none_are_a_miss(folder: Path, names: str) -> None:
    store.save(MACHINE, samples("a"))
    path = folder / f"{MACHINE.fingerprint}.json"
    record = json.loads(path.read_text())
    tensors = safetensors.numpy.load(store._data_path(path, record["sha256"]).read_bytes())
    data = safetensors.numpy.save({**tensors, "names": np.frombuffer(names.encode(), dtype=np.uint8)})
    record["sha256"] = hashlib.sha256(data).hexdigest()
    store._data_path(path, record["sha256"]).write_bytes(data)
    path.write_text(json.dumps({**record, "check": store._check(record)}))
    assert store.load(MACHINE) is None
    assert len(store.verify()) == 1


def test_data_with_a_right_hash_but_no_timings_is_a_miss(folder: Path) -> None:
    store.save(MACHINE, samples("a"))
    path = folder / f"{MACHINE.fingerprint}.json"
    record = json.loads(path.read_text())
    record["sha256"] = hashlib.sha256(b"nothing").hexdigest()
    store._data_path(path, record["sha256"]).write_bytes(b"nothing")
    path.write_text(json.dumps({**record, "check": store._check(record)}))
    assert store.load(MACHINE) is None
    assert len(store.verify()) == 1


def test_a_directory_that_cannot_be_made_warns_once_and_the_samples_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(ConvselectWarning, match="file/cache"):
        store.save(MACHINE, samples("a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.save(MACHINE, samples("b"))
        assert names(store.load(MACHINE)) == {"a", "b"}
        assert store.entries() == []
        assert store.clear() == 0
    assert store.load(MACHINE) is None


def test_a_read_only_directory_is_read_and_the_rest_lasts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(MACHINE, samples("a"))

    def refuse(source: object, target: object) -> None:
        raise PermissionError(13, "Permission denied", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.warns(ConvselectWarning, match="Permission denied"):
            merged = store.save(MACHINE, samples("b"))
        assert names(merged) == names(store.load(MACHINE)) == {"a", "b"}
        assert {path.name for path in folder.iterdir() if path.name.startswith(".")} <= {".lock"}
    store.save(MACHINE, samples("c"))
    monkeypatch.setattr(store, "_unsaved", {})
    assert names(store.load(MACHINE)) == {"a", "b", "c"}


def test_entries_and_clear(folder: Path) -> None:
    assert store.entries() == []
    store.save(MACHINE, samples("a", "b"))
    (entry,) = store.entries()
    assert (entry.timings, entry.operators, entry.damage, entry.machine) == (2, 1, None, str(MACHINE))
    assert entry.nbytes > 0
    assert store.clear() == 1
    assert store.entries() == []
    assert store.load(MACHINE) is None
    assert not list(folder.glob("*.safetensors"))


def test_what_a_killed_process_was_writing_is_removed(folder: Path) -> None:
    store.save(MACHINE, samples("a"))
    half = [folder / f".{path.name}.x7" for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
    assert len(half) == 2
    for clean in (lambda: store.save(MACHINE, samples("b")), store.clear):
        for path in half:
            path.write_bytes(b"half of")
        clean()
        assert not [path for path in half if path.exists()]


def test_the_directory_is_the_users_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVSELECT_CACHE")
    assert store.directory().name == "convselect"


def _raise(name: str) -> Path:
    raise RuntimeError("could not determine the home directory")


@pytest.mark.parametrize("home", [_raise, Path("~/.cache").joinpath], ids=["raises", "relative"])
def test_without_a_home_directory_the_samples_last(
    home: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No HOME and no user in passwd, or a relative HOME: what recent and older platformdirs make of it."""
    monkeypatch.delenv("CONVSELECT_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_path", home)
    assert store.load(MACHINE) is None
    with store.calibrating():
        pass
    with pytest.warns(ConvselectWarning, match="home directory.*CONVSELECT_CACHE"):
        assert names(store.save(MACHINE, samples("a"))) == {"a"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(store.save(MACHINE, samples("b"))) == {"a", "b"}
    assert names(store.load(MACHINE)) == {"a", "b"}
    assert store.entries() == []
    assert store.clear() == 0
    assert store.load(MACHINE) is None
