"""The benchmark of a training step: what it compares is equal, it refuses what is not, and it writes what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMPUTES = """
import sys
sys.path.insert(0, {folder!r})
from training_step import check_equal
print(check_equal([2.0, 1.0], [2.0, 1.00000001], "fp32"))
check_equal([2.0, 1.0], [2.0, 1.001], "fp32")
"""


def test_steps_that_compute_something_else_are_not_compared() -> None:
    program = COMPUTES.format(folder=str(BENCHMARKS))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert float(found.stdout) == pytest.approx(1e-8)
    assert "differ by 1.0e-03" in found.stderr


def test_a_benchmark_without_data_says_what_makes_them(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "training_step.py"), "--lm", str(tmp_path / "lm")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "make demo" in found.stderr


@pytest.mark.full
def test_all_tables_at_a_tiny_size(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    files = ["--lm", str(tiny_data["lm"]), "--pairs", str(tiny_data["pairs"])]
    files += ["--tokenizer-model", str(tiny_data["tokenizer"]), "--folder", str(tmp_path), "--output", str(output)]
    sizes = ["--models", "tiny", "--checkpoint-models", "tiny", "--repetitions", "2"]
    command = [sys.executable, str(BENCHMARKS / "training_step.py"), *files, *sizes]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tables = json.loads(output.read_text())["tables"]
    assert [row["stage"] for row in tables["steps"]] == ["pretrain", "finetune"]
    for row in tables["steps"]:
        assert row["difference of losses"] < 1e-5
        assert 0 < row["ours / plain"] < 100
    assert {row["form"] for row in tables["plain"]} >= {"fused AdamW", "foreach AdamW", "forloop AdamW"}
    assert all(0 < row["loop by phases"] < 1 for row in tables["loop"])
    ways = [row["way"] for row in tables["checkpoints"]]
    assert ways == [
        "asynchronous, the first",
        "asynchronous",
        "synchronous",
        "torch.save",
        "torch.save, fsync",
        "write and fsync",
        "copy in memory",
    ]
    assert [(row["processes"], row["run"]) for row in tables["start"]] == [
        (1, "fresh"),
        (1, "goes on"),
        (2, "fresh"),
        (2, "goes on"),
    ]
    assert "ours / plain" in printed
    assert list(tmp_path.glob("*")) == [output]
