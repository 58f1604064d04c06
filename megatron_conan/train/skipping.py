"""Steps whose loss or gradient is not finite: they change nothing, are counted, and too many in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Keep a rank's batch of a step for study: torch.load(file, weights_only=False). Returns the folder."""
    folder = run_dir / "not_finite" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, "rank": rank, "values": dict(values), "batch": batch}, folder / f"rank_{rank}.pt")
    return folder
