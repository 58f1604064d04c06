"""What a run folder tells a run that goes on: schedules that end elsewhere, other versions; and that data are recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_conan.config import RunConfig, parse_config
from megatron_conan.train.run_folder import open_run_folder


def run_config(folder: Path, stage: str, **sections: Any) -> RunConfig:
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_query_groups": 1, "ffn_hidden_size": 8}
    tree: dict[str, Any] = {
        "stage": stage,
        "run_dir": str(folder / "run"),
        "model": {**model, "vocab_size": 512, "max_seq_length": 32},
        "tokenizer": {"model": "t.model"},
        "data": {"sources": [{"prefix": str(folder / "data")}]},
        "train": {"steps": 8, "micro_batch_size": 1, "global_batch_size": 1},
        "optimizer": {"lr": 1e-3},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree, origin="test")


def saved(config: RunConfig) -> None:
    (config.run_dir / "checkpoints" / "step_00000004").mkdir(parents=True)


BOTH = "the learning rate and the opening of the soft mask now follow a schedule that ends at step 16"
RATE = "the learning rate now follows a schedule that ends at step 16"
LINEAR = {"soft_mask": {"schedule": "linear"}}
FLAT = {"optimizer": {"decay": "constant", "warmup_fraction": 0.0}}


@pytest.mark.parametrize(
    ("stage", "sections", "told"),
    [
        ("weak", LINEAR, BOTH),
        ("weak", {}, RATE),
        ("pretrain", LINEAR, RATE),
        ("weak", {**LINEAR, **FLAT}, "the opening of the soft mask now follows a schedule that ends at step 16"),
        ("pretrain", FLAT, ""),
        ("pretrain", {"optimizer": {"decay": "constant"}}, RATE),
    ],
)
def test_other_steps_move_the_schedules_and_that_is_told(
    stage: str, sections: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, longer = (run_config(tmp_path, stage, train={"steps": steps}, **sections) for steps in (8, 16))
    open_run_folder(first, 1)
    open_run_folder(longer, 1)
    assert capsys.readouterr().err == "", "nothing was trained yet"
    open_run_folder(first, 1)
    saved(first)
    open_run_folder(longer, 1)
    assert capsys.readouterr().err == (
        f"warning: train.steps: 8 -> 16: {told}, with a jump at the next step\n" if told else ""
    )
    open_run_folder(longer, 1)
    assert capsys.readouterr().err == "", "it is told once"


def test_other_versions_are_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "pretrain")
    open_run_folder(config, 1)
    saved(config)
    file = config.run_dir / "environment.json"
    environment = json.loads(file.read_text())
    assert environment["versions"]["torch"] == torch.__version__
    open_run_folder(config, 1)
    assert capsys.readouterr().err == ""
    del environment["versions"]["numpy"]
    environment["versions"] |= {"torch": "2.0.0", "mteb": "0.1"}
    file.write_text(json.dumps(environment))
    open_run_folder(config, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: versions changed since this run last started: torch 2.0.0 -> {torch.__version__}, numpy absent -> "
    )
    assert "mteb" not in line


def test_the_data_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"tokens")
    config = run_config(tmp_path, "pretrain")
    open_run_folder(config, 1)
    recorded = json.loads((config.run_dir / "environment.json").read_text())["data"]
    assert recorded["data.sources.0"]["data.bin"]["bytes"] == 6
