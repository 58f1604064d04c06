"""Soft-mask attention from two calls of the stock flash kernel, merged by log-sum-exp.

The lower call is causal attention (O1, L1); the upper call (O2, L2) is attention over the keys strictly behind each query
(see `stock_flash`). With m the weight of a row above the diagonal

    L = log(exp L1 + m exp L2),   O = exp(L1 - L) O1 + m exp(L2 - L) O2

and the backward is the stock backward twice with the global O and L: the upper one with L - log m, since its probabilities
are m exp(scale q.k - L). The gradient of alpha is sum_i dm_i/dalpha exp(L2_i - L_i) dO_i.(O2_i - O_i): exact at
alpha = 0, where the output doesn't depend on O2 yet.

In the column form the weight belongs to a key: m_j = alpha min(l / j, 1 / alpha). alpha goes into the merge, and the log of
the rest is added to the scores of the upper call by a few more dims of the heads: q' = [q, c, ..], k' = [k, bias / (c
scale), ..].

Exact for any alpha in [0, 1] at the cost of bidirectional attention. Bitwise repeatable on the CPU; on CUDA as far as the
stock backward is: with `torch.use_deterministic_algorithms(True)`.

Shapes: `t` tokens (b * s of padded sequences), others as in `semantics`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_conan.kernels.soft_mask_attention.semantics import Form, wide_dtype
from megatron_conan.kernels.soft_mask_attention.stock_flash import (
    Sequences,
    by_boundaries,
    flash_backward,
    flash_forward,
    gather,
    is_aligned,
    packed_sequences,
    padded_sequences,
)


class Upper(NamedTuple):
    """What the upper call found: out [t, n, d], of no meaning where there is no key behind; lse [t, n], -inf there."""

    out: Tensor
    lse: Tensor


def two_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    form: Form,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    known_alpha: float | None = None,
) -> Tensor:
    """Soft-mask attention, differentiable in q, k, v and (but for the column form) alpha.

    Args:
        q: [b, s, n, d] or [t, n, d].
        k: [b, s, g, d] or [t, g, d].
        v: as k.
        alpha: scalar, or [n] in the constant form.
        form: row, column or constant.
        lengths: [b], padded sequences only; None: all of length s.
        cu_seqlens: [num_sequences + 1] int32, packed sequences.
        max_length: bound on a packed sequence's length.
        scale: factor on the scores; 1/sqrt(d) if not given.
        known_alpha: alpha's value if the host knows it: 0 and 1 then take one call instead of two. Not looked at where
            alpha takes a gradient.

    Returns:
        As q.
    """
    if form == "column" and alpha.requires_grad and torch.is_grad_enabled():
        raise ValueError("two_pass has no gradient of alpha in the column form; use backend=sdpa or form=row")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _TwoPass.apply(q, k, v, alpha, form, lengths, cu_seqlens, max_length, scale, known_alpha)


class _TwoPass(torch.autograd.Function):
    """`two_pass_forward` and `two_pass_backward` for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha: Tensor,
        form: Form,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        max_length: int | None,
        scale: float,
        known_alpha: float | None,
    ) -> Tensor:
        ctx.form = form
        ctx.settings = {"max_length": max_length, "scale": scale}
        ctx.settings["known_alpha"] = None if ctx.needs_input_grad[3] else known_alpha
        out, lse = two_pass_forward(q, k, v, alpha, form, lengths=lengths, cu_seqlens=cu_seqlens, **ctx.settings)
        ctx.save_for_backward(q, k, v, alpha, lengths, cu_seqlens, out, lse)
        return out

    @staticmethod
    @once_differentiable  # the stock backward has no derivative: say so instead of leaving a part out
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, alpha, lengths, cu_seqlens, out, lse = ctx.saved_tensors
        found = two_pass_backward(
            gradients[0],
            q,
            k,
            v,
            out,
            lse,
            alpha,
            ctx.form,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            alpha_gradient=ctx.needs_input_grad[3],
            **ctx.settings,
        )
        return *found, None, None, None, None, None, None


