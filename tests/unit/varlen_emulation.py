"""torch's variable-length flash attention of CUDA, written plainly for the CPU, so that the code around it runs without one.

It computes what the kernel computes and is as careless: rows of no segment stay uninitialised (NaN here), a probability of
0 is multiplied with whatever stands there, and what the kernel asks of its arguments is asserted.

Shapes: `t` tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_conan.kernels.soft_mask_attention import stock_flash, two_pass


def emulate_varlen(monkeypatch: pytest.MonkeyPatch, ops: bool = True) -> None:
    """Make the two passes take the way of CUDA on CPU tensors, for one test; with `ops=False` to torch's own ops."""
    monkeypatch.setattr(stock_flash, "by_boundaries", lambda q: True)
    monkeypatch.setattr(two_pass, "by_boundaries", lambda q: True)
    if not ops:
        return
    names = SimpleNamespace(_flash_attention_forward=_forward, _flash_attention_backward=_backward)
    monkeypatch.setattr(stock_flash, "_aten", names)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    _check(q, k, v, cu_q, cu_k, max_q, max_k)
    assert dropout == 0.0
    assert not debug
    assert not (max_q == 1 and q.shape[1] > k.shape[1]), "torch swaps heads and rows then, and fails"
    t, n, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.full_like(q, math.nan), q.new_full((n, t), math.nan, dtype=wide)
    for start, end in pairwise(cu_q.tolist()):
        scores, _, values = _dense(q, k, v, start, end, causal, scale)
        lse[:, start:end] = torch.logsumexp(scores, -1)
        out[start:end] = torch.einsum("nij,jnd->ind", torch.softmax(scores, -1), values).to(q.dtype)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, nothing


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    seed: Tensor,
    unused: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, cu_q, cu_k, max_q, max_k)
    assert dropout == 0.0
    assert (seed.shape, seed.dtype, unused.numel()) == ((2,), torch.uint64, 0)
    assert grad.shape == out.shape == q.shape
    assert all(stock_flash.is_aligned(x) for x in (grad, out))
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.is_contiguous()
    gradients = [torch.full_like(x, math.nan) for x in (q, k, v)]
    for start, end in pairwise(cu_q.tolist()):
        scores, keys, values = _dense(q, k, v, start, end, causal, scale)
        here = grad[start:end].double()
        probabilities = torch.exp(scores - lse[:, start:end, None])
        toward = torch.einsum("ind,jnd->nij", here, values)
        d_scores = probabilities * (toward - (here * out[start:end]).sum(-1).t()[..., None]) * scale
        gradients[0][start:end] = torch.einsum("nij,jnd->ind", d_scores, keys).to(q.dtype)
        for found, by_head in (
            (gradients[1], torch.einsum("nij,ind->jnd", d_scores, q[start:end].double())),
            (gradients[2], torch.einsum("nij,ind->jnd", probabilities, here)),
        ):
            found[start:end] = by_head.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype)  # [s, n, d] -> [s, g, d]
    return gradients[0], gradients[1], gradients[2]


def _dense(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """Scores [n, s, s] of one segment, and its keys and values [s, n, d], in fp64."""
    keys, values = (x[start:end].double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ind,jnd->nij", q[start:end].double(), keys) * scale
    if causal:
        behind = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(behind, -math.inf)
    return scores, keys, values


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int) -> None:
    """What the kernel checks, or takes for granted."""
    assert q.dim() == k.dim() == v.dim() == 3
    assert k.shape == v.shape
    assert k.shape[2] == q.shape[2]
    assert q.shape[2] % 8 == 0, "the kernel wants head dims that are multiples of 8"
    assert all(stock_flash.is_aligned(x) for x in (q, k, v)), "the kernel reads 16 bytes at a time"
    bounds: list[Any] = cu_q.tolist()
    assert cu_q.dtype == torch.int32
    assert cu_q.is_contiguous()
    assert cu_k.tolist() == bounds
    assert 0 <= bounds[0] <= bounds[-1] <= q.shape[0]
    assert all(0 <= end - start <= min(longest) for start, end in pairwise(bounds))
