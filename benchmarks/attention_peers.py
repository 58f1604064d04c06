"""Soft-mask attention by our backends, and by what one would use instead: each a call that gives the output.

Shapes: `b` batch, `s` sequence, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from megatron_conan.kernels.soft_mask_attention import Backend, Form, soft_mask_attention, soft_mask_weights

Call = Callable[[], Tensor]
"""Gives the output, [b, s, n, d] or [t, n, d]."""
LEARNED = "learned"
FULL_BACKWARD = 2.5
"""Arithmetic of a backward pass that keeps no probabilities, in forward passes: five matrix products against two."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one measurement."""

    q: Tensor
    """[b, s, n, d], or packed [t, n, d]."""
    k: Tensor
    """[b, s, g, d] or [t, g, d]."""
    v: Tensor
    alpha: Tensor
    """Scalar, or [n] where learned, which takes a gradient."""
    form: Form
    opening: float | str
    """alpha's value, or LEARNED."""
    cu_seqlens: Tensor | None = None
    """[num_sequences + 1] int32 where packed."""

    @property
    def known_alpha(self) -> float | None:
        """What the host knows, as in training, where alpha follows a schedule."""
        return None if isinstance(self.opening, str) else self.opening

    @property
    def sizes(self) -> list[int]:
        """Lengths of the sequences."""
        if self.cu_seqlens is None:
            return [self.q.shape[1]] * self.q.shape[0]
        return [end - start for start, end in pairwise(self.cu_seqlens.tolist())]

    @property
    def leaves(self) -> list[Tensor]:
        """What takes a gradient."""
        return [x for x in (self.q, self.k, self.v, self.alpha) if x.requires_grad]

    @property
    def forward_flops(self) -> float:
        """Of the two products over the part of the mask that is open: all of it, or half at alpha = 0."""
        open_share = 0.5 if self.opening == 0.0 else 1.0
        return open_share * 4 * sum(size**2 for size in self.sizes) * self.q.shape[-1] * self.q.shape[-2]


def make_problem(
    rows: tuple[int, ...],
    heads: tuple[int, int],
    head_dim: int,
    form: Form,
    opening: float | str,
    device: str,
    dtype: torch.dtype,
    sizes: Sequence[int] | None = None,
) -> Problem:
    """Normal q, k, v.

    Args:
        rows: (b, s), or (t,) where packed.
        heads: (n, g).
        head_dim: d.
        form: row, column or constant.
        opening: alpha, or LEARNED (form constant): .5 at every head, with a gradient.
        device: as torch names it.
        dtype: of q, k, v.
        sizes: of the packed sequences.
    """
    generator = torch.Generator().manual_seed(0)
    n, g = heads
    q, k, v = (
        torch.randn(*rows, count, head_dim, generator=generator).to(device, dtype).requires_grad_()
        for count in (n, g, g)
    )
    if isinstance(opening, str):
        alpha = torch.full((n,), 0.5, device=device).requires_grad_()
    else:
        alpha = torch.tensor(opening, device=device)
    cu_seqlens = None
    if sizes is not None:
        cu_seqlens = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return Problem(q, k, v, alpha, form, opening, cu_seqlens)


def ours(problem: Problem, backend: Backend) -> Call:
    """One of our backends."""
    sequences: dict[str, Any] = {}
    if problem.cu_seqlens is not None:
        sequences = {"cu_seqlens": problem.cu_seqlens, "max_length": max(problem.sizes)}
    return lambda: soft_mask_attention(
        problem.q,
        problem.k,
        problem.v,
        problem.alpha,
        problem.form,
        backend=backend,
        known_alpha=problem.known_alpha,
        **sequences,
    )


def sdpa_given_bias(problem: Problem) -> Call:
    """torch's attention with log m made before. Padded sequences; alpha gets no gradient."""
    lengths = torch.tensor(problem.sizes, device=problem.q.device)
    with torch.no_grad():
        bias = torch.log(soft_mask_weights(problem.form, problem.alpha, lengths, problem.q.shape[1]))
        bias = bias.to(problem.q.dtype)
    # the CUDA kernel that takes a bias takes no groups
    repeats = problem.q.shape[2] // problem.k.shape[2] if problem.q.is_cuda else 1
    grouped = problem.q.shape[2] != problem.k.shape[2] * repeats

    def call() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))  # [b, s, n, d] -> [b, n, s, d]
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped).transpose(1, 2)

    return call