def two_pass_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    form: Form,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    known_alpha: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, without autograd. Arguments as in `two_pass`.

    Returns:
        Output as q, and lse [b, n, s] or [n, t] in fp32 (fp64 for fp64 input).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.numel() == 0:  # the stock CPU kernel divides by the number of tokens
        return torch.zeros_like(q), _lse_as(q, q.new_zeros(math.prod(q.shape[:-2]), q.shape[-2], dtype=wide_dtype(q)))
    sequences = _sequences(q, lengths, cu_seqlens, max_length)
    q_tokens, k_tokens, v_tokens = _tokens(q, k, v)
    rows = [gather(x, sequences.lower) for x in (q_tokens, k_tokens, v_tokens)]
    out, lse = flash_forward(rows[0], rows[1], rows[2], sequences, scale, causal=known_alpha != 1.0)
    out, lse = gather(out, sequences.from_lower), gather(lse, sequences.from_lower)
    if known_alpha not in (0.0, 1.0):
        upper = _upper_forward(q_tokens, k_tokens, v_tokens, alpha, form, sequences, scale)
        log_weight = torch.log(_row_weight(alpha.to(lse.dtype), form, sequences))  # [t or 1, n or 1]
        above = upper.lse + log_weight
        lower_lse, lse = lse, torch.logaddexp(lse, above)
        merged = out * torch.exp(lower_lse - lse)[..., None] + upper.out * torch.exp(above - lse)[..., None]
        out = merged.to(q.dtype)
    if sequences.inside is not None:
        out = torch.where(sequences.inside[:, None, None], out, 0.0)
        lse = torch.where(sequences.inside[:, None], lse, -math.inf)
    return out.reshape(q.shape), _lse_as(q, lse)


def two_pass_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alpha: Tensor,
    form: Form,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    alpha_gradient: bool = False,
    known_alpha: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients, given the output and log-sum-exp that any exact implementation found.

    Args:
        grad: gradient of the output, as q.
        q: [b, s, n, d] or [t, n, d].
        k: [b, s, g, d] or [t, g, d].
        v: as k.
        out: as q.
        lse: [b, n, s] or [n, t].
        alpha: scalar, or [n] in the constant form.
        form: row, column or constant.
        lengths: as in `two_pass`, like all that follow.
        cu_seqlens: as in `two_pass`.
        max_length: as in `two_pass`.
        scale: as in `two_pass`.
        alpha_gradient: whether the gradient of alpha is wanted; costs the upper call's forward.
        known_alpha: as in `two_pass`; with alpha_gradient it must be None.

    Returns:
        dq, dk, dv, and d(alpha) in alpha's shape and dtype, or None.

    Raises:
        ValueError: where alpha's gradient is asked for in the column form or with known_alpha.
    """
    if alpha_gradient and (form == "column" or known_alpha is not None):
        raise ValueError(
            f"no gradient of alpha for form={form} with known_alpha={known_alpha}; use row or constant, None"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.numel() == 0:
        nothing = torch.zeros_like(alpha) if alpha_gradient else None
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), nothing
    sequences = _sequences(q, lengths, cu_seqlens, max_length)
    grad, q_tokens, k_tokens, v_tokens, out = _tokens(grad, q, k, v, out)
    lse = _lse_of_tokens(q, lse)
    row_lse = gather(lse, sequences.lower)
    if sequences.lower_real is not None:
        row_lse = torch.where(sequences.lower_real[:, None], row_lse, math.inf)
    rows = [gather(x, sequences.lower) for x in (grad, q_tokens, k_tokens, v_tokens, out)]
    found = flash_backward(*rows, row_lse, sequences, scale, causal=known_alpha != 1.0)
    gradients = [gather(x, sequences.from_lower) for x in found]
    alpha_grad = None
    if known_alpha not in (0.0, 1.0):
        above = _upper_backward(grad, q_tokens, k_tokens, v_tokens, out, lse, alpha, form, sequences, scale)
        gradients = [x + y for x, y in zip(gradients, above, strict=True)]
        if alpha_gradient:
            upper = _upper_forward(q_tokens, k_tokens, v_tokens, alpha, form, sequences, scale)
            alpha_grad = _alpha_gradient(grad, out, lse, upper, alpha, form, sequences)
    if sequences.inside is not None:
        gradients = [torch.where(sequences.inside[:, None, None], x, 0.0) for x in gradients]
    dq, dk, dv = (x.reshape(like.shape) for x, like in zip(gradients, (q, k, v), strict=True))
    return dq, dk, dv, alpha_grad


def _upper_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: Form, sequences: Sequences, scale: float
) -> Upper:
    """Attention of tokens [t, n, d] over the keys strictly behind each; in the column form with the keys' weights / alpha."""
    head_dim = q.shape[-1]
    q, k, v = _with_key_weights(q, k, v, alpha, form, sequences, scale)
    rows = gather(q, sequences.upper_query), gather(k, sequences.upper_key), gather(v, sequences.upper_key)
    out, lse = flash_forward(*rows, sequences, scale)
    out, lse = gather(out, sequences.from_query)[..., :head_dim], gather(lse, sequences.from_query)
    return Upper(out, torch.where(sequences.has_upper, lse, -math.inf))


