"""Steps whose loss or gradient is not finite: they change nothing, are counted, and too many in a row end the run."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class SkippedSteps:
    """How many steps were skipped; part of a checkpoint."""

    total: int = 0
    """In the whole run."""
    in_a_row: int = 0
    """Up to and with the last step."""

    def note(self, values: Mapping[str, float]) -> bool:
        """Count a step by its metrics, which are the same on all ranks. Returns whether it was skipped."""
        skipped = not is_finite(values)
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return skipped


def is_finite(values: Mapping[str, float]) -> bool:
    """Whether a step with this loss and gradient norm may change the weights."""
    return math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])


def save_batch(run_dir: Path, step: int, rank: int, batch: Any, values: Mapping[str, float]) -> Path:
    """Keep a rank's batch of a step for study: torch.load(file) gives its fields by name, on the CPU.

    Returns the folder. What keeps it from being written is told and no more: the step is what ends the run.
    """
    folder = run_dir / "not_finite" / f"step_{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"step": step, "rank": rank, "values": dict(values), "batch": _plain(batch)}
        torch.save(kept, folder / f"rank_{rank}.pt")
    except (OSError, RuntimeError) as error:
        print(f"warning: rank {rank}'s batch can't be kept: {error}", file=sys.stderr, flush=True)
    return folder


def _plain(value: Any) -> Any:
    """Tensors, numbers and texts by field name; of anything else, such as a store of texts, its name."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(getattr(value, "name", type(value).__name__))
