"""A worker in a process of its own: a kernel that breaks the GPU's context, or never ends, costs only itself.

The worker notes what it is about to do; when it dies or makes no progress, what its note says is kept as a failure, and
the next worker leaves that out.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Failure = dict[str, Any]
"""What the note said, and "error"."""
POLL_S = 0.1


def write(path: Path, data: object) -> None:
    """JSON, at once or not at all."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    beside.replace(path)


def read(path: Path) -> list[Any]:
    """The list that `write` wrote; empty where there is none."""
    found = json.loads(path.read_text()) if path.exists() else []
    assert isinstance(found, list), f"{path} holds no list"
    return found


class Note:
    """What a worker is about to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, **what: object) -> None:
        write(self.path, what)


def supervise(command: Sequence[str], note: Path, failures: Path, deadline: float, patience_s: float) -> bool:
    """Runs `command` until it ends well, again after each failure. Whether it did before `deadline` (`monotonic`).

    A worker whose note is older than `patience_s` is killed. Failures are added to the list in the file `failures`.
    Raises `RuntimeError` where a worker fails before its first note: then it is no kernel's fault.
    """
    log = note.with_suffix(".log")
    while time.monotonic() < deadline:
        note.unlink(missing_ok=True)
        with log.open("w") as errors:
            process = subprocess.Popen(command, stderr=errors)
            try:
                reason = _wait(process, note, deadline, patience_s)
            finally:
                process.kill()
                process.wait()
        if reason is None:
            return process.returncode == 0
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if not note.exists():
            raise RuntimeError(f"{' '.join(command)} {reason} before it began:\n" + "\n".join(lines[-20:]))
        last = lines[-1][-500:] if lines else ""
        failure = {**json.loads(note.read_text()), "error": f"{reason}: {last}".strip(": ")}
        write(failures, [*read(failures), failure])
        print(f"failed: {failure}", flush=True)
    return False


def _wait(process: subprocess.Popen[bytes], note: Path, deadline: float, patience_s: float) -> str | None:
    """Until the end of `process` or `deadline`: None; how it failed, if it did."""
    begun = time.time()
    while process.poll() is None:
        time.sleep(POLL_S)
        if time.monotonic() > deadline:
            return None
        changed = note.stat().st_mtime if note.exists() else begun
        if time.time() - changed > patience_s:
            return f"no progress for {patience_s:.0f} s"
    if process.returncode < 0:
        return f"killed by signal {-process.returncode}"
    return f"exit code {process.returncode}" if process.returncode else None
