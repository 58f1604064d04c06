"""Two passes beside the definition: value, log-sum-exp and gradients, for tests.

Shapes: `b` batch, `s` sequence, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from attention_inputs import Inputs
from torch import Tensor

from megatron_conan.kernels.soft_mask_attention import Form, reference
from megatron_conan.kernels.soft_mask_attention.two_pass import two_pass_backward, two_pass_forward

SCALE = 0.31  # not 1 / sqrt(d)


def expected(
    inputs: Inputs, alpha: Tensor, form: Form, scale: float | None = SCALE
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, lse and the gradients of q, k, v and alpha by the definition."""
    leaves = [x.clone().requires_grad_() for x in (*inputs.tensors, alpha)]
    out, lse = reference(*leaves, form, **inputs.for_reference, scale=scale)
    return out.detach(), lse.detach(), list(torch.autograd.grad(out, leaves, inputs.grad))


def found(
    inputs: Inputs,
    alpha: Tensor,
    form: Form,
    scale: float | None = SCALE,
    known_alpha: float | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As `expected`, by two passes."""
    settings: dict[str, Any] = {**inputs.sequences, "scale": scale, "known_alpha": known_alpha}
    out, lse = two_pass_forward(*inputs.tensors, alpha, form, **settings)
    learned = form != "column" and known_alpha is None
    *gradients, d_alpha = two_pass_backward(
        inputs.grad, *inputs.tensors, out, lse, alpha, form, **settings, alpha_gradient=learned
    )
    assert (d_alpha is not None) == learned
    return out, lse, [*gradients, d_alpha] if learned else gradients


def assert_same(actual: tuple, wanted: tuple, tolerance: float = 1e-12) -> None:
    """Value, lse and gradients agree; a learned alpha's gradient is compared where there is one."""
    for x, y in zip((*actual[:2], *actual[2]), (*wanted[:2], *wanted[2]), strict=False):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def tensor(alpha: float | tuple[float, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(alpha, dtype=dtype)
