"""The soft mask's schedule, and its state during a run."""

from __future__ import annotations

from typing import Literal

import torch

from megatron_conan.config.tree import SoftMaskConfig

Schedule = Literal["linear", "square", "inverse_square", "constant"]


def scheduled_alpha(schedule: Schedule, step: int, steps: int, constant: float = 0.0) -> float:
    """alpha(t) at the loss computation of step t (Conan-embedding-v2; tau = `steps`).

    Args:
        schedule: linear t/tau, square (t/tau)^2, inverse_square 1-(1-t/tau)^2, constant.
        step: t, 1 for the first step; `steps` gives exactly 1 for every schedule but the constant one.
        steps: tau.
        constant: alpha of the constant schedule.
    """
    if schedule == "constant":
        return constant
    progress = min(step / steps, 1.0)
    if schedule == "linear":
        return progress
    if schedule == "square":
        return progress**2
    if schedule == "inverse_square":
        return 1.0 - (1.0 - progress) ** 2
    raise ValueError(f"unknown soft-mask schedule {schedule!r}; known are linear, square, inverse_square, constant")


class SoftMask:
    """Form and present alpha of a model's attention: one object shared by all its layers.

    Attributes:
        form: row, column, constant or learned.
        alpha: scalar fp32 tensor on the device (a tensor, so that compiled code and kernels see no new constant).
        value: the same number on the host, so that choosing a fast path costs no synchronisation.
    """

    def __init__(self, config: SoftMaskConfig, steps: int, device: torch.device) -> None:
        """Start at step 0 of `config.schedule` over `steps` steps."""
        self.config, self.steps = config, steps
        self.form = config.form
        self.alpha = torch.zeros((), dtype=torch.float32, device=device)
        self.value = 0.0
        self.at_step(0)

    def at_step(self, step: int) -> float:
        """Set alpha to its value at a step and return it."""
        return self.set(scheduled_alpha(self.config.schedule, step, self.steps, self.config.alpha))

    def set(self, value: float) -> float:
        """Set alpha to `value` in [0, 1] and return it."""
        self.value = value
        self.alpha.fill_(value)
        return value
