"""Log-sum-exp over the negatives of each anchor, block by block: memory grows with the batch, not with its square.

The logits of one block of anchors against one block of candidates exist at a time, in forward and backward; the backward
computes them again. What is done to a block costs little beside its matrix products:

- Logits are in base 2: on a CPU torch's exp2 is several times as fast as its exp, which MKL slows down a further tenfold
  where the result underflows, as most do at a low temperature.
- A comparison gives 0.0 and 1.0, not bool: on a CPU only comparisons into their operands' own type are vectorised.
- What doesn't count gets the logit `_NEVER`, not -inf, so that 0.0 times it is no NaN.

Shapes: `q` anchors, `k` candidates, `e` embedding dim, `m` columns of keys, `n` pairs; `r`, `c` anchors and candidates of
a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_SIZE = 1024
"""Anchors and candidates of a block: 4 MB of fp32 logits. Speed depends little on it."""

LISTED_PAIRS = 16
"""A column of keys becomes a list of pairs where that lists no more than so many for each anchor and candidate: a pair
costs something in its own block only, keys are compared in every block."""

_NEVER = -1e30
"""Added to the logits of what doesn't count. 2^(_NEVER - x) is 0 for every other logit x, and for `_FLOOR`."""

_FLOOR = -1e29
"""Below every logit that counts."""


@dataclass(frozen=True)
class Exclusions:
    """Which candidates never count as negatives of which anchors. Never held as a [q, k] matrix."""

    anchor_keys: Tensor
    """[q, m] int64."""
    candidate_keys: Tensor
    """[k, m] int64. Excluded where any of the m columns agrees; a key < 0 agrees with nothing."""
    pairs: Tensor
    """[2, n] int64 (anchor index, candidate index), excluded one by one. In any order; twice is once."""
    _plans: dict[int, _Plan] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By block size: made once for the same exclusions at several embedding sizes."""

    @classmethod
    def nothing(cls, num_anchors: int, num_candidates: int, device: torch.device | str = "cpu") -> Exclusions:
        """Every candidate is a negative of every anchor."""
        sizes = ((num_anchors, 0), (num_candidates, 0), (2, 0))
        return cls(*(torch.empty(size, dtype=torch.int64, device=device) for size in sizes))

    def with_pairs(self, pairs: Tensor) -> Exclusions:
        """These, and `pairs` ([2, n] int64) too."""
        return replace(self, pairs=torch.cat([self.pairs, pairs], dim=1))


@dataclass(frozen=True)
class NegativeStatistics:
    """What was seen of each anchor's negatives; detached."""

    count: Tensor
    """[q] int64, negatives that count."""
    masked: Tensor
    """[q] int64, candidates left out because they scored above the ceiling: probably false negatives."""
    highest: Tensor
    """[q] highest cosine among the negatives that count, -inf where there is none."""
    total: Tensor
    """[q] sum of the cosines of the negatives that count."""


def negative_logsumexp(
    anchor: Tensor,
    candidate: Tensor,
    temperature: float,
    excluded: Exclusions,
    ceiling: Tensor | None = None,
    *,
    block_size: int = BLOCK_SIZE,
) -> tuple[Tensor, NegativeStatistics]:
    """Log of the sum of exp(cosine / temperature) over each anchor's negatives that count.

    Computed in fp32 (fp64 for fp64 input), with a gradient for `anchor` and `candidate`.

    Args:
        anchor: [q, e] unit vectors.
        candidate: [k, e] unit vectors.
        temperature: divisor of the cosines.
        excluded: candidates that don't count.
        ceiling: [q], a candidate whose cosine is above it doesn't count either; the comparison has no gradient.
        block_size: anchors and candidates of a block.

    Returns:
        [q], -inf where no candidate counts; and the statistics.
    """
    assert (len(anchor), len(candidate)) == (len(excluded.anchor_keys), len(excluded.candidate_keys))
    dtype = torch.promote_types(torch.promote_types(anchor.dtype, candidate.dtype), torch.float32)
    scale = 1 / (temperature * math.log(2))  # cosine -> base-2 logit, before anything is masked
    limit = None if ceiling is None else (ceiling.detach().to(dtype) * scale).clamp(min=_FLOOR)
    if block_size not in excluded._plans:
        excluded._plans[block_size] = _plan(excluded, block_size)
    plan = excluded._plans[block_size]
    result, *seen = _LogSumExp2.apply(anchor.to(dtype) * scale, candidate.to(dtype), limit, plan)
    count, masked, highest, total = seen
    return result * math.log(2), NegativeStatistics(count, masked, highest / scale, total / scale)


@dataclass(frozen=True)
class _Block:
    """One block of anchors against one of candidates."""

    rows: slice
    columns: slice
    pairs: slice
    """Its excluded pairs in `_Plan`."""


