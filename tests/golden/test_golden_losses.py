"""The losses of a short run of every stage, as text: a change that isn't meant to move numbers reproduces them.

Where they are meant to move, `pytest tests/golden --rewrite-golden` writes them anew, and the difference is part of the change.

Tolerance: another CPU sums products in another order. With ATEN_CPU_CAPABILITY=default and avx2 and with
MKL_CBWR=COMPATIBLE, which switch vector units off, all losses stayed within 2e-6.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from gloo_pool import WorkerPool
from layouts import tiny_config, train_layout

from megatron_conan.data.fingerprint import data_fingerprints

FOLDER = Path(__file__).parent
STEPS = 20
TOLERANCE = 1e-5
COLUMNS = ("loss", "alpha", "negatives_replaced")
REWRITE = "pytest tests/golden --rewrite-golden"

STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"optimizer": {"lr": 1e-3, "decoupled_lr": 2e-3, "clip_grad": 1.0}},
    "sft": {},
    # the mask opens from causal to bidirectional; scored pairs beside every batch
    "weak": {
        "soft_mask": {"form": "row", "schedule": "linear"},
        "contrastive": {"temperature": 0.05, "num_hard_negatives": 2, "batch_balance": {"scored_batch_size": 6}},
        "prompts": {"query": "find\n"},
    },
    # mined before steps 1, 8 and 15; in between negatives give way singly
    "finetune": {
        "soft_mask": {"schedule": "constant", "alpha": 1.0},
        "contrastive": {"temperature": 0.05, "num_hard_negatives": 2},
        "mining": {"every": 7, "pool_size": 8, "window": 30, "low_score": 0.5, "drop_ratio": 1.02, "high_score": 1.0},
        "optimizer": {"lr": 3e-4},
    },
}


def _line(values: dict[str, float]) -> str:
    """The columns that a stage has; nine digits tell all fp32 numbers apart."""
    return " ".join(f"{values[name]:.9g}" for name in COLUMNS if name in values)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_the_golden_file(
    stage: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    train = {"steps": STEPS, "micro_batch_size": 4, "global_batch_size": 8}
    data: dict[str, Any] = {}
    if stage == "weak":
        data = {"data": {"sources": [{"prefix": str(tiny_data[name])} for name in ("pairs", "sts")]}}
    config = tiny_config(stage, tiny_data, tmp_path / "run", train=train, **data, **STAGES[stage])
    (run,) = workers.run(train_layout, 1, config)
    rows = [{"loss": loss, **values} for loss, values in zip(run["losses"], run["metrics"], strict=True)]
    digest = hashlib.sha256(json.dumps(data_fingerprints(config), sort_keys=True).encode()).hexdigest()[:16]
    head = [f"# data {digest}", "# " + " ".join(name for name in COLUMNS if name in rows[0])]
    lines = [*head, *(_line(row) for row in rows)]
    file = FOLDER / f"{stage}.txt"
    if request.config.getoption("--rewrite-golden"):
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    golden = file.read_text(encoding="utf-8").splitlines()
    assert lines[0] == golden[0], "the data differ from those of the golden file: has SentencePiece another version?"
    assert lines[1] == golden[1], f"other columns than in {file.name}; to write it anew: {REWRITE}"
    for step, (found, expected) in enumerate(zip(lines[2:], golden[2:], strict=True), start=1):
        numbers = [[float(word) for word in line.split()] for line in (found, expected)]
        assert numbers[0] == pytest.approx(numbers[1], rel=TOLERANCE), (
            f"{stage}: step {step} is the first that differs from {file.name}: {found!r}, not {expected!r}. If the change is "
            f"meant to move numbers: {REWRITE}"
        )
