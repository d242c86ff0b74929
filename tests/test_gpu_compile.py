"""Every Triton primitive compiled ahead of time for an H100 or H200 (sm_90) and an A100 (sm_80)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

from gpu import TRITON, machine

pytestmark = pytest.mark.slow

BUILDS = [(90, "float16"), (90, "tf32"), (90, "float32"), (90, "bfloat16"), (80, "float16"), (80, "float32")]
"""Capability and precision; each takes half a minute."""
MOST_SHARED_BYTES = {80: 166912, 90: 232448}
"""Of one block, by NVIDIA's tables of compute capabilities."""
MOST_STACK_BYTES = 256
"""Where registers are spilled to; a tile of 128x256 with a residual takes 224 on sm_90."""
PRODUCTS = {"igemm", "igemm_persistent", "igemm_part", "gemm", "stem"}
STREAMING = {"depthwise_nhwc", "depthwise_nchw", "transform_source", "transform_product", "elementwise", "add_parts"}


class Build(NamedTuple):
    capability: int
    precision: str
    entries: list[dict[str, Any]]


@pytest.fixture(scope="module", params=BUILDS, ids=lambda build: f"sm_{build[0]} {build[1]}")
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    capability, precision = request.param
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_ahead.py"), str(capability), precision],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Build(capability, precision, json.loads(done.stdout))


def test_the_primitives_compile(build: Build) -> None:
    """Kernels that two primitives share are there once; of bfloat16 only a part is compiled."""
    assert len(build.entries) >= (15 if build.precision == "bfloat16" else 35)
    every = PRODUCTS | {"depthwise_nhwc", "depthwise_nchw", "im2row", "elementwise"}
    assert build.precision == "bfloat16" or {entry["kernel"] for entry in build.entries} >= every


def test_registers_and_shared_memory(build: Build) -> None:
    for entry in build.entries:
        assert entry["stack_bytes"] <= MOST_STACK_BYTES, entry
        assert entry["shared_bytes"] <= MOST_SHARED_BYTES[build.capability], entry
        if entry["kernel"] in PRODUCTS:
            assert entry["shared_bytes"] <= entry["bound_bytes"], f"the refusal goes by less than it takes: {entry}"


def only_hopper(build: Build) -> None:
    if build.capability < 90:
        pytest.skip("of Hopper")


def test_two_programs_of_64_columns_fit_onto_a_hopper_multiprocessor(build: Build) -> None:
    only_hopper(build)
    found = [e for e in build.entries if e["primitive"] == "igemm_128x64_persistent_nhwc"]
    assert found or build.precision == "bfloat16"
    for entry in found:
        assert 2 * 32 * entry["warps"] * entry["registers"] <= 65536, entry
        assert 2 * (entry["bound_bytes"] + 1024) <= 233472, entry


def test_products_run_on_hoppers_matrix_units(build: Build) -> None:
    only_hopper(build)
    for entry in build.entries:
        if entry["kernel"] in PRODUCTS:
            # F(4, 3) computes in float32 where TF32 is allowed, too.
            rounded = build.precision != "float32" and not entry["primitive"].startswith("winograd_f4x4")
            assert entry["wgmma"] == rounded, entry


def test_factors_arrive_in_whole_vectors(build: Build) -> None:
    """16 bytes a thread, where channels are adjacent and 8 divides them; asynchronously, stage by stage."""
    wide = [e for e in build.entries if not e["odd"]]
    wide = [e for e in wide if e["primitive"].endswith("_nhwc") and "_nchw_" not in e["primitive"]]
    wide = [e for e in wide if not e["primitive"].startswith("stem")]
    assert len(wide) >= (5 if build.precision == "bfloat16" else 15)
    for entry in wide:
        if entry["kernel"] in PRODUCTS:
            assert entry["copy_bytes"] == [16], entry
        assert entry["store_bytes"] == [16], entry


def test_planes_of_14_x_14_arrive_in_vectors(build: Build) -> None:
    """4 divides 196 pixels: 8 bytes of src in half precision; weights, on the left, come in 16."""
    if build.precision == "tf32":
        pytest.skip("its matrix units want pixels turned, 4 bytes at a time")
    found = [e for e in build.entries if e["primitive"].startswith("pointwise") and "nchw" in e["primitive"]]
    found = [e for e in found if not e["odd"]]
    assert found or build.precision == "bfloat16"
    for entry in found:
        assert entry["copy_bytes"] == ([16] if build.precision == "float32" else [8, 16]), entry


def test_what_is_no_product_stays_in_registers(build: Build) -> None:
    """Weights, biases and scales arrive in the threads that use them, not through shared memory and its barriers."""
    found = [e for e in build.entries if e["kernel"] in STREAMING and not e["odd"]]
    assert build.precision == "bfloat16" or {entry["kernel"] for entry in found} == STREAMING
    for entry in found:
        assert entry["conversions"] == 0, entry


def test_neighbours_gather_from_neighbouring_addresses(build: Build) -> None:
    if build.precision == "float32":
        pytest.skip("a vector of pixels is as wide as one of weights")
    found = [e for e in build.entries if e["kernel"] == "stem" or e["primitive"] == "im2row_128x64_nchw_nhwc"]
    found = [e for e in found if e["kernel"] != "gemm"]
    assert build.precision == "bfloat16" or {entry["kernel"] for entry in found} == {"stem", "im2row"}
    for entry in found:
        assert entry["adjacent_threads"], entry


def test_no_primitive_is_too_large_for_these_gpus() -> None:
    for capability, most in MOST_SHARED_BYTES.items():
        assert machine(capability=capability).shared_bytes == most
    assert max(primitive.shared_bytes() for primitive in TRITON) <= min(MOST_SHARED_BYTES.values())
