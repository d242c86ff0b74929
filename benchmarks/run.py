"""Writes benchmarks/RESULTS.md, results.json and results.png: `convselect bench` with every peer there is.

Arguments are those of `convselect bench`; `make bench` gives the networks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from convselect.cli import main

ROOT = Path(__file__).resolve().parent.parent
PEERS = "eager,eager_nhwc,inductor,onnxruntime,openvino"

if __name__ == "__main__":
    defaults = ["--against", PEERS] + [
        text
        for option, name in (("--json", "results.json"), ("--markdown", "RESULTS.md"), ("--plot", "results.png"))
        for text in (option, f"benchmarks/{name}")
    ]
    os.chdir(ROOT)
    sys.argv[1:] = ["bench", *sys.argv[1:], *defaults]
    main()
