"""A request to stop, by file or signal to any rank: all ranks save after the step; the same command goes on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_pool import WorkerPool
from layouts import build_test_trainer, deterministic, final_weights, tiny_config

from megatron_conan.config import RunConfig
from megatron_conan.train.checkpoint_files import find_damage
from megatron_conan.train.stopping import AGAIN_SECONDS, StopRequest, stop_file

STEPS = 7


def _config(files: dict[str, Path], run: Path, **checkpoint: Any) -> RunConfig:
    return tiny_config(
        "finetune",
        files,
        run,
        train={"steps": STEPS, "micro_batch_size": 4, "global_batch_size": 8},
        checkpoint={"every": 3, "keep_last": 10, "asynchronous": False, **checkpoint},
        contrastive={"temperature": 0.05, "num_hard_negatives": 2},
        soft_mask={"schedule": "constant", "alpha": 1.0},
        mining={"every": 4, "pool_size": 8, "window": 40, "margin": None, "drop_ratio": 1.001, "high_score": 1.1},
    )


class _Ask:
    """Asks the run to stop, before a step, on one rank; and notes the rows of all steps."""

    def __init__(self, how: str, step: int, rank: int) -> None:
        self.how, self.step, self.rank = how, step, rank

    def before_step(self, trainer: Any, step: int) -> dict[str, float]:
        if (step, trainer.setup.context.rank) != (self.step, self.rank):
            return {}
        if self.how == "file":
            stop_file(trainer.setup.config.run_dir).touch()
        elif self.how != "never":
            os.kill(os.getpid(), getattr(signal, self.how))
        return {}

    def after_training(self, trainer: Any) -> None:
        (trainer.setup.config.run_dir / "ended").touch()

    def state(self, trainer: Any, step: int) -> dict[str, Any]:
        return {}

    def restore(self, trainer: Any, state: dict[str, Any]) -> None: ...


def _train(config: RunConfig, how: str, step: int, rank: int) -> dict[str, Any]:
    """Train until the end or the request; what this rank says, drew and ends with."""
    from megatron_conan.train import loop

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        trainer = build_test_trainer(config)
        trainer.hooks["ask"] = _Ask(how, step, rank)
        data = trainer.parts.data
        draw, drawn = data.batch, []

        def batch(step: int) -> Any:
            found = draw(step)
            texts = [part.tokens.tolist() for part in found.micro_batches]
            drawn.append((step, [part.rows.tolist() for part in found.batches], texts))
            return found

        data.batch = batch
        loop.train(trainer)
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    return {"told": told.getvalue(), "drawn": drawn, "step": trainer.step, "weights": final_weights(trainer)}


def _lines(run: Path) -> list[dict[str, Any]]:
    return [deterministic(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _saved(*steps: int) -> list[str]:
    return ["latest", *(f"step_{step:08d}" for step in steps)]


@pytest.mark.full
def test_asked_again_and_again(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """By file and by every signal, on either rank, where a checkpoint is due and where none is, and at the last step."""
    whole = workers.run(_train, 2, _config(tiny_data, tmp_path / "whole"), "never", 0, 0)
    config = _config(tiny_data, tmp_path / "run")
    drawn: list[list[Any]] = [[], []]
    requests = [("SIGTERM", 1, 0), ("SIGUSR1", 2, 1), ("file", 3, 1), ("SIGINT", 5, 1), ("file", STEPS, 0)]
    for before, (how, step, rank) in zip([0, 1, 2, 3, 5], requests, strict=True):
        if before:
            stop_file(config.run_dir).touch()  # of an earlier request: the start removes it
        ranks = workers.run(_train, 2, config, how, step, rank)
        for i, result in enumerate(ranks):
            assert result["step"] == step
            drawn[i] += result["drawn"]
        told = ranks[0]["told"]
        assert (f"going on from step {before} of {STEPS}\n" in told) == (before > 0)
        stopped = f"stopped on request after step {step} of {STEPS}; the same command goes on\n"
        assert (stopped in told) == (step < STEPS)
        assert "stopped" not in ranks[1]["told"]
        assert (config.run_dir / "ended").exists() == (step == STEPS)
        assert stop_file(config.run_dir).exists() == (how == "file")
        assert (config.run_dir / "checkpoints" / "latest").read_text() == f"step_{step:08d}\n"
    assert _names(config.run_dir) == _saved(1, 2, 3, 5, 6, 7)
    assert not any(find_damage(folder) for folder in (config.run_dir / "checkpoints").glob("step_*"))
    assert _lines(config.run_dir) == _lines(tmp_path / "whole")
    assert [line["step"] for line in _lines(config.run_dir)] == list(range(1, STEPS + 1))
    for i, result in enumerate(whole):
        assert drawn[i] == result["drawn"]
        for name, (array, *_) in result["weights"].items():
            assert array.tobytes() == ranks[i]["weights"][name][0].tobytes(), name


def _requests(folder: Path) -> list[Any]:
    """What a request knows, in the main thread of a process."""
    found: list[Any] = []
    with StopRequest(folder, 0) as request:
        found.append(request.is_made())
        stop_file(folder).touch()
        found.append(request.is_made())
        stop_file(folder).unlink()
    with StopRequest(folder, 1) as request:
        stop_file(folder).touch()
        found.append(request.is_made())  # that is rank 0's to see
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # at once: the same Ctrl-C
        found.append(request.is_made())
        assert request.signalled_at is not None
        request.signalled_at -= AGAIN_SECONDS + 1.0
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's own, after some seconds
        found.append("still there")
        try:
            os.kill(os.getpid(), signal.SIGINT)
            torch.zeros(1)  # Python runs the handler before the next instruction
        except KeyboardInterrupt:
            found.append("a second Ctrl-C")
    return found


def test_what_counts_as_a_request(workers: WorkerPool, tmp_path: Path) -> None:
    (found,) = workers.run(_requests, 1, tmp_path)
    assert found == [False, True, False, True, "still there", "a second Ctrl-C"]


def _slow_writer(config: RunConfig) -> dict[str, Any]:
    """Every checkpoint takes longer to write than the steps until the next."""
    from megatron_conan.train import loop

    real, waits = loop.Checkpointer.is_written, []

    def is_written(self: Any) -> bool:
        waits.append(self.is_saving)
        return not self.is_saving  # nothing is named but when it must be

    loop.Checkpointer.is_written = is_written  # type: ignore[method-assign]
    try:
        result = _train(config, "file", 6, 0)
    finally:
        loop.Checkpointer.is_written = real  # type: ignore[method-assign]
    return {**result, "waited": sum(waits)}


def test_stop_while_a_checkpoint_is_being_written(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """Both are whole then, with their negatives; the one before serves where the last is damaged."""
    config = _config(tiny_data, tmp_path / "run", every=1, asynchronous=True)
    ranks = workers.run(_slow_writer, 2, config)
    assert all(result["step"] == 6 and result["waited"] == 5 for result in ranks)
    assert _names(config.run_dir) == _saved(*range(1, 7))
    assert sorted(path.name for path in (config.run_dir / "negatives").glob("step_*")) == _saved(*range(1, 7))[1:]
    (config.run_dir / "checkpoints" / "step_00000006" / "common.pt").unlink()
    ranks = workers.run(_train, 2, _config(tiny_data, config.run_dir), "never", 0, 0)
    assert f"going on from step 5 of {STEPS}\n" in ranks[0]["told"]
    assert [line["step"] for line in _lines(config.run_dir)] == list(range(1, STEPS + 1))
