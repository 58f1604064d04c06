"""Soft-mask schedules: end points, formulas, monotony, and the state that all layers share."""

import itertools

import pytest
import torch

from megatron_conan.config.tree import SoftMaskConfig
from megatron_conan.model.mask import SoftMask, scheduled_alpha

OPENING = ["linear", "square", "inverse_square"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("schedule", OPENING)
@pytest.mark.parametrize("steps", [1, 3, 7, 1000])
def test_opening_schedules_go_from_exactly_0_to_exactly_1(schedule, steps):
    values = [scheduled_alpha(schedule, step, steps) for step in range(steps + 1)]
    assert values[0] == 0.0
    assert values[-1] == 1.0
    assert all(a < b for a, b in itertools.pairwise(values))
    assert scheduled_alpha(schedule, steps + 5, steps) == 1.0


@pytest.mark.parametrize(("schedule", "value"), [("linear", 0.25), ("square", 0.0625), ("inverse_square", 0.4375)])
def test_formulas_at_a_quarter(schedule, value):
    assert scheduled_alpha(schedule, 25, 100) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("constant", [0.0, 0.3, 1.0])
def test_the_constant_schedule_never_moves(constant):
    assert {scheduled_alpha("constant", step, 10, constant) for step in range(11)} == {constant}


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"'cubic'; known are linear, square, inverse_square, constant"):
        scheduled_alpha("cubic", 1, 10)  # type: ignore[arg-type]


def test_the_state_keeps_one_tensor_and_its_host_copy():
    mask = SoftMask(SoftMaskConfig(schedule="linear", form="column"), steps=4, device=CPU)
    tensor = mask.alpha
    assert (mask.form, mask.value, tensor.item()) == ("column", 0.0, 0.0)
    assert mask.at_step(1) == 0.25
    assert mask.alpha is tensor
    assert (mask.value, tensor.item()) == (0.25, 0.25)
    assert mask.set(1.0) == mask.value == tensor.item() == 1.0


def test_a_constant_mask_starts_at_its_alpha():
    mask = SoftMask(SoftMaskConfig(schedule="constant", alpha=0.5), steps=4, device=CPU)
    assert mask.value == mask.alpha.item() == 0.5
