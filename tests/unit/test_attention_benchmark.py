"""The benchmark of soft-mask attention: it runs, and its CUDA tables at least form, at small sizes on the CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import attention_on_gpu as gpu
import attention_peers as peers
import pytest
import torch

from megatron_conan.kernels.soft_mask_attention import reference

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "soft_mask_attention.py"
SMALL = gpu.Grid(
    head_dims=(16,),
    lengths=(32, 64),
    openings=(("row", 0.0), ("row", 0.5), ("constant", 1.0), ("constant", peers.LEARNED)),
    heads=(4, 2),
    num_tokens=64,
    device="cpu",
    dtype=torch.float32,
)


def stopwatch(call):
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began), 0.0


@pytest.fixture
def _uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("make", [gpu.padded_table, gpu.packed_table])
def test_tables_of_the_gpu_hold_what_ran_and_why_the_rest_did_not(make):
    """Two passes, FlexAttention and torch's own run on a CPU; the kernel doesn't, and its line says why."""
    groups = list(make(SMALL, 1.0, stopwatch))
    assert len(groups) == len(SMALL.openings) * (len(SMALL.lengths) if make is gpu.padded_table else 1)
    for lines in groups:
        found = {line["implementation"]: line for line in lines}
        assert len({tuple(line) for line in lines}) == 1  # the same columns
        assert found["kernel"]["error"].startswith("ValueError: attention backend kernel runs on CUDA")
        assert found["kernel"]["ms"] == found["two_pass"]["ms / kernel"] == ""
        assert found["two_pass"]["error"] == ""
        assert found["two_pass"]["backward ms"] > 0
        assert 0 <= found["FlexAttention"]["difference"] < 1e-5
        assert "sdpa backend" in found or make is gpu.packed_table
        for name in ("sdpa backend", "SDPA, bias given"):
            assert name not in found or found[name]["difference"] < 1e-5
    unmasked = [any(line["implementation"].split()[-1] in ("causal", "full") for line in lines) for lines in groups]
    assert sum(unmasked) == (len(SMALL.lengths) if make is gpu.padded_table else 1)


def test_ratios_are_to_the_kernel():
    columns = {"backward ms": "", "error": ""}
    lines = gpu._with_ratios([{"ms": 2.0, **columns}, {"ms": 3.0, **columns}, {"ms": "", **columns}])
    assert [line["ms / kernel"] for line in lines] == [1.0, 1.5, ""]
    assert [line["backward / kernel"] for line in lines] == ["", "", ""]


def test_block_masks_are_timed():
    lines = gpu.block_mask_table(SMALL)
    assert [(line["length"], line["mask"]) for line in lines] == [
        (32, "causal"),
        (32, "packed"),
        (64, "causal"),
        (64, "packed"),
    ]
    assert all(line["ms"] > 0 for line in lines)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("opening", [0.0, 0.4, 1.0])
def test_flex_attention_of_packed_sequences_is_the_definition(opening):
    sizes = [5, 1, 17, 9]
    problem = peers.make_problem((32,), (4, 2), 16, "row", opening, "cpu", torch.float32, sizes)
    with torch.no_grad():
        found = peers.flex(problem, peers.flex_block_mask(problem))()
        expected, _ = reference(problem.q, problem.k, problem.v, problem.alpha, "row", cu_seqlens=problem.cu_seqlens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_arithmetic_is_that_of_the_open_part():
    full = peers.make_problem((2, 8), (4, 2), 16, "row", 0.5, "cpu", torch.float32)
    assert full.forward_flops == 2 * 4 * 8**2 * 16 * 4
    packed = peers.make_problem((8,), (4, 2), 16, "row", 0.0, "cpu", torch.float32, [5, 3])
    assert packed.forward_flops == 0.5 * 4 * (25 + 9) * 16 * 4


@pytest.mark.full
def test_benchmark_runs_at_a_small_size(tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARK), "--device", "cpu", "--quick", "--output", str(output)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(output.read_text())["tables"]["cpu"]
    assert {line["implementation"] for line in found} >= {"two_pass", "sdpa", "reference", "SDPA causal", "SDPA full"}
    assert all(line["/ full"] > 0 and 0 < line["share of GEMM"] < 1.5 for line in found)
    assert "with backward / full" in printed
