"""Soft-mask attention, written plainly.

    o_i = sum_j p_ij v_j,   p_i = softmax_j(scale * q_i.k_j + log m_ij)

with m_ij = 1 for j <= i and m_ij in [0, 1] for j > i: the weight multiplies the exponentials, so alpha = 0 is exactly
causal attention and alpha = 1 exactly bidirectional attention (Conan-embedding-v2, soft mask). Positions i, j count from 1
and l is the sequence's own length, padding excluded. The form says how the part above the diagonal opens with alpha:

    row       m_ij = min(alpha l / i, 1)      keys ->  1 a a a      (one weight a row; the first rows open first)
    column    m_ij = min(alpha l / j, 1)               1 1 b b      (one weight a column)
    constant  m_ij = alpha (or alpha_h)                1 1 1 c      (one weight a head)

Keys at or beyond l are masked. Rows beyond l give zeros.

Shapes: `b` batch, `s` sequence, `n` query heads, `g` key/value heads (n divisible by g), `d` head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Form = Literal["row", "column", "constant"]


def soft_mask_weights(form: Form, alpha: Tensor, lengths: Tensor, size: int) -> Tensor:
    """The mask m.

    Args:
        form: row, column or constant.
        alpha: opening in [0, 1]: a scalar, or [n] (one a head, constant form only).
        lengths: [b] true lengths l, 1 <= l <= size.
        size: s.

    Returns:
        [b, 1 or n, s, s] in alpha's dtype, at least fp32 (bf16 can't count beyond 256); 0 at keys beyond l.

    Raises:
        ValueError: for an unknown form, or alpha per head in a form other than constant.
    """
    if alpha.dim() == 1 and form != "constant":
        raise ValueError(f"alpha per head is defined for form=constant only, not for form={form}")
    alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    position = torch.arange(1, size + 1, device=alpha.device, dtype=alpha.dtype)
    row, column = position[:, None], position[None, :]
    length = lengths.to(alpha)[:, None, None]  # [b, 1, 1]
    if form == "row":
        weight = torch.clamp(alpha * length / row, max=1.0).expand(-1, size, size)[:, None]  # [b, 1, s, s]
    elif form == "column":
        weight = torch.clamp(alpha * length / column, max=1.0).expand(-1, size, size)[:, None]  # [b, 1, s, s]
    elif form == "constant":
        weight = alpha.reshape(1, -1, 1, 1).expand(lengths.numel(), -1, size, size)  # [b, 1 or n, s, s]
    else:
        raise ValueError(f"unknown soft-mask form {form!r}; known are row, column, constant")
    mask = torch.where(column <= row, torch.ones_like(weight), weight)
    return torch.where((column <= length)[:, None], mask, torch.zeros_like(mask))


def soft_mask_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    alpha: Tensor,
    form: Form,
    scale: float | None = None,
) -> Tensor:
    """Soft-mask attention by its definition, differentiable in q, k, v and alpha.

    Args:
        q: [b, s, n, d] of any floating dtype (computed in it: use fp64 for an exact value).
        k: [b, s, g, d].
        v: [b, s, g, d].
        lengths: [b] true lengths.
        alpha: scalar or [n], see `soft_mask_weights`.
        form: row, column or constant.
        scale: factor on the scores; 1/sqrt(d) if not given.

    Returns:
        [b, s, n, d]; rows beyond a sequence's length are zero.
    """
    s, n, d = q.shape[1:]
    groups = n // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))  # [b, s, g, d] -> [b, s, n, d]
    scores = torch.einsum("bind,bjnd->bnij", q, k) * (scale if scale is not None else d**-0.5)
    weights = soft_mask_weights(form, alpha.to(torch.promote_types(q.dtype, torch.float32)), lengths, s)
    probabilities = torch.softmax(scores + torch.log(weights), dim=-1).to(q.dtype)
    output = torch.einsum("bnij,bjnd->bind", probabilities, v)
    inside = torch.arange(s, device=q.device) < lengths[:, None]  # [b, s]
    return output * inside[:, :, None, None]