def _upper_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alpha: Tensor,
    form: Form,
    sequences: Sequences,
    scale: float,
) -> list[Tensor]:
    """What the part above the diagonal adds to the gradients of tokens: [t, n, d], [t, g, d], [t, g, d]."""
    head_dim = q.shape[-1]
    lse = lse - torch.log(_row_weight(alpha.to(lse.dtype), form, sequences))  # at weight 0 inf: the row is out
    lse = torch.where(sequences.has_upper, lse, math.inf)
    q, k, v = _with_key_weights(q, k, v, alpha, form, sequences, scale)
    grad, out = (torch.nn.functional.pad(x, (0, q.shape[-1] - head_dim)) for x in (grad, out))
    query, key = sequences.upper_query, sequences.upper_key
    found = flash_backward(
        gather(grad, query),
        gather(q, query),
        gather(k, key),
        gather(v, key),
        gather(out, query),
        gather(lse, query),
        sequences,
        scale,
    )
    back = (sequences.from_query, sequences.from_key, sequences.from_key)
    return [gather(x, index)[..., :head_dim] for x, index in zip(found, back, strict=True)]


def _alpha_gradient(
    grad: Tensor, out: Tensor, lse: Tensor, upper: Upper, alpha: Tensor, form: Form, sequences: Sequences
) -> Tensor:
    """d(alpha), summed over the tokens in their order: as alpha."""
    wide = lse.dtype
    along = (grad.to(wide) * (upper.out.to(wide) - out.to(wide))).sum(-1)  # [t, n]
    per_row = torch.where(sequences.has_upper, torch.exp(upper.lse - lse) * along, 0.0)
    if form == "row":
        opened, ratio = _opened(alpha.to(wide), sequences)
        per_row = torch.where(opened <= 1.0, ratio, 0.0) * per_row
    per_head = per_row.sum(0)  # [n]
    return (per_head if alpha.dim() == 1 else per_head.sum()).to(alpha.dtype)


def _opened(alpha: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """alpha l / i, not yet bounded by 1, and l / i: [t, 1]; 0 for a token of no sequence."""
    length, place = sequences.length.to(alpha.dtype)[:, None], (sequences.position + 1).to(alpha.dtype)[:, None]
    return alpha * length / place, length / place


def _row_weight(alpha: Tensor, form: Form, sequences: Sequences) -> Tensor:
    """Weight of a token's row above the diagonal: broadcastable to [t, n]. In the column form alpha, without the keys' part."""
    if form == "row":
        return _opened(alpha, sequences)[0].clamp(max=1.0)
    return alpha.reshape(1, -1)


def _with_key_weights(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: Form, sequences: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q [t, n, d], k, v [t, g, d] with dims that add log min(l / j, 1 / alpha) to the scores: the column form's weights."""
    if form != "column":
        return q, k, v
    wide = wide_dtype(q)
    ratio = sequences.length.to(wide) / (sequences.position + 1).to(wide)  # [t], l / j
    bias = torch.minimum(torch.log(ratio), -torch.log(alpha.to(wide)))
    # a power of two near 1 / scale, within fp16's range, goes to the query's side: no half-precision value overflows
    factor = 2.0 ** max(-14, min(15, round(-math.log2(scale))))
    bias = bias / (scale * factor)
    parts = []
    for _ in range(3 if q.dtype.itemsize < 4 else 1):  # three of bf16's 8 bits are fp32's 24
        parts.append(bias.to(q.dtype))
        bias = bias - parts[-1].to(wide)
    extra = 8 if by_boundaries(q) else len(parts)  # CUDA's kernel wants a head dim that is a multiple of 8
    more_k = torch.nn.functional.pad(torch.stack(parts, dim=-1), (0, extra - len(parts)))  # [t, extra]
    k = torch.cat([k, more_k[:, None, :].expand(-1, k.shape[1], -1)], dim=-1)
    q = torch.cat([q, q.new_full((*q.shape[:2], extra), factor)], dim=-1)
    return q, k, torch.nn.functional.pad(v, (0, extra))


def _sequences(q: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, max_length: int | None) -> Sequences:
    if cu_seqlens is None:
        return padded_sequences(q, lengths)
    assert max_length is not None
    return packed_sequences(q, cu_seqlens, max_length)


def _tokens(*tensors: Tensor) -> list[Tensor]:
    """[b, s, n, d] or [t, n, d] -> [t, n, d], laid out as the stock kernel reads it; copied where that takes it."""
    flat = [x.flatten(0, 1) if x.dim() == 4 else x for x in tensors]
    readable = is_aligned if by_boundaries(tensors[0]) else (lambda x: x.stride(-1) == 1)
    return [x if readable(x) else x.clone(memory_format=torch.contiguous_format) for x in flat]


def _lse_as(q: Tensor, lse: Tensor) -> Tensor:
    """[t, n] -> [b, n, s] or [n, t]."""
    return lse.t().contiguous() if q.dim() == 3 else lse.unflatten(0, q.shape[:2]).transpose(1, 2).contiguous()


def _lse_of_tokens(q: Tensor, lse: Tensor) -> Tensor:
    """[b, n, s] or [n, t] -> [t, n]."""
    return (lse.t() if q.dim() == 3 else lse.transpose(1, 2).flatten(0, 1)).to(wide_dtype(q))
