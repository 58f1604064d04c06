"""Soft-mask attention by its definition: dense, plain, the oracle of every faster implementation.

Shapes: see `semantics`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from megatron_conan.kernels.soft_mask_attention.semantics import Form, soft_mask_weights, wide_dtype


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    form: Form,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft-mask attention, differentiable in q, k, v and alpha, at alpha = 0 too.

    Packed sequences are taken one by one: cu_seqlens is read on the host.

    Args:
        q: [b, s, n, d] or [t, n, d] of any floating dtype; computed in it, but at least in fp32.
        k: [b, s, g, d] or [t, g, d].
        v: as k.
        alpha: scalar, or [n] in the constant form.
        form: row, column or constant.
        lengths: [b] true lengths of padded sequences; None: all of length s.
        cu_seqlens: [num_sequences + 1] boundaries of packed sequences.
        scale: factor on the scores; 1/sqrt(d) if not given.

    Returns:
        Output as q, and lse [b, n, s] or [n, t] in fp32 (fp64 for fp64 input).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is None:
        return _padded(q, k, v, alpha, form, lengths, scale)
    bounds = cu_seqlens.tolist()
    t, n, d = q.shape
    wide = wide_dtype(q)
    outputs, lses = [q.new_zeros(bounds[0], n, d)], [q.new_full((n, bounds[0]), -math.inf, dtype=wide)]
    for start, end in pairwise(bounds):
        one_q, one_k, one_v = (x[start:end].unsqueeze(0) for x in (q, k, v))  # [t, n, d] -> [1, s, n, d]
        out, lse = _padded(one_q, one_k, one_v, alpha, form, None, scale)
        outputs.append(out[0])
        lses.append(lse[0])
    outputs.append(q.new_zeros(t - bounds[-1], n, d))
    lses.append(q.new_full((n, t - bounds[-1]), -math.inf, dtype=wide))
    return torch.cat(outputs), torch.cat(lses, dim=1)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: Form, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """[b, s, n, d] -> [b, s, n, d] and [b, n, s]."""
    b, s, n, _ = q.shape
    dtype, wide = q.dtype, wide_dtype(q)
    if lengths is None:
        lengths = torch.full((b,), s, dtype=torch.int64, device=q.device)
    inside = torch.arange(s, device=q.device) < lengths[:, None]  # [b, s]
    # what stands in the padding may be NaN, and 0 * NaN is NaN: select, never multiply
    q, k, v = (torch.where(inside[:, :, None, None], x.to(wide), 0.0) for x in (q, k, v))
    k, v = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (k, v))  # [b, s, g, d] -> [b, s, n, d]
    scores = torch.einsum("bind,bjnd->bnij", q, k) * scale
    weights = soft_mask_weights(form, alpha.to(wide), lengths, s).to(wide)  # [b, 1 or n, s, s]
    # The definition as it stands, and not a softmax of scores + log m, whose gradient in m would be 0 * inf at m = 0. The
    # largest term is exp(0); terms of weight 0 may exceed it, so they are held below overflow.
    largest = (scores + torch.log(weights)).detach().amax(-1, keepdim=True) if s else scores.detach().sum(-1, True)
    largest = torch.where(inside[:, None, :, None], largest, 0.0)
    terms = weights * torch.exp(torch.clamp(scores - largest, max=math.log(torch.finfo(wide).max) - 8))
    total = torch.where(inside[:, None, :, None], terms.sum(-1, keepdim=True), 1.0)  # [b, n, s, 1]
    out = torch.einsum("bnij,bjnd->bind", terms / total, v)
    out = torch.where(inside[:, :, None, None], out, 0.0)
    lse = torch.where(inside[:, None, :], (largest + torch.log(total))[..., 0], -math.inf)
    return out.to(dtype), lse
