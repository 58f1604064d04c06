"""Soft-mask attention: what it computes, and the checks of its inputs.

    o_i = sum_j p_ij v_j,   p_i = softmax_j(scale * q_i.k_j + log m_ij)

with m_ij = 1 for j <= i and m_ij in [0, 1] for j > i: the weight multiplies the exponentials, so alpha = 0 is exactly
causal attention and alpha = 1 exactly bidirectional attention (Conan-embedding-v2, soft mask). Positions i, j count from 1
and l is the sequence's own length, padding excluded. The form says how the part above the diagonal opens with alpha;
for l = 4 (rows are queries, columns keys):

    constant  m_ij = alpha, or      row  m_ij = min(alpha l / i, 1)    column  m_ij = min(alpha l / j, 1)
    alpha_h, one weight a head      one weight a row, a >= b >= c      one weight a column, b >= c >= d

            1 a a a                          1 a a a                           1 b c d
            1 1 a a                          1 1 b b                           1 1 c d
            1 1 1 a                          1 1 1 c                           1 1 1 d
            1 1 1 1                          1 1 1 1                           1 1 1 1

alpha is a tensor on the device in [0, 1]. Its value is never read on the host, so no call synchronises and no compiled
code is made for one value.

Sequences come padded on the right, q [b, s, n, d] and k, v [b, s, g, d], with `lengths` [b] (or None: all of length s);
or packed, q [t, n, d] and k, v [t, g, d], sequence e being rows cu_seqlens[e] to cu_seqlens[e + 1]. Rows that belong to
no sequence (padding, rows outside cu_seqlens) are not attended: they give zeros, a log-sum-exp of -inf and zero
gradients. What stands there has no influence, NaN included (but for `sdpa`, where it must be finite).

The log-sum-exp is lse_i = log sum_j m_ij exp(scale * q_i.k_j), in fp32 (fp64 for fp64 input).

Shapes: `b` batch, `s` sequence, `t` packed tokens, `n` query heads, `g` key/value heads (n divisible by g), `d` head dim.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

Form = Literal["constant", "row", "column"]


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums are made in: fp32, or fp64 for fp64 input."""
    return torch.promote_types(x.dtype, torch.float32)


def soft_mask_weights(form: Form, alpha: Tensor, lengths: Tensor, size: int) -> Tensor:
    """The mask m.

    Args:
        form: row, column or constant.
        alpha: opening in [0, 1]: a scalar, or [n] (one a head, constant form only).
        lengths: [b] true lengths l, 0 <= l <= size.
        size: s.

    Returns:
        [b, 1 or n, s, s] in alpha's dtype, at least fp32 (bf16 can't count beyond 256); 0 at keys beyond l.

    Raises:
        ValueError: for an unknown form, or alpha per head in a form other than constant.
    """
    _check_form(form, alpha)
    alpha = alpha.to(wide_dtype(alpha))
    position = torch.arange(1, size + 1, device=alpha.device, dtype=alpha.dtype)
    row, column = position[:, None], position[None, :]
    length = lengths.to(alpha)[:, None, None]  # [b, 1, 1]
    if form == "row":
        weight = torch.clamp(alpha * length / row, max=1.0).expand(-1, size, size)[:, None]  # [b, 1, s, s]
    elif form == "column":
        weight = torch.clamp(alpha * length / column, max=1.0).expand(-1, size, size)[:, None]  # [b, 1, s, s]
    else:
        weight = alpha.reshape(1, -1, 1, 1).expand(lengths.numel(), -1, size, size)  # [b, 1 or n, s, s]
    mask = torch.where(column <= row, torch.ones_like(weight), weight)
    return torch.where((column <= length)[:, None], mask, torch.zeros_like(mask))


