"""Checkpoints written beside training are those written at once, whole or not there; a damaged one gives way."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo_pool import WorkerPool
from layouts import assemble, build_test_trainer, deterministic, final_weights, tiny_config, train_run
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_conan.config import RunConfig
from megatron_conan.train.checkpoint_files import find_damage, find_damage_beside, saved_checkpoints
from megatron_conan.train.checkpoint_writer import BackgroundWriter

MINING = {
    "mining": {"every": 3, "pool_size": 8, "window": 40},
    "contrastive": {"temperature": 0.05, "num_hard_negatives": 2},
    "soft_mask": {"schedule": "constant", "alpha": 1.0},
}
SHARDED = {"distributed_optimizer": True}


def _config(stage: str, files: dict[str, Path], run: Path, **checkpoint: Any) -> RunConfig:
    train = {"steps": 8, "micro_batch_size": 4, "global_batch_size": 8}
    parallel = checkpoint.pop("parallel", {"tensor": 2})  # both ranks write
    sections: dict[str, Any] = {"train": train, "parallel": parallel, **(MINING if stage == "finetune" else {})}
    return tiny_config(stage, files, run, **sections, checkpoint={"every": 2, "keep_last": 10, **checkpoint})


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _tensors(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    dcp_to_torch_save(checkpoint, folder / "whole.pt")
    flat: dict[str, torch.Tensor] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                collect(part, f"{name}.{key}")
        elif isinstance(value, torch.Tensor):
            flat[name] = value

    collect(torch.load(folder / "whole.pt", weights_only=False), "")
    return flat


@pytest.mark.parametrize(
    ("stage", "parallel"),
    [
        ("finetune", SHARDED),
        pytest.param("pretrain", {}, marks=pytest.mark.full),
        pytest.param("pretrain", {"tensor": 2}, marks=pytest.mark.full),
        pytest.param("sft", {"pipeline": 2}, marks=pytest.mark.full),
    ],
)
def test_written_in_the_background_is_written_at_once(
    stage: str, parallel: dict[str, Any], workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """Training changes every tensor while its checkpoint is being written: bitwise the same files' contents."""
    for name, asynchronous in (("beside", True), ("at once", False)):
        config = _config(stage, tiny_data, tmp_path / name, asynchronous=asynchronous, parallel=parallel)
        workers.run(train_run, 2, config)
    steps = ["step_00000002", "step_00000004", "step_00000006", "step_00000008"]
    assert _names(tmp_path / "beside") == _names(tmp_path / "at once") == ["latest", *steps]
    for step in steps:
        found, expected = (_tensors(tmp_path / name / "checkpoints" / step, tmp_path) for name in ("beside", "at once"))
        assert found.keys() == expected.keys()
        assert any("exp_avg" in name for name in expected)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (step, name)
        states = [
            json.loads((tmp_path / name / "checkpoints" / step / "conan.json").read_text())
            for name in ("beside", "at once")
        ]
        assert states[0] == states[1]
        subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
            cwd=tmp_path / "beside" / "checkpoints" / step,
            check=True,
        )


