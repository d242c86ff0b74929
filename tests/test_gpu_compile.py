"""Every Triton primitive compiled ahead of time for an A100 (sm_80) and an H100 or H200 (sm_90)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from gpu import TRITON, machine

PRECISIONS = {80: ("float16", "float32"), 90: ("float16", "tf32", "float32", "bfloat16")}
MOST_SHARED_BYTES = {80: 166912, 90: 232448}
"""Of one block, by NVIDIA's tables of compute capabilities."""
MOST_STACK_BYTES = 256
"""Where registers are spilled to; a tile of 128x256 with a residual takes 224 on sm_90."""
PRODUCTS = {"igemm", "igemm_persistent", "igemm_part", "gemm", "stem"}
STREAMING = {"depthwise_nhwc", "depthwise_nchw", "transform_source", "transform_product", "elementwise", "add_parts"}

Entry = dict[str, Any]


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Entry]]:
    """By capability; the two are compiled side by side."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    running = {
        capability: subprocess.Popen(
            [sys.executable, Path(__file__).with_name("compile_ahead.py"), str(capability), *precisions],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for capability, precisions in PRECISIONS.items()
    }  # fmt: skip
    found = {}
    for capability, process in running.items():
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        found[capability] = json.loads(out)
    return found


@pytest.mark.parametrize("capability", PRECISIONS)
def test_the_primitives_compile(entries: dict[int, list[Entry]], capability: int) -> None:
    """Kernels that two primitives share are there once."""
    for precision in PRECISIONS[capability]:
        here = [entry for entry in entries[capability] if entry["precision"] == precision]
        assert len(here) >= (15 if precision == "bfloat16" else 35)
        every = PRODUCTS | {"depthwise_nhwc", "depthwise_nchw", "im2row", "elementwise"}
        assert precision == "bfloat16" or {entry["kernel"] for entry in here} >= every


@pytest.mark.parametrize("capability", PRECISIONS)
def test_registers_and_shared_memory(entries: dict[int, list[Entry]], capability: int) -> None:
    for entry in entries[capability]:
        assert entry["stack_bytes"] <= MOST_STACK_BYTES, entry
        assert entry["shared_bytes"] <= MOST_SHARED_BYTES[capability], entry
        if entry["kernel"] in PRODUCTS:
            assert entry["shared_bytes"] <= entry["bound_bytes"], f"the refusal goes by less than it takes: {entry}"


def test_two_programs_of_64_columns_fit_onto_a_hopper_multiprocessor(entries: dict[int, list[Entry]]) -> None:
    found = [e for e in entries[90] if e["primitive"] == "igemm_128x64_persistent_nhwc"]
    assert found
    for entry in found:
        assert 2 * 32 * entry["warps"] * entry["registers"] <= 65536, entry
        assert 2 * (entry["bound_bytes"] + 1024) <= 233472, entry


def test_products_run_on_hoppers_matrix_units(entries: dict[int, list[Entry]]) -> None:
    for entry in entries[90]:
        if entry["kernel"] in PRODUCTS:
            # F(4, 3) computes in float32 where TF32 is allowed, too.
            rounded = entry["precision"] != "float32" and not entry["primitive"].startswith("winograd_f4x4")
            assert entry["wgmma"] == rounded, entry


@pytest.mark.parametrize("capability", PRECISIONS)
def test_factors_arrive_in_whole_vectors(entries: dict[int, list[Entry]], capability: int) -> None:
    """16 bytes a thread, where channels are adjacent and 8 divides them; asynchronously, stage by stage."""
    wide = [e for e in entries[capability] if not e["odd"]]
    wide = [e for e in wide if e["primitive"].endswith("_nhwc") and "_nchw_" not in e["primitive"]]
    wide = [e for e in wide if not e["primitive"].startswith("stem")]
    assert len(wide) >= 30
    for entry in wide:
        if entry["kernel"] in PRODUCTS:
            assert entry["copy_bytes"] == [16], entry
        assert entry["store_bytes"] == [16], entry


@pytest.mark.parametrize("capability", PRECISIONS)
def test_planes_of_14_x_14_arrive_in_vectors(entries: dict[int, list[Entry]], capability: int) -> None:
    """4 divides 196 pixels: 8 bytes of src in half precision; weights, on the left, come in 16."""
    found = [e for e in entries[capability] if e["primitive"].startswith("pointwise") and "nchw" in e["primitive"]]
    found = [e for e in found if not e["odd"]]
    assert found
    for entry in found:
        if entry["precision"] != "tf32":  # whose matrix units want pixels turned, 4 bytes at a time
            assert entry["copy_bytes"] == ([16] if entry["precision"] == "float32" else [8, 16]), entry


@pytest.mark.parametrize("capability", PRECISIONS)
def test_what_is_no_product_stays_in_registers(entries: dict[int, list[Entry]], capability: int) -> None:
    """Weights, biases and scales arrive in the threads that use them, not through shared memory and its barriers."""
    found = [e for e in entries[capability] if e["kernel"] in STREAMING and not e["odd"]]
    assert {entry["kernel"] for entry in found} == STREAMING
    for entry in found:
        assert entry["conversions"] == 0, entry


@pytest.mark.parametrize("capability", PRECISIONS)
def test_neighbours_gather_from_neighbouring_addresses(entries: dict[int, list[Entry]], capability: int) -> None:
    found = [e for e in entries[capability] if e["kernel"] == "stem" or e["primitive"] == "im2row_128x64_nchw_nhwc"]
    found = [e for e in found if e["kernel"] != "gemm" and e["precision"] != "float32"]  # there as wide as weights
    assert {entry["kernel"] for entry in found} == {"stem", "im2row"}
    for entry in found:
        assert entry["adjacent_threads"], entry


def test_no_primitive_is_too_large_for_these_gpus() -> None:
    for capability, most in MOST_SHARED_BYTES.items():
        assert machine(capability=capability).l1d_bytes == most
    assert max(primitive.shared_bytes() for primitive in TRITON) <= min(MOST_SHARED_BYTES.values())