def check_inputs(
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
) -> None:
    """Refuse inputs that don't fit together, by shape, dtype and device alone: no value on a device is read.

    Args:
        q: [b, s, n, d] padded or [t, n, d] packed.
        k: [b, s, g, d] or [t, g, d].
        v: as k.
        alpha: scalar, or [n] in the constant form.
        form: row, column or constant.
        lengths: [b] int32 or int64, padded sequences only; None: all of length s.
        cu_seqlens: [num_sequences + 1] int32, needed by packed sequences.
        max_length: bound on the length of a packed sequence; needed with cu_seqlens.
        scale: factor on the scores; None for 1/sqrt(d).

    Raises:
        ValueError: naming what is wrong, the values, and the remedy.
    """
    if q.dim() not in (3, 4):
        raise ValueError(f"q has shape {_shape(q)}; give [b, s, n, d] (padded) or [t, n, d] (packed)")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {_shape(k)} and v {_shape(v)}; they must be equal")
    if k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k and v have shape {_shape(k)}, q {_shape(q)}; all dims but the heads (next to last) must be equal"
        )
    n, g, d = q.shape[-2], k.shape[-2], q.shape[-1]
    if g == 0 or n % g or d == 0:
        raise ValueError(
            f"q has {n} heads of dim {d}, k and v {g}; give a positive dim and heads of q divisible by those of k"
        )
    if not q.dtype.is_floating_point or not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one floating dtype")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}; move them to one device")
    _check_form(form, alpha)
    _check_alpha(alpha, q)
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale} must be finite and above 0; leave it out for 1/sqrt(d) = {d**-0.5:.4g}")
    if q.dim() == 4:
        _check_padded(q, lengths, cu_seqlens, max_length)
    else:
        _check_packed(q, lengths, cu_seqlens, max_length)


def check_sequence_values(
    size: int, *, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None, max_length: int | None = None
) -> None:
    """Refuse lengths or boundaries that point outside the tokens. Reads values: for tensors on the CPU.

    Args:
        size: s of padded sequences, t of packed ones.
        lengths: [b], or None.
        cu_seqlens: [num_sequences + 1], or None.
        max_length: bound on a packed sequence's length, or None.

    Raises:
        ValueError: naming the first wrong entry.
    """
    if lengths is not None:
        for row, length in enumerate(lengths.tolist()):
            if not 0 <= length <= size:
                raise ValueError(f"lengths[{row}]={length} must lie in 0..{size}, the size s of the padded sequences")
    if cu_seqlens is None:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] < 0 or bounds[-1] > size:
        raise ValueError(
            f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; it must stay in 0..{size}, the tokens of q"
        )
    for sequence, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens falls from {start} to {end} at entry {sequence + 1}; it must never fall")
        if max_length is not None and end - start > max_length:
            raise ValueError(
                f"sequence {sequence} of cu_seqlens has length {end - start}, above max_length={max_length}; "
                "raise max_length"
            )


def _check_form(form: str, alpha: Tensor) -> None:
    if form not in get_args(Form):
        raise ValueError(f"unknown soft-mask form {form!r}; known are row, column, constant")
    if alpha.dim() == 1 and form != "constant":
        raise ValueError(
            f"alpha per head is defined for form=constant only, not for form={form}; give alpha of shape [] instead"
        )


def _check_alpha(alpha: Tensor, q: Tensor) -> None:
    n = q.shape[-2]
    if alpha.dim() > 1 or (alpha.dim() == 1 and alpha.shape[0] != n):
        raise ValueError(f"alpha has shape {_shape(alpha)}; give a scalar, or [{n}]: one for each head of q")
    if not alpha.dtype.is_floating_point:
        raise ValueError(f"alpha has dtype {alpha.dtype}; give a floating dtype, best torch.float32")
    if alpha.device != q.device:
        raise ValueError(f"alpha is on {alpha.device}, q on {q.device}; make alpha on q's device")


def _check_padded(q: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, max_length: int | None) -> None:
    if cu_seqlens is not None or max_length is not None:
        raise ValueError(
            f"q has shape {_shape(q)}, padded, but cu_seqlens or max_length is given; give lengths instead, "
            "or q as [t, n, d]"
        )
    if lengths is None:
        return
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lengths has shape {_shape(lengths)} and dtype {lengths.dtype}; "
            f"give [{q.shape[0]}], one for each sequence, of int32 or int64"
        )
    if lengths.device != q.device:
        raise ValueError(f"lengths is on {lengths.device}, q on {q.device}; move it there")


def _check_packed(q: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, max_length: int | None) -> None:
    if lengths is not None:
        raise ValueError(
            f"q has shape {_shape(q)}, packed, but lengths is given; give cu_seqlens and max_length instead"
        )
    if cu_seqlens is None or max_length is None:
        missing = " and ".join(
            name for name, value in (("cu_seqlens", cu_seqlens), ("max_length", max_length)) if value is None
        )
        raise ValueError(f"q has shape {_shape(q)}, packed, and needs {missing}; give both, or q as [b, s, n, d]")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens has shape {_shape(cu_seqlens)} and dtype {cu_seqlens.dtype}; "
            "give [num_sequences + 1] of int32, num_sequences at least 1"
        )
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"cu_seqlens has stride {cu_seqlens.stride(0)}; make it contiguous")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}; move it there")
    if max_length < 1:
        raise ValueError(
            f"max_length={max_length} must be 1 or more: the length of the longest sequence, or a bound on it"
        )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
