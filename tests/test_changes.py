"""Whatever changes a module is counted, on every CPython that is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convselect.runtime import changes

SCRIPT = Path(__file__).with_name("ways_to_change.py")


def interpreters() -> list[Path]:
    """This one, and those of other versions on the path and of pyenv."""
    named = [shutil.which(f"python3.{minor}") for minor in range(10, 20)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = [path for path in pyenv.glob("versions/3.*/bin/python") if int(path.parts[-3].split(".")[1]) >= 10]
    found = {path.resolve(): path for path in map(Path, [*filter(None, named), *kept]) if path.exists()}
    return [Path(sys.executable), *(path for real, path in found.items() if real != Path(sys.executable).resolve())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What watches, alone: neither torch nor convselect is imported."""
    alone = tmp_path_factory.mktemp("changes")
    shutil.copy(changes.__file__, alone)
    shutil.copy(changes._library()._name, alone)
    return alone


@pytest.mark.parametrize("python", interpreters(), ids=str)
def test_every_change_counts(python: Path, folder: Path) -> None:
    """Or nothing is watched: where the interpreter does not tell, or is not asked."""
    done = subprocess.run([python, SCRIPT, folder], capture_output=True, text=True, check=False)
    if done.returncode == 127:  # a name of pyenv's for a version that is not in use
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    version = tuple(said["version"])
    assert said["missing"] is None or version >= (3, 13), said["missing"]
    if version == (3, 13, 0):
        assert said["missing"], "gh-125608"
    if said["missing"] is None:
        assert (said["unseen"], said["of the dead"], said["left"], said["seen"]) == ([], True, 0, 1)


def test_where_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = changes.missing.__wrapped__
    monkeypatch.setattr(changes, "_is_seen", lambda make, change: False)
    assert "does not tell of every change" in missing()
    monkeypatch.setattr(sys.implementation, "name", "pypy")
    assert "pypy" in missing()
