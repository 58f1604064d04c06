"""The benchmark of InfoNCE runs and writes what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "info_nce.py"


@pytest.mark.full
def test_benchmark_runs_at_a_small_size(tmp_path):
    """One fresh process a measurement: some seconds each, for importing torch."""
    output = tmp_path / "figures.json"
    options = ["--rows", "300", "--compare", "128", "--dim", "16", "--block-size", "100", "--threads", "1"]
    command = [sys.executable, str(BENCHMARK), *options, "--repeats", "1", "--output", str(output)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(output.read_text())["tables"]["info_nce"]
    names = [(row["loss"], row["rows"]) for row in found]
    assert names == [("plain", 128), ("blockwise", 128), ("margin", 128), ("blockwise", 300)]
    assert all(0 < row["process peak, MB"] < 2000 for row in found)
    assert "/ plain torch" in printed
