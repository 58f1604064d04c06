"""Training with each attention backend, and of the soft mask's learned opening."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gloo_pool import WorkerPool
from layouts import assemble, tiny_config, train_run

from megatron_conan.config import RunConfig

LEARNING_RATE = 3e-4


def _weak(files: dict[str, Path], run: Path, form: str, **sections: Any) -> RunConfig:
    defaults = {
        "soft_mask": {"form": form, "schedule": "linear"},
        "train": {"steps": 20, "micro_batch_size": 8, "global_batch_size": 8},
        "optimizer": {"lr": LEARNING_RATE},
        "contrastive": {"temperature": 0.05},
    }
    return tiny_config("weak", files, run, **{**defaults, **sections})


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", ["row", "column", "constant", "learned"])
def test_backends_train_alike(form: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """20 steps of weak from a closed to an open mask: losses of two_pass and sdpa are the definition's to 1e-5."""
    losses, weights = {}, {}
    for backend in ("reference", "two_pass", "sdpa"):
        run = tmp_path / backend
        (rank,) = workers.run(train_run, 1, _weak(tiny_data, run, form, attention={"backend": backend}))
        losses[backend], weights[backend] = [row["loss"] for row in _rows(run)], assemble([rank["weights"]])
        assert [row["alpha"] for row in _rows(run)] == pytest.approx([step / 20 for step in range(1, 21)])
    assert len(losses["reference"]) == 20
    assert np.ptp(losses["reference"]) > 0.1  # something was learned
    for backend in ("two_pass", "sdpa"):
        np.testing.assert_allclose(losses[backend], losses["reference"], rtol=1e-5)
        for name, array in weights["reference"].items():
            np.testing.assert_allclose(weights[backend][name], array, atol=LEARNING_RATE / 20, err_msg=name)


@pytest.mark.parametrize("backend", ["two_pass", "sdpa"])
def test_learned_opening_is_trained_saved_and_restored(
    backend: str, workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """theta, one a head: goes on after step 4 as if nothing had happened, also split over tensor ranks."""
    sections = {
        "train": {"steps": 8, "micro_batch_size": 4, "global_batch_size": 8},
        "checkpoint": {"every": 4},
        "attention": {"backend": backend},
    }
    one = tmp_path / "one"
    whole = assemble(
        [rank["weights"] for rank in workers.run(train_run, 1, _weak(tiny_data, one, "learned", **sections))]
    )
    thetas = {name: array for name, array in whole.items() if name.endswith("theta")}
    assert len(thetas) == 4  # layers
    for theta in thetas.values():
        assert theta.shape == (4,)
        assert len(set(theta.tolist())) > 1, "heads that all do the same"
        assert (np.abs(theta) > 1e-4).all()
    for name, world, parallel in (("again", 1, {}), ("tp2", 2, {"tensor": 2}), ("pp2", 2, {"pipeline": 2})):
        run = tmp_path / name
        shutil.copytree(one, run)
        shutil.rmtree(run / "checkpoints" / "step_00000008")
        (run / "checkpoints" / "latest").write_text("step_00000004\n", encoding="utf-8")
        ranks = workers.run(train_run, world, _weak(tiny_data, run, "learned", parallel=parallel, **sections))
        found = assemble([rank["weights"] for rank in ranks])
        tolerance = {"rtol": 0, "atol": 0} if world == 1 else {"rtol": 0, "atol": LEARNING_RATE / 20}
        for key, array in whole.items():
            np.testing.assert_allclose(found[key], array, err_msg=f"{name} {key}", **tolerance)
        losses = [[row["loss"] for row in _rows(folder)] for folder in (run, one)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=0 if world == 1 else 1e-5)


def test_a_backend_that_cannot_is_refused_before_the_model_is_built(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    config = _weak(tiny_data, tmp_path / "run", "row", attention={"backend": "kernel"})
    with pytest.raises(ValueError, match=r"attention\.backend=kernel: .* runs on CUDA, not on cpu; use backend=auto"):
        workers.run(train_run, 1, config)
