"""Runs that stop under one parallel layout and go on under another."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gloo_pool import WorkerPool
from layouts import assemble, build_test_trainer, by_global_name, tiny_config

from megatron_conan.config import RunConfig

SAVED_AT, STEPS = 4, 14

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "dp2 sharded": (2, {"distributed_optimizer": True}),
    "tp2 sp": (2, {"tensor": 2, "sequence": True}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
    "dp2 tp2 sharded": (4, {"tensor": 2, "distributed_optimizer": True}),
    "dp2 pp2 sharded": (4, {"pipeline": 2, "distributed_optimizer": True}),
}
"""Number of processes and section `parallel`; sharded: optimizer state over data-parallel ranks."""

STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "finetune": {
        # mined before steps 1, 7 and 13; in between negatives give way singly
        "mining": {"every": 6, "pool_size": 8, "window": 30, "low_score": 0.0, "drop_ratio": 1.0001, "high_score": 1.0},
        "contrastive": {"temperature": 0.05, "num_hard_negatives": 2},
        "soft_mask": {"form": "row", "schedule": "linear"},
    },
}
"""What a run has beside the tiny config; the embedding table has a learning rate, and so a parameter group, of its own."""

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative, of the losses after a change of layout: sums over ranks and over the halves of a product run in another order. In
bf16 a cosine has three digits and is divided by a temperature of .05."""


class _Note:
    """A hook that keeps everything a checkpoint must bring back, as it is when step `SAVED_AT` is done."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}
        self.moments: dict[str, dict[str, Any]] = {}
        self.negatives: dict[str, str] = {}

    def before_step(self, trainer: Any, step: int) -> dict[str, float]:
        if step != SAVED_AT + 1:
            return {}
        self.weights = by_global_name(trainer, lambda parameter: parameter.data)
        for kind in ("param", "exp_avg", "exp_avg_sq", "step"):
            self.moments[kind] = by_global_name(trainer, lambda p, kind=kind: optimizer_state(trainer, p, kind))
        if "negatives" in vars(trainer.parts.data):
            tables = trainer.parts.data.negatives.items()
            self.negatives = {name: table.content_hash() for name, table in tables}
        return {}

    def after_training(self, trainer: Any) -> None: ...

    def state(self, trainer: Any, step: int) -> dict[str, Any]:
        return {}

    def restore(self, trainer: Any, state: dict[str, Any]) -> None: ...


def optimizer_state(trainer: Any, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    """What the optimizer keeps of a parameter (param is the fp32 copy), whole where it is sharded over dp ranks."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    (part,) = trainer.optimizer.chained_optimizers
    if not isinstance(part, DistributedOptimizer):
        main = getattr(parameter, "main_param", parameter)
        found = {"param": main.data, **part.optimizer.state[main]}[kind]
        return found.expand(parameter.shape)
    whole = torch.zeros(parameter.numel())
    if parameter in part.model_param_group_index_map:
        own = part._get_model_param_range_map(parameter)["param"]
        whole[own.start : own.end] = part._get_main_param_and_optimizer_states(parameter)[kind].detach()
    torch.distributed.all_reduce(whole, group=trainer.setup.context.dp_group)
    return whole.view(parameter.shape)


def _train_noted(config: RunConfig) -> _Note:
    from megatron_conan.train import loop

    trainer = build_test_trainer(config)
    note = trainer.hooks["note"] = _Note()
    loop.train(trainer)
    return note


@dataclass
class Noted:
    """A run to its end."""

    folder: Path
    losses: list[float]
    """Of steps `SAVED_AT` + 1 to `STEPS`."""
    state: dict[str, dict[str, np.ndarray]]
    """Weights and optimizer state after step `SAVED_AT`: kind -> global name -> whole array."""
    negatives: dict[str, str]
    """Digest of each source's table of negatives then."""


class Runs:
    """Uninterrupted runs, each made once, and runs that go on from their checkpoints under another layout."""

    def __init__(self, workers: WorkerPool, files: dict[str, Path], folder: Path) -> None:
        self.workers, self.files, self.folder = workers, files, folder
        self._whole: dict[tuple[str, ...], Noted] = {}

    def whole(self, stage: str, layout: str, precision: str = "fp32") -> Noted:
        """The uninterrupted run."""
        key = (stage, layout, precision)
        if key not in self._whole:
            self._whole[key] = self._train(self.folder / "-".join(key).replace(" ", "_"), *key)
        return self._whole[key]

    def check_change(self, stage: str, saved: str, other: str, precision: str = "fp32") -> None:
        """Save under one layout, go on under the other: all state bitwise the same at once, and the losses that follow.

        Bitwise too where the layout stays, to `TOLERANCE` else.
        """
        whole = self.whole(stage, saved, precision)
        folder = self.folder / "resumed"
        shutil.rmtree(folder, ignore_errors=True)
        copy_at_save(whole.folder, folder)
        found = self._train(folder, stage, other, precision)
        assert found.negatives == whole.negatives
        assert whole.negatives or stage == "pretrain"
        for kind, arrays in whole.state.items():
            assert found.state[kind].keys() == arrays.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(found.state[kind][name], array, err_msg=f"{kind} of {name}")
        pairs = zip(found.losses, whole.losses, strict=True)
        difference = max(abs(one - expected) / abs(expected) for one, expected in pairs)
        print(f"{stage} {precision}: {saved} -> {other}: largest relative difference of the losses {difference:.1e}")
        assert difference <= (0.0 if saved == other else TOLERANCE[precision])

    def _train(self, folder: Path, stage: str, layout: str, precision: str) -> Noted:
        """Run to the end, from the beginning or from the folder's checkpoint."""
        world, parallel = LAYOUTS[layout]
        train = {"steps": STEPS, "micro_batch_size": 2, "global_batch_size": 8, "precision": precision}
        optimizer = {"lr": 1e-3, "decoupled_lr": 2e-3, "clip_grad": 0.5}
        checkpoint = {"every": SAVED_AT, "keep_last": STEPS, "asynchronous": False}
        sections = {"train": train, "optimizer": optimizer, "checkpoint": checkpoint, **STAGES[stage]}
        config = tiny_config(stage, self.files, folder, parallel=parallel, **sections)
        notes = self.workers.run(_train_noted, world, config)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        state = {"weights": assemble([note.weights for note in notes])}
        for kind in notes[0].moments:
            state[kind] = assemble([note.moments[kind] for note in notes])
        assert all(note.negatives == notes[0].negatives for note in notes)
        return Noted(folder, [row["loss"] for row in rows[SAVED_AT:]], state, notes[0].negatives)


def copy_at_save(run: Path, folder: Path) -> None:
    """The run as it was when it had saved after `SAVED_AT` and was killed a little later."""
    shutil.copytree(run, folder)
    name = f"step_{SAVED_AT:08d}"
    for kind in ("checkpoints", "negatives"):
        for later in (folder / kind).glob("step_*"):
            if later.name != name:
                shutil.rmtree(later)
    (folder / "checkpoints" / "latest").write_text(name + "\n", encoding="utf-8")
