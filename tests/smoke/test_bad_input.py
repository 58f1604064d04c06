"""A user's mistake gets one clear message, before heavy work, and leaves nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from gloo_pool import WorkerPool
from layouts import tiny_config, train_run

from megatron_conan.config import dump_config, parse_config

ROOT = Path(__file__).resolve().parents[2]


def _launch(stage: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Start a stage exactly as documented."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [str(torchrun), "--standalone", "--nproc-per-node", str(processes), f"launch/{stage}.sh", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, check=False)


def _message(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that starts with `error:`."""
    assert result.returncode != 0
    lines = result.stderr.split("error: ", 1)
    assert len(lines) == 2, result.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "megatron_conan") not in result.stderr
    return lines[1]


def _write(config: Any, folder: Path, **changes: Any) -> Path:
    tree = yaml.safe_load(dump_config(config))
    for key, value in changes.items():
        node = tree
        *sections, leaf = key.split("__")
        for section in sections:
            node = node[section]
        node[leaf] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def test_without_arguments_it_says_what_is_missing() -> None:
    """`torchrun launch/pretrain.sh`, with nothing behind it."""
    message = _message(_launch("pretrain"))
    assert "missing" in message
    assert "python data_tools/train_tokenizer.py" in message
    assert "python data_tools/preprocess.py" in message


def test_unknown_key_offers_the_nearest_name(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    file = _write(tiny_config("pretrain", tiny_data, tmp_path / "run"), tmp_path)
    message = _message(_launch("pretrain", "--config", str(file), "train.micro_batchsize=2"))
    assert "train.micro_batchsize" in message
    assert "train.micro_batch_size" in message
    assert not (tmp_path / "run").exists()


def test_sizes_that_do_not_divide(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    file = _write(tiny_config("pretrain", tiny_data, tmp_path / "run"), tmp_path)
    message = _message(_launch("pretrain", "--config", str(file), "train.global_batch_size=7"))
    assert "global_batch_size=7" in message
    assert "use 6 or 8" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["pretrain", "weak"])
def test_missing_corpus_names_the_command(stage: str, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(stage, tiny_data, tmp_path / "run")
    file = _write(config, tmp_path, data__sources=[{"prefix": str(tmp_path / "absent")}])
    message = _message(_launch(stage, "--config", str(file)))
    tool = "preprocess.py" if stage == "pretrain" else "preprocess_pairs.py"
    assert f"python data_tools/{tool}" in message
    assert str(tmp_path / "absent") in message
    assert not (tmp_path / "run").exists()


def test_stage_and_script_must_agree(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    file = _write(tiny_config("pretrain", tiny_data, tmp_path / "run"), tmp_path)
    assert "launch/pretrain.sh" in _message(_launch("weak", "--config", str(file)))


def test_contrastive_batches_that_fit_nowhere(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """Told before anything is loaded: by rows and by tokens."""
    file = _write(tiny_config("weak", tiny_data, tmp_path / "run"), tmp_path)
    message = _message(_launch("weak", "--config", str(file), "train.micro_batch_size=3"))
    assert "train.global_batch_size=8" in message
    assert "use 6 or 9" in message
    words = ["train.micro_batch_size=null", "train.micro_batch_tokens=40"]
    assert "below one text of 48 tokens" in _message(_launch("weak", "--config", str(file), *words))
    assert not (tmp_path / "run").exists()


def _error_of(config: Any) -> str:
    try:
        train_run(config)
    except ValueError as error:
        return str(error)
    return ""


def test_run_folder_of_another_config(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """parallel.*, train.steps, checkpoint.* and so on may differ; the learning rate may not."""
    config = tiny_config(
        "pretrain", tiny_data, tmp_path / "run", train={"steps": 1, "micro_batch_size": 8, "global_batch_size": 8}
    )
    workers.run(train_run, 1, config)
    tree = yaml.safe_load(dump_config(config))
    tree["optimizer"]["lr"] = 5e-4
    (message,) = workers.run(_error_of, 1, parse_config(tree, "test"))
    assert "optimizer.lr: 0.001 -> 0.0005" in message
    tree["optimizer"]["lr"] = 1e-3
    tree["train"].update(steps=2, micro_batch_size=4)
    assert workers.run(_error_of, 1, parse_config(tree, "test")) == [""]


def test_tokenizer_of_other_data_or_checkpoint(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    command = ["data_tools/train_tokenizer.py", "--input", f"{tiny_data['lm']}.jsonl", "--vocab-size", "400"]
    subprocess.run([sys.executable, *command, "--output-prefix", str(other)], cwd=ROOT, check=True, capture_output=True)
    config = tiny_config("pretrain", tiny_data, tmp_path / "run")
    tree = yaml.safe_load(dump_config(config))
    tree["tokenizer"]["model"] = f"{other}.model"
    (message,) = workers.run(_error_of, 1, parse_config(tree, "test"))
    assert "tokenizer" in message
    assert "preprocess.py" in message
    workers.run(train_run, 1, config)
    tree = yaml.safe_load(dump_config(config))
    tree["tokenizer"]["model"] = f"{other}.model"
    tree["run_dir"] = str(tmp_path / "next")
    tree["checkpoint"]["init_from"] = str(tmp_path / "run")
    (message,) = workers.run(_error_of, 1, parse_config(tree, "test"))
    assert "another tokenizer" in message


def test_checkpoint_of_another_shape(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    workers.run(train_run, 1, tiny_config("pretrain", tiny_data, tmp_path / "run"))
    config = tiny_config("weak", tiny_data, tmp_path / "weak", checkpoint={"init_from": str(tmp_path / "run")})
    tree = yaml.safe_load(dump_config(config))
    tree["model"]["ffn_hidden_size"] = 64
    (message,) = workers.run(_error_of, 1, parse_config(tree, "test"))
    assert "ffn_hidden_size: 96 there, 64 here" in message
    (message,) = workers.run(
        _error_of, 1, tiny_config("weak", tiny_data, tmp_path / "w", checkpoint={"init_from": str(tmp_path)})
    )
    assert "holds no checkpoint" in message


def test_finetune_runs_at_the_alpha_that_weak_ended_at(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    weak = tiny_config("weak", tiny_data, tmp_path / "weak", soft_mask={"schedule": "linear"})
    workers.run(train_run, 1, weak)
    start = {"checkpoint": {"init_from": str(tmp_path / "weak")}}
    (message,) = workers.run(_error_of, 1, tiny_config("finetune", tiny_data, tmp_path / "finetune", **start))
    assert "soft_mask.alpha=1.0" in message
    assert not (tmp_path / "finetune").exists()
    opened = {"schedule": "constant", "alpha": 1.0}
    assert workers.run(
        _error_of, 1, tiny_config("finetune", tiny_data, tmp_path / "finetune", soft_mask=opened, **start)
    ) == [""]