def sdpa_without_mask(problem: Problem, causal: bool, backend: SDPBackend | None = None, repeat: bool = False) -> Call:
    """torch's attention, causal or full: what no mask costs. `repeat`: keys and values repeated for every query head before."""
    n, g = problem.q.shape[2], problem.k.shape[2]
    k, v = problem.k, problem.v
    if repeat:
        k, v = (x.detach().repeat_interleave(n // g, dim=2).requires_grad_() for x in (k, v))

    def attend() -> Tensor:
        q = problem.q.transpose(1, 2)  # [b, s, n, d] -> [b, n, s, d]
        return scaled_dot_product_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=n != k.shape[2]
        ).transpose(1, 2)

    def call() -> Tensor:
        if backend is None:
            return attend()
        with sdpa_kernel(backend):
            return attend()

    return call


def varlen_without_mask(problem: Problem, causal: bool) -> Call:
    """torch's attention over packed sequences, causal or full."""
    cu, longest = problem.cu_seqlens, max(problem.sizes)
    known = inspect.signature(varlen_attn).parameters
    settings: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)}
    if "enable_gqa" in known:  # torch 2.11 has no such parameter
        settings["enable_gqa"] = problem.q.shape[1] != problem.k.shape[1]
    return lambda: varlen_attn(problem.q, problem.k, problem.v, cu, cu, longest, longest, **settings)


def flex_block_mask(problem: Problem) -> BlockMask | None:
    """Which tiles FlexAttention has to look at: causal at alpha = 0; within a sequence where packed; None: all."""
    causal, place = problem.opening == 0.0, None
    if not causal and problem.cu_seqlens is None:
        return None
    if problem.cu_seqlens is not None:
        place, _, _ = _packed_places(problem)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = (j <= i) if causal else (j == j)
        return inside if place is None else inside & (place[i] == place[j])

    size = problem.q.shape[-3]
    return create_block_mask(visible, None, None, size, size, device=str(problem.q.device))


def flex(problem: Problem, block_mask: BlockMask | None) -> Call:
    """FlexAttention, compiled: the mask as a change of scores, alpha a captured tensor; at 0 and 1 without one."""
    torch._dynamo.reset()  # else its limit of recompilations is soon reached
    torch._functorch.config.donated_buffer = False  # else a graph can't be gone back through twice
    compiled = torch.compile(flex_attention, dynamic=False)
    score = None if problem.opening in (0.0, 1.0) else _score_change(problem)
    packed, grouped = problem.cu_seqlens is not None, problem.q.shape[-2] != problem.k.shape[-2]

    def call() -> Tensor:
        qkv = (x.unsqueeze(0) if packed else x for x in (problem.q, problem.k, problem.v))  # [t, n, d] -> [1, t, n, d]
        q, k, v = (x.transpose(1, 2) for x in qkv)  # [b, s, n, d] -> [b, n, s, d]
        if not torch.is_grad_enabled():  # on a CPU it refuses what could take a gradient
            q, k, v = (x.detach() for x in (q, k, v))
        out = compiled(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)
        return out[0] if packed else out

    return call


def _packed_places(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Of every packed token its sequence, position from 0, and its sequence's length: [t] each."""
    sizes = torch.tensor(problem.sizes, device=problem.q.device)
    sequence = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    first = (sizes.cumsum(0) - sizes)[sequence]
    return sequence, torch.arange(len(sequence), device=sizes.device) - first, sizes[sequence]


def _score_change(problem: Problem) -> Callable[..., Tensor]:
    """score + log m, as FlexAttention wants it."""
    alpha, learned, size = problem.alpha, problem.opening == LEARNED, problem.q.shape[-3]
    if problem.form == "constant":
        return lambda score, b, h, i, j: torch.where(j > i, score + torch.log(alpha[h] if learned else alpha), score)
    if problem.cu_seqlens is None:

        def row(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(j > i, score + torch.log(torch.clamp(alpha * size / (i + 1), max=1.0)), score)

        return row
    _, position, length = _packed_places(problem)

    def packed_row(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        weight = torch.clamp(alpha * length[i] / (position[i] + 1), max=1.0)
        return torch.where(j > i, score + torch.log(weight), score)

    return packed_row
