"""Contrastive training on real pairs is better than its start, by the benchmark that measures it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from external_data import prepare_sources, read_sts, retrieval_sets, sts_test_sets

from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_sources_hold_no_test_rows(real_data: Path, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """Every source opens; no query of a retrieval test set, no pair of an STS test set is in one."""
    sources = prepare_sources(real_data, tiny_data["tokenizer"], tmp_path, kinds=("pairs", "sts"))
    tokenizer = Tokenizer(tiny_data["tokenizer"])
    tests = {
        json.loads(line)["text"]
        for folder in retrieval_sets(real_data)
        for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    }
    scored = {frozenset(pair) for _, path in sts_test_sets(real_data) for pair in zip(*read_sts(path)[:2], strict=True)}
    assert tests
    assert scored
    for source in sources.values():
        store = PairStore(source.prefix, tokenizer)
        assert store.num_rows == source.rows > 0
        for row in range(store.num_rows):
            query = store.text(store.query(row))
            assert query not in tests
            if source.task == "sts":
                assert frozenset((query, store.text(int(store.positives(row)[0])))) not in scored


@pytest.mark.full
def test_training_on_real_pairs_beats_its_start(real_data: Path, tmp_path: Path) -> None:
    """From the demo's pretrained weights; both means, retrieval and STS, are above the start's by a 95% interval."""
    demo = ROOT / "runs" / "demo"
    if not (demo / "data" / "lm.idx").exists():
        pytest.skip(f"no demo data at {demo / 'data'}; `make demo` makes it")
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    start = tmp_path / "demo"
    start.mkdir()
    (start / "data").symlink_to(demo / "data")
    pretrain = ["--config", "configs/demo/pretrain.yaml", f"run_dir={start / 'pretrain'}", "evaluation=null"]
    subprocess.run(["bash", "launch/pretrain.sh", *pretrain], cwd=ROOT, check=True, env=environment)
    output = tmp_path / "result.json"
    arguments = [
        "--data",
        str(real_data),
        "--demo",
        str(start),
        "--work",
        str(tmp_path / "work"),
        "--output",
        str(output),
    ]
    command = [sys.executable, "benchmarks/real_pairs.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BM25" in done.stdout
    sets = json.loads(output.read_text(encoding="utf-8"))["tables"]["sets"]
    for mean in sets[-2:]:
        assert mean["low"] > 0, mean