@dataclass(frozen=True)
class _Plan:
    """Exclusions in the order of the blocks. Their bounds lie on the host: the loops over blocks wait for no device."""

    block_size: int
    anchor_keys: Tensor
    """[q, m] fp32, the columns that are compared in every block."""
    candidate_keys: Tensor
    """[k, m] fp32."""
    pair_rows: Tensor
    """[n] anchors of the pairs, block after block. Every pair is there once, and no column of keys excludes it."""
    pair_cells: Tensor
    """[n] place of each pair in its [r, c] block, flattened."""
    ends: list[int]
    """Where each block's pairs end; blocks in row-major order."""

    def blocks(self) -> Iterator[_Block]:
        """All blocks, in row-major order."""
        size, q, k = self.block_size, len(self.anchor_keys), len(self.candidate_keys)
        start, ends = 0, iter(self.ends)
        for row in range(0, q, size):
            for column in range(0, k, size):
                end = next(ends)
                rows, columns = slice(row, min(row + size, q)), slice(column, min(column + size, k))
                yield _Block(rows, columns, slice(start, end))
                start = end


def _plan(excluded: Exclusions, size: int) -> _Plan:
    """List the exclusions that can be listed, and sort them by block of `size` x `size`."""
    q, k = len(excluded.anchor_keys), len(excluded.candidate_keys)
    # negative keys: -1 here and -2 there never agree
    anchor_keys = torch.where(excluded.anchor_keys < 0, -1, excluded.anchor_keys)
    candidate_keys = torch.where(excluded.candidate_keys < 0, -2, excluded.candidate_keys)
    pairs, compared = [excluded.pairs], []
    for i in range(anchor_keys.shape[1]):
        listed = _agreeing_pairs(anchor_keys[:, i], candidate_keys[:, i], limit=LISTED_PAIRS * (q + k))
        if listed is None:
            compared.append(i)
        else:
            pairs.append(listed)
    anchor_keys, candidate_keys = anchor_keys[:, compared], candidate_keys[:, compared]
    row, column = torch.cat(pairs, dim=1)
    code = torch.unique(row * k + column)
    row, column = code // max(k, 1), code % max(k, 1)
    unlisted = (anchor_keys[row] != candidate_keys[column]).all(dim=1)  # else it would be counted twice
    row, column = row[unlisted], column[unlisted]
    block, order = (row // size * -(-k // size) + column // size).sort(stable=True)
    row, column = row[order], column[order]
    width = (k - column // size * size).clamp(max=size)  # of the pair's block: the last one is narrower
    num_blocks = -(-q // size) * -(-k // size)
    ends = torch.searchsorted(block, torch.arange(num_blocks, device=block.device), right=True).tolist()
    # equal keys become equal small numbers, which fp32 holds exactly
    numbers = torch.cat([anchor_keys, candidate_keys]).unique(return_inverse=True)[1].float()
    cells = row % size * width + column % size
    return _Plan(size, numbers[:q], numbers[q:], row, cells, ends)


def _agreeing_pairs(anchor_key: Tensor, candidate_key: Tensor, limit: int) -> Tensor | None:
    """[2, n] all (anchor, candidate) with the same key ([q] and [k] int64), or None where n would exceed `limit`."""
    anchor_key = anchor_key.contiguous()
    ordered, order = candidate_key.sort()
    first = torch.searchsorted(ordered, anchor_key)
    counts = torch.searchsorted(ordered, anchor_key, right=True) - first  # [q]
    if int(counts.sum().item()) > limit:
        return None
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)  # [n]
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]  # among its anchor's own
    return torch.stack([row, order[first[row] + place]])


class _LogitBlocks:
    """Computes blocks of base-2 logits, `_NEVER` where a candidate doesn't count.

    In forward and backward by the same products, so that both decide alike about a candidate at the ceiling.
    """

    def __init__(self, anchor: Tensor, candidate: Tensor, ceiling: Tensor | None, plan: _Plan) -> None:
        """`anchor` [q, e] and `ceiling` [q] are in logits, `candidate` [k, e] are unit vectors."""
        self.anchor, self.candidate, self.ceiling, self.plan = anchor, candidate, ceiling, plan
        self.anchor_keys, self.candidate_keys = plan.anchor_keys.to(anchor.dtype), plan.candidate_keys.to(anchor.dtype)
        size, q, k = plan.block_size, len(anchor), len(candidate)
        has_masks = ceiling is not None or plan.anchor_keys.shape[1] > 0
        self.buffers = anchor.new_empty(2 if has_masks else 1, min(size, q) * min(size, k))
        self.left_out = anchor.new_zeros(q)
        """[q] sum of the logits that were left out, where they are counted."""
        self.excluded = torch.bincount(plan.pair_rows, minlength=q)
        self.masked = torch.zeros_like(self.excluded)

    def compute(self, block: _Block, *, count: bool) -> Tensor:
        """[r, c], overwritten by the next call. `count` also adds to `left_out`, `excluded` and `masked`."""
        plan, rows, candidate = self.plan, block.rows, self.candidate[block.columns]
        num_rows = rows.stop - rows.start
        logits, *chosen = self.buffers[:, : num_rows * len(candidate)].view(-1, num_rows, len(candidate))
        torch.mm(self.anchor[rows], candidate.T, out=logits)  # [r, e] x [e, c] -> [r, c]
        if block.pairs.start < block.pairs.stop:
            cells = plan.pair_cells[block.pairs]
            if count:
                self.left_out.index_add_(0, plan.pair_rows[block.pairs], logits.view(-1)[cells])
            logits.view(-1).index_fill_(0, cells, _NEVER)
        if plan.anchor_keys.shape[1]:
            _compare_keys(self.anchor_keys[rows], self.candidate_keys[block.columns], out=chosen[0])
            self._leave_out(logits, chosen[0], rows, self.excluded if count else None)
        if self.ceiling is not None:
            torch.gt(logits, self.ceiling[rows, None], out=chosen[0])
            self._leave_out(logits, chosen[0], rows, self.masked if count else None)
        return logits

    def _leave_out(self, logits: Tensor, chosen: Tensor, rows: slice, counter: Tensor | None) -> None:
        """Lower the `chosen` ([r, c], 0.0 or 1.0) logits to `_NEVER`, and count them."""
        if counter is not None:
            counter[rows] += chosen.sum(dim=1).long()
            self.left_out[rows] += torch.linalg.vecdot(chosen, logits)
        logits.add_(chosen, alpha=_NEVER)


def _compare_keys(anchor_keys: Tensor, candidate_keys: Tensor, out: Tensor) -> None:
    """Where any of the columns of [r, m] and [c, m] agrees: `out` [r, c] becomes 1.0, else 0.0."""
    torch.eq(anchor_keys[:, None, 0], candidate_keys[None, :, 0], out=out)
    agrees = torch.empty_like(out) if anchor_keys.shape[1] > 1 else out
    for i in range(1, anchor_keys.shape[1]):
        torch.eq(anchor_keys[:, None, i], candidate_keys[None, :, i], out=agrees)
        torch.maximum(out, agrees, out=out)


class _LogSumExp2(torch.autograd.Function):
    """log2 of the sum of 2^(anchor . candidate) over what counts, [q]; then count, masked, highest and total ([q])."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, candidate: Tensor, ceiling: Tensor | None, plan: _Plan) -> tuple[Tensor, ...]:
        blocks = _LogitBlocks(anchor, candidate, ceiling, plan)
        highest = anchor.new_full((len(anchor),), _FLOOR)
        sums = torch.zeros_like(highest)  # of 2^(logit - highest)
        for block in plan.blocks():
            logits = blocks.compute(block, count=True)
            before = highest[block.rows]
            after = torch.maximum(before, logits.amax(dim=1))
            terms = logits.sub_(after[:, None]).exp2_().sum(dim=1)
            sums[block.rows] = sums[block.rows] * torch.exp2(before - after) + terms
            highest[block.rows] = after
        highest.masked_fill_(highest == _FLOOR, -torch.inf)
        result = highest + sums.log2()
        count = len(candidate) - blocks.excluded - blocks.masked
        # all products, less those left out: no further pass over the logits
        total = torch.where(count > 0, anchor @ candidate.sum(dim=0) - blocks.left_out, 0)
        ctx.plan = plan
        ctx.save_for_backward(anchor, candidate, ceiling, result)
        statistics = (count, blocks.masked, highest, total)
        ctx.mark_non_differentiable(*statistics)
        return result, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        anchor, candidate, ceiling, result = ctx.saved_tensors
        blocks = _LogitBlocks(anchor, candidate, ceiling, ctx.plan)
        shift, weighted = result.clamp(min=_FLOOR), anchor * gradient[:, None]
        to_anchor, to_candidate = (
            torch.zeros_like(side) if needed else None
            for side, needed in zip((anchor, candidate), ctx.needs_input_grad, strict=False)
        )
        for block in ctx.plan.blocks():
            rows, columns = block.rows, block.columns
            share = blocks.compute(block, count=False).sub_(shift[rows, None]).exp2_()  # [r, c]
            if to_anchor is not None:
                to_anchor[rows].addmm_(share, candidate[columns])  # [r, c] x [c, e]
            if to_candidate is not None:
                to_candidate[columns].addmm_(share.T, weighted[rows])  # [c, r] x [r, e]
        return None if to_anchor is None else to_anchor.mul_(gradient[:, None]), to_candidate, None, None
