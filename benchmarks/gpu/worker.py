"""A worker in a process of its own: a kernel that breaks the GPU's context, or never ends, costs only itself.

The worker notes what it is about to do; when it dies or makes no progress, what its note says is kept as a failure, and
the next worker leaves that out. What merely raises does not end a worker: it keeps the traceback and goes on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from convselect.files import replaced

Failure = dict[str, Any]
"""What the note said, "error", and "log", the end of the worker's; or "traceback", where the worker lived on."""
POLL_S = 0.1
GRACE_S = 5.0
"""From Ctrl-C to the end."""
_TELL_EVERY_S = 20.0
_TAIL = 40
_RAISED = re.compile(r"[\w.]*(Error|Exception|Failed|OutOfResources)\b")


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def write(path: Path, data: object) -> None:
    """JSON, at once or not at all."""
    with replaced(path) as new:
        new.write_text(json.dumps(data, indent=1) + "\n")


def read(path: Path) -> list[Any]:
    """The list that `write` wrote; empty where there is none."""
    found = json.loads(path.read_text()) if path.exists() else []
    assert isinstance(found, list), f"{path} holds no list"
    return found


def add_failure(path: Path, failure: Failure) -> None:
    write(path, [*read(path), failure])
    tell("failed: " + ", ".join(f"{value}" for key, value in failure.items() if key not in ("log", "traceback")))


class Note:
    """What a worker is about to do. Now and then it is also printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = 0.0

    def __call__(self, **what: object) -> None:
        write(self.path, what)
        if time.monotonic() - self._told > _TELL_EVERY_S:
            self._told = time.monotonic()
            tell(", ".join(map(str, what.values())))


def caught(device: torch.device) -> Failure:
    """Of the exception that is being handled. Raises another one if it has broken the context of `device`."""
    text = traceback.format_exc()
    torch.ones(1, device=device).add_(1).item()
    return {"error": _reason(text.splitlines()), "traceback": text}


def _reason(lines: Sequence[str]) -> str:
    """The last line that names an exception: Dynamo adds advice after it; else the last one."""
    return next((line for line in reversed(lines) if _RAISED.match(line)), lines[-1] if lines else "")[:500]


def supervise(
    command: Sequence[str],
    note: Path,
    failures: Path,
    log: Path,
    deadline: float,
    patience_s: Callable[[Failure], float],
) -> bool:
    """Runs `command` until it ends well, again after each failure. Whether it did before `deadline` (`monotonic`).

    A worker whose note is older than `patience_s` of what it says is stopped. Failures are added to the list in the
    file `failures`, stderr to `log`. Raises `RuntimeError` where a worker fails before its first note: then it is no
    kernel's fault.
    """
    while time.monotonic() < deadline:
        note.unlink(missing_ok=True)
        with log.open("a+", errors="replace") as errors:
            begun = errors.seek(0, os.SEEK_END)
            reason, code = _run(command, errors, note, deadline, patience_s)
            errors.seek(begun)
            lines = [line for line in errors.read().splitlines() if line.strip()]
        if reason is None:
            return code == 0
        tail = lines[-_TAIL:]
        print("\n".join(tail), flush=True)
        if not note.exists():
            raise RuntimeError(f"{' '.join(command)} {reason} before it began")
        error = f"{reason}: {_reason(lines)}".strip(": ")
        add_failure(failures, {**json.loads(note.read_text()), "error": error, "log": tail})
    return False


def _run(
    command: Sequence[str], errors: IO[str], note: Path, deadline: float, patience_s: Callable[[Failure], float]
) -> tuple[str | None, int | None]:
    """How `command` failed, if it did before `deadline`; its exit code, None if it had to be stopped."""
    process = subprocess.Popen(command, stderr=errors, start_new_session=True)
    begun = time.time()
    try:
        while (code := process.poll()) is None:
            time.sleep(POLL_S)
            if time.monotonic() > deadline:
                return None, None
            noted = json.loads(note.read_text()) if note.exists() else {}
            patience = patience_s(noted)
            if time.time() - (note.stat().st_mtime if noted else begun) > patience:
                return f"no progress for {patience:.0f} s", None
    finally:
        stop(process)
    if code < 0:
        return f"killed by signal {-code}", code
    return (f"exit code {code}" if code else None), code


def stop(process: subprocess.Popen[Any], grace_s: float = GRACE_S) -> None:
    """Ctrl-C, so that it saves what it has; then the end, also of what it has started in its session."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