def test_what_is_kept(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    config = _config("pretrain", tiny_data, tmp_path / "run", every=1, keep_last=2, keep_every=3)
    workers.run(train_run, 2, config)
    assert _names(config.run_dir) == ["latest", *(f"step_{step:08d}" for step in (3, 6, 7, 8))]


def _train_and_tell(config: RunConfig) -> dict[str, Any]:
    """As `train_run`, with what this rank says."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        result = train_run(config)
    return {**result, "told": told.getvalue()}


def _damage(folder: Path, how: str) -> str:
    """Damage one of rank 1's files; returns what should be said of it."""
    if how == "negatives":  # they lie beside the checkpoint, and it is nothing without them
        table = folder.parent.parent / "negatives" / folder.name / "pairs" / "pool_scores.npy"
        table.write_bytes(table.read_bytes()[:-1] + b"\1")
        return f"negatives/{folder.name}/pairs/pool_scores.npy is not what was written"
    file = max(folder.glob("__1_*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "flipped byte":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return f"{file.name} is not what was written"
    if how == "truncated":
        file.write_bytes(content[:-100])
        return f"{file.name} is not what was written"
    if how == "missing":
        file.unlink()
        return f"{file.name} is missing"
    if how == "state":
        (folder / "conan.json").write_text("{")
        return "conan.json is not what was written"
    (folder / "SHA256SUMS").unlink()
    return "SHA256SUMS is missing"


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        *(("pretrain", how) for how in ("flipped byte", "truncated", "missing", "state", "sums")),
        ("finetune", "state"),
        ("finetune", "negatives"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    how: str,
    stage: str,
    workers: WorkerPool,
    tiny_data: dict[str, Path],
    tmp_path: Path,
) -> None:
    config = _config(stage, tiny_data, tmp_path / "run", asynchronous=False)
    whole = workers.run(train_run, 2, config)
    lines = [deterministic(json.loads(line)) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    said = _damage(config.run_dir / "checkpoints" / "step_00000008", how)
    newest = config.run_dir / "checkpoints" / "step_00000008"
    assert [*find_damage(newest), *(find_damage_beside(newest) if how == "negatives" else [])][0].startswith(said)
    again = workers.run(_train_and_tell, 2, config)
    told = "".join(rank["told"] for rank in again)
    assert f"warning: checkpoint step_00000008 is damaged, step_00000006 is used: {said}" in told
    assert told.count("is damaged") == 1
    assert "going on from step 6 of 8" in told
    assert [
        deterministic(json.loads(line)) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()
    ] == lines
    expected, found = assemble([rank["weights"] for rank in whole]), assemble([rank["weights"] for rank in again])
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert not [what for folder in saved_checkpoints(config.run_dir) for what in find_damage(folder)]


def test_all_damaged_is_an_error_that_names_them(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    config = _config("pretrain", tiny_data, tmp_path / "run", every=4, asynchronous=False)
    workers.run(train_run, 2, config)
    for folder in saved_checkpoints(config.run_dir):
        _damage(folder, "flipped byte")
    with pytest.raises(ValueError, match=r"all checkpoints of .* are damaged\. step_00000008: .*\. step_00000004: .*"):
        workers.run(train_run, 2, config)
    later = tiny_config("sft", tiny_data, tmp_path / "later", checkpoint={"init_from": str(config.run_dir)})
    with pytest.raises(ValueError, match=r"checkpoint .*step_00000008 is damaged: __1_.*Name another one"):
        workers.run(train_run, 2, later)


def test_a_run_can_be_taken_back(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """An older name in `latest`, or none at all."""
    config = _config("pretrain", tiny_data, tmp_path / "run", asynchronous=False)
    workers.run(train_run, 2, config)
    latest = config.run_dir / "checkpoints" / "latest"
    latest.write_text("step_00000004\n")
    assert [path.name for path in saved_checkpoints(config.run_dir)] == ["step_00000004", "step_00000002"]
    latest.write_text("step_00000999\n")
    assert saved_checkpoints(config.run_dir)[0].name == "step_00000008"
    latest.unlink()
    assert saved_checkpoints(config.run_dir)[0].name == "step_00000008"


def test_fewer_steps_than_are_done_are_refused(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    config = _config("pretrain", tiny_data, tmp_path / "run", asynchronous=False)
    workers.run(train_run, 2, config)
    shorter = config.model_copy(update={"train": config.train.model_copy(update={"steps": 7})})
    with pytest.raises(ValueError, match=r"run stands at step 8, beyond train\.steps=7: raise it, or write an earlier"):
        workers.run(train_run, 2, shorter)
    (config.run_dir / "checkpoints" / "latest").write_text("step_00000006\n")
    workers.run(train_run, 2, shorter)
    assert _names(config.run_dir)[-1] == "step_00000008"
    assert saved_checkpoints(config.run_dir)[0].name == "step_00000007"


def test_a_stage_does_not_start_from_an_unfinished_one(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    config = _config("pretrain", tiny_data, tmp_path / "run", asynchronous=False)
    workers.run(train_run, 2, config)
    shutil.rmtree(config.run_dir / "checkpoints" / "step_00000008")
    later = {"checkpoint": {"init_from": str(config.run_dir)}}
    with pytest.raises(ValueError, match=r"is a run that stands at step 6 of 8: let it end first"):
        workers.run(train_run, 2, tiny_config("sft", tiny_data, tmp_path / "later", **later))
    later = {"checkpoint": {"init_from": str(config.run_dir / "checkpoints" / "step_00000006")}, "train": {"steps": 1}}
    workers.run(train_run, 2, tiny_config("sft", tiny_data, tmp_path / "later", **later))


def _train_with_a_dead_writer(config: RunConfig, rank: int) -> str:
    """The process that writes is killed before the second checkpoint."""
    from megatron_conan.train import loop

    trainer = build_test_trainer(config)

    class Kill:
        def before_step(self, trainer: Any, step: int) -> dict[str, float]:
            if step == 4 and trainer.setup.context.rank == rank:
                subprocess.run(["pkill", "-KILL", "-f", "-P", str(os.getpid()), "checkpoint_worker"], check=True)
            return {}

        def after_training(self, trainer: Any) -> None: ...

        def state(self, trainer: Any, step: int) -> dict[str, Any]:
            return {}

        def restore(self, trainer: Any, state: dict[str, Any]) -> None: ...

    trainer.hooks["kill"] = Kill()
    try:
        loop.train(trainer)
    except OSError as error:
        return str(error)
    return f"trained to {trainer.step} {final_weights(trainer) is None}"


def test_a_writer_that_dies_fails_its_checkpoint_only(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    config = _config("pretrain", tiny_data, tmp_path / "run", asynchronous=True)
    messages = workers.run(_train_with_a_dead_writer, 2, config, 1)
    found = re.match(
        r"checkpoint .*step_0000000(\d) could not be written: rank 1: the process that .* has died", messages[0]
    )
    assert found, messages
    assert messages[0] == messages[1]
    assert "checkpoint.asynchronous=false" in messages[0]
    assert "Make room" not in messages[0]
    failed = int(found[1])  # that of step 2 may have been under way
    assert _names(config.run_dir) == (["latest", "step_00000002"] if failed == 4 else [])
    workers.run(train_run, 2, config)
    assert _names(config.run_dir)[-1] == "step_00000008"


def test_a_writer_that_dies_between_two_checkpoints(tmp_path: Path) -> None:
    """What is then asked of it fails as such, and closing it doesn't."""
    writer = BackgroundWriter()
    os.kill(writer._process.pid, signal.SIGKILL)
    writer._process.wait()
    writer.submit([(str(tmp_path / "__0_0.distcp"), "name", ([], []))], [])
    assert writer.is_done()
    assert writer.result().error == "the process that writes checkpoints has died (exit status -9)"
    writer.close()
