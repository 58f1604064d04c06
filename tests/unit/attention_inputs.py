"""Inputs of soft-mask attention for tests: padded or packed sequences of many lengths.

Shapes: `b` batch, `s` sequence, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LENGTHS = (17, 0, 1, 64, 65, 2)
LAYOUTS = ("full", "ragged", "packed")


@dataclass
class Inputs:
    """q and grad [b, s, n, d] or [t, n, d], k and v with g heads, and what says where the sequences are."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    sequences: dict[str, Any]
    inside: Tensor
    tensors: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = [self.q, self.k, self.v]

    @property
    def for_reference(self) -> dict[str, Any]:
        return {name: value for name, value in self.sequences.items() if name != "max_length"}

    def to(self, dtype: torch.dtype) -> Inputs:
        q, k, v, grad = (x.to(dtype) for x in (*self.tensors, self.grad))
        return Inputs(q, k, v, grad, self.sequences, self.inside)


def make_inputs(
    layout: str, lengths: tuple[int, ...] = LENGTHS, heads: tuple[int, int] = (4, 2), d: int = 8, seed: int = 0
) -> Inputs:
    """fp64. Padded sequences have one place more than the longest needs; packed ones have 2 rows before and 3 behind."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths)
    if layout == "packed":
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int() + 2
        shape: tuple[int, ...] = (int(cu_seqlens[-1]) + 3,)
        sequences = {"cu_seqlens": cu_seqlens, "max_length": max(1, *lengths) + 1}
        place = torch.arange(shape[0])
        inside = (place >= 2) & (place < cu_seqlens[-1])
    else:
        shape = (len(lengths), max(lengths) + 1)
        sequences = {"lengths": sizes} if layout == "ragged" else {}
        inside = torch.arange(shape[1]) < (sizes if layout == "ragged" else torch.full_like(sizes, shape[1]))[:, None]
    n, g = heads
    q, k, v, grad = (torch.randn(*shape, x, d, dtype=torch.float64, generator=generator) for x in (n, g, g, n))
    return Inputs(q, k, v, grad, sequences, inside)
