"""The stock flash attention of torch over many sequences, causal below the diagonal or above it.

A stock kernel knows the causal mask: keys up to the diagonal. The strictly upper half, keys behind it, is the same mask over
queries and keys taken backwards, each sequence within its own length l: row p of that call is query l-2-p and key l-1-p
(from 0). Query l-1 sees nothing above the diagonal, and key 0 is seen by nothing: they stand last, as rows that
count for nothing. Going there and going back are gathers in the forward and in the backward, so nothing is added by
index.

Shapes: `t` tokens (b * s of padded sequences), `r` rows of the stock call, `n` query heads, `g` key/value heads, `d` head dim.
On CUDA rows are tokens: the variable-length kernel is told the boundaries. On the CPU rows are a padded grid [b, s].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


def by_boundaries(q: Tensor) -> bool:
    """Whether the stock kernel takes tokens and boundaries (CUDA), and not a padded grid."""
    return q.is_cuda


def is_aligned(x: Tensor) -> bool:
    """What CUDA kernels that read 16 bytes at a time need: a contiguous head dim, other strides and the start multiples of 16
    bytes. (Storages are aligned, so the start is by its offset; torch.compile can't see that, and its tensors begin at 0.)
    """
    elements = 16 // x.dtype.itemsize
    start = 0 if torch.compiler.is_compiling() else x.storage_offset()
    steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x.stride(-1) == 1 and all(step % elements == 0 for step in (*steps, start))


class Sequences(NamedTuple):
    """Where tokens stand in their sequences, and which token each row of a stock call reads (None: row r reads token r).

    All index tensors are int64.

    Attributes:
        position: [t] from 0 within the sequence; of no meaning outside.
        length: [t] l of the token's sequence.
        inside: [t] bool, False for a token of no sequence; None: there are none such.
        lower: [r] token of a row of the lower call.
        lower_real: [r] bool, False for a row that stands for no token; None: all do.
        upper_query: [r] token whose query a row of the upper call takes.
        upper_key: [r] token whose key and value it takes.
        from_lower: [t] row of the lower call that is the token's.
        from_query: [t] row of the upper call with the token's query.
        from_key: [t] row of the upper call with the token's key.
        cu_seqlens: [segments + 1] int32, CUDA only. Padding is cut off as a segment of its own, so that nothing sees it.
        grid: (sequences, longest sequence).
    """

    position: Tensor
    length: Tensor
    inside: Tensor | None
    lower: Tensor | None
    lower_real: Tensor | None
    upper_query: Tensor
    upper_key: Tensor
    from_lower: Tensor | None
    from_query: Tensor
    from_key: Tensor
    cu_seqlens: Tensor | None
    grid: tuple[int, int]

    @property
    def has_upper(self) -> Tensor:
        """[t, 1] bool: tokens with a key behind them."""
        above = self.position < self.length - 1
        return (above if self.inside is None else above & self.inside)[:, None]


def padded_sequences(q: Tensor, lengths: Tensor | None) -> Sequences:
    """Sequences of q [b, s, n, d] with true `lengths` [b]; None: all of length s."""
    b, s = q.shape[:2]
    place = torch.arange(b * s, device=q.device)
    start, position = place // s * s, place % s
    inside = None
    if lengths is None:
        length = torch.full_like(place, s)
        boundaries = torch.arange(0, b * s + 1, s, device=q.device, dtype=torch.int32)
    else:
        lengths = lengths.clamp(
            0, s
        )  # a GPU's values are not looked at before: wrong ones must not reach beyond the tensors
        length = lengths.to(torch.int64).repeat_interleave(s, output_size=b * s)  # [b] -> [b * s]
        inside = position < length
        first = torch.arange(0, b * s, s, device=q.device)
        ends = torch.stack([first + lengths, first + s], dim=1).flatten()  # padding is a segment of its own
        boundaries = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    query, key = _backwards(start, position, length, 2), _backwards(start, position, length, 1)
    lower = None
    if inside is not None and not by_boundaries(q):
        # padding reads the sequence's last row: what stands in the padding may be NaN, and 0 * NaN is NaN
        lower = start + torch.minimum(position, (length - 1).clamp(min=0))
    return Sequences(
        position,
        length,
        inside,
        lower,
        inside,
        query,
        key,
        None,
        query,
        key,
        boundaries if by_boundaries(q) else None,
        (b, s),
    )


def packed_sequences(q: Tensor, cu_seqlens: Tensor, max_length: int) -> Sequences:
    """Sequences of q [t, n, d] between `cu_seqlens` [num_sequences + 1], none longer than `max_length`."""
    t, num_sequences = q.shape[0], cu_seqlens.shape[0] - 1
    place = torch.arange(t, device=q.device)
    cu_seqlens = cu_seqlens.clamp(0, t)  # as lengths above
    bounds = cu_seqlens.to(torch.int64)
    sequence = (torch.searchsorted(bounds, place, right=True) - 1).clamp(0, num_sequences - 1)
    start, end = bounds[sequence], bounds[sequence + 1]
    position, length = place - start, end - start
    inside = (position >= 0) & (place < end)
    if by_boundaries(q):
        query, key = (_backwards(start, position, length, shift).clamp(0, t - 1) for shift in (2, 1))
        return Sequences(
            position,
            length,
            inside,
            None,
            inside,
            query,
            key,
            None,
            query,
            key,
            cu_seqlens,
            (num_sequences, max_length),
        )
    # rows of the padded grid; those behind a sequence's end read its last token
    row_position = torch.arange(max_length, device=q.device).repeat(num_sequences)
    row_start = bounds[:-1].repeat_interleave(max_length, output_size=num_sequences * max_length)
    row_length = (bounds[1:] - bounds[:-1]).repeat_interleave(max_length, output_size=num_sequences * max_length)
    lower = row_start + torch.minimum(row_position, (row_length - 1).clamp(min=0))
    query, key = (_backwards(row_start, row_position, row_length, shift) for shift in (2, 1))
    grid_start, last_row = sequence * max_length, num_sequences * max_length - 1
    return Sequences(
        position,
        length,
        inside,
        lower.clamp(max=t - 1),
        row_position < row_length,
        query.clamp(max=t - 1),
        key.clamp(max=t - 1),
        (grid_start + position).clamp(0, last_row),
        _backwards(grid_start, position, length, 2).clamp(0, last_row),
        _backwards(grid_start, position, length, 1).clamp(0, last_row),
        None,
        (num_sequences, max_length),
    )


def _backwards(start: Tensor, position: Tensor, length: Tensor, shift: int) -> Tensor:
    """start + length - shift - position; the sequence's last place where there is no such place in it."""
    mirrored = torch.where(position <= length - shift, length - shift - position, (length - 1).clamp(min=0))
    return start + mirrored


def gather(x: Tensor, index: Tensor | None) -> Tensor:
    """x [t, ...] at `index`, or x itself."""
    return x if index is None else x.index_select(0, index)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """One stock call: q [r, n, d], k and v [r, g, d] -> out [r, n, d] and lse [r, n]."""
    b, s = sequences.grid
    if by_boundaries(q):
        cu = sequences.cu_seqlens
        # a bound of 1 with groups makes torch swap heads and rows, and fail: Dao-AILab/flash-attention#1537
        bound = max(s, 2)
        out, lse, *_ = _aten._flash_attention_forward(q, k, v, cu, cu, bound, bound, 0.0, causal, False, scale=scale)
        return out, lse.t()  # [n, t] -> [t, n]
    q, k, v = (x.unflatten(0, (b, s)).transpose(1, 2) for x in (q, k, v))  # [r, n, d] -> [b, n, s, d]
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=None if causal else _key_mask(q, sequences), scale=scale
    )
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)  # [b, n, s, d] -> [r, n, d]


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stock backward: P = exp(scale q.k - lse), so lse [r, n] = inf takes a row out; dq [r, n, d], dk and dv [r, g, d]."""
    b, s = sequences.grid
    if by_boundaries(q):
        cu = sequences.cu_seqlens
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # no dropout, so not read
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        lse = lse.t().contiguous()  # [t, n] -> [n, t]
        return _aten._flash_attention_backward(
            grad, q, k, v, out, lse, cu, cu, s, s, 0.0, causal, seed, unused, scale=scale
        )
    grad, q, k, v, out = (x.unflatten(0, (b, s)).transpose(1, 2) for x in (grad, q, k, v, out))  # -> [b, n, s, d]
    lse = lse.unflatten(0, (b, s)).transpose(1, 2)  # [r, n] -> [b, n, s]
    gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=None if causal else _key_mask(q, sequences), scale=scale
    )
    return tuple(x.transpose(1, 2).flatten(0, 1) for x in gradients)  # [b, n, s, d] -> [r, n, d]


def _key_mask(q: Tensor, sequences: Sequences) -> Tensor | None:
    """Additive mask [b, 1, 1, s] of the grid's rows that stand for no token."""
    if sequences.lower_real is None:
        return None
    b, s = sequences.grid
    mask = torch.zeros(b * s, dtype=q.dtype, device=q.device)
    return mask.masked_fill(~sequences.lower_real, -torch.inf).view(b, 1, 1, s)
