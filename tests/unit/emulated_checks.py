"""Inputs for the emulated attention kernel, and how wrong its results may be.

Shapes: `b` batch, `s` rows, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim, `l` a sequence's length.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_conan.kernels.soft_mask_attention.emulate import emulated_forward


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """One sequence in fp64: q [l, n, d], k and v [l, g, d] -> out [l, n, d], lse [n, l]."""
    q, k, v, alpha = q.double(), k.double(), v.double(), alpha.double()
    length, num_heads, head_dim = q.shape
    k, v = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))  # [l, g, d] -> [l, n, d]
    position = torch.arange(1, length + 1, dtype=torch.float64)
    row, column = position[:, None], position[None, :]
    if form == "constant":
        opening = alpha.reshape(-1, 1, 1)  # [1 or n, 1, 1]
    else:
        opening = (alpha * length / (row if form == "row" else column)).clamp(max=1)
    mask = torch.where(column <= row, 1.0, opening).log()
    scores = torch.einsum("ind,jnd->nij", q, k) * head_dim**-0.5 + mask
    return torch.einsum("nij,jnd->ind", scores.softmax(-1), v), scores.logsumexp(-1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's, for [l, n, d]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [l, n, d] -> [1, n, l, d]
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)


def check_sequence(got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: str) -> None:
    """Asserts that out [l, n, d] and lse [n, l] are right.

    The error, at its largest and in the mean square, may be twice that of PyTorch's attention in the same dtype on the same
    inputs: the larger of causal and full attention, as PyTorch would round any other mask. Below the rounding of the result
    itself (half a unit in the last place) nothing is asked for.
    """
    out, lse = got
    want, want_lse = attention(q, k, v, alpha, form)
    ends = ((True, torch.tensor(0.0)), (False, torch.tensor(1.0)))
    stock = [sdpa(q, k, v, causal).double() - attention(q, k, v, end, "constant")[0] for causal, end in ends]
    rounding = torch.finfo(q.dtype).eps / 2 * want.abs()
    for name, norm in (("largest", lambda x: x.abs().max()), ("root mean square", lambda x: x.square().mean().sqrt())):
        error, limit = norm(out.double() - want), max(2 * max(norm(x) for x in stock), norm(rounding))
        assert error <= limit, (
            f"{name} error {error:.2e}, limit {limit:.2e}; {len(q)} rows, {form}, alpha {alpha.tolist()}"
        )
    # In fp32: each of d additions rounds by at most 2^-24 of the sum of the terms' magnitudes; the rest is of exponentials.
    terms = torch.einsum(
        "ihd,jhd->hij", q.double().abs(), k.double().abs().repeat_interleave(q.shape[1] // k.shape[1], 1)
    )
    products = q.shape[-1] ** 0.5 * terms.amax(-1)  # d times the scale
    error, limit = (lse.double() - want_lse).abs(), 2**-18 + 2**-22 * want_lse.abs() + 2**-24 * products
    assert (error <= limit).all(), (
        f"error of lse {(error - limit).max():.2e} beyond its limit; {len(q)} rows, {form}, {alpha}"
    )


def check_padded(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: str, lengths: Tensor | None = None, **how: object
) -> None:
    out, lse = emulated_forward(q, k, v, alpha, form, lengths=lengths, **how)
    for i in range(len(q)):
        end = q.shape[1] if lengths is None else int(lengths[i])
        if end > 0:
            check_sequence((out[i, :end], lse[i, :, :end]), q[i, :end], k[i, :end], v[i, :end], alpha, form)
        check_zeros(out[i, end:], lse[i, :, end:])


def check_packed(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: str, sizes: tuple[int, ...], **how: object
) -> None:
    cu_seqlens = cumulative(sizes)
    out, lse = emulated_forward(q, k, v, alpha, form, cu_seqlens=cu_seqlens, **how)
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        if end > begin:
            part = slice(begin, end)
            check_sequence((out[part], lse[:, part]), q[part], k[part], v[part], alpha, form)
    check_zeros(out[sum(sizes) :], lse[:, sum(sizes) :])


def check_zeros(out: Tensor, lse: Tensor) -> None:
    assert (out.contiguous().view(torch.int16) == 0).all()
    assert (lse == -torch.inf).all()


def cumulative(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


def bits(results: tuple[Tensor, Tensor]) -> tuple[bytes, bytes]:
    return results[0].contiguous().view(torch.int16).numpy().tobytes(), results[1].numpy().tobytes()
