"""What `benchmarks/gpu.py` measures on a GPU: ceilings, the networks, the page. No Triton is imported here."""
