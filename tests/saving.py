"""What a process does that `test_concurrency.py` starts: a module that a child of any Python can import."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from convselect.costs import Samples, store
from convselect.machine import Machine

MACHINE = Machine("cpu", "made up", "avx2", 2, 2, 32768, 1 << 20, 0)
PROBLEM = "mb1_g1ic64ih56iw56oc64oh56ow56kh3kw3sh1sw1ph1pw1dh1dw1"


def save_in_turn(folder: str, worker: int, saves: int, told: Connection) -> None:
    """Says after each save that what it has saved is safe."""
    os.environ["CONVSELECT_CACHE"] = folder
    for i in range(saves):
        samples = Samples()
        samples.add(PROBLEM, f"p{worker}_{i}", 2, 1.0)
        store.save(MACHINE, samples)
        told.send(f"p{worker}_{i}")
    told.close()
