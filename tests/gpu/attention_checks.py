"""Inputs for soft-mask attention on a GPU, and how wrong a result may be.

Shapes: `b` batch, `s` rows, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_conan.kernels.soft_mask_attention.op import soft_mask_attention_with_lse
from megatron_conan.kernels.soft_mask_attention.reference import reference

BF16, FP16 = torch.bfloat16, torch.float16
# not cuDNN's: with a mask its backward gives NaN at some lengths on Hopper, https://github.com/pytorch/pytorch/issues/196678
STOCK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
NORMS = (("largest", lambda x: x.abs().max()), ("root mean square", lambda x: x.square().mean().sqrt()))


@dataclass
class Inputs:
    """q [b, s, n, d] or [t, n, d], k and v with g heads, alpha [] or [n], and how the sequences lie."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    form: str
    sequences: dict[str, Any] = field(default_factory=dict)

    def run(self, **changes: Any) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the operator: on CUDA the kernel."""
        return soft_mask_attention_with_lse(self.q, self.k, self.v, self.alpha, self.form, **self.sequences, **changes)

    def parts(self) -> list[tuple[Any, int]]:
        """Of every sequence that isn't empty, where it stands: an index of rows, and its length."""
        if "cu_seqlens" in self.sequences:
            bounds = self.sequences["cu_seqlens"].tolist()
            return [(slice(a, b), b - a) for a, b in itertools.pairwise(bounds) if b > a]
        lengths = self.sequences.get("lengths")
        sizes = [self.q.shape[1]] * self.q.shape[0] if lengths is None else lengths.tolist()
        return [((i, slice(0, size)), size) for i, size in enumerate(sizes) if size > 0]

    def sequence(self, part: Any) -> Inputs:
        """One sequence alone, [1, l, n, d]."""
        return Inputs(*(x[part].unsqueeze(0) for x in (self.q, self.k, self.v)), self.alpha, self.form)


def normal(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def padded(
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    form: str = "row",
    alpha: Any = 0.3,
    factor: float = 1.0,
) -> Inputs:
    """Right-padded sequences, NaN in the padding."""
    b, s, (n, g) = len(lengths), max(lengths), heads
    q, k, v = (factor * normal(device, dtype, b, s, m, head_dim, seed=seed) for seed, m in enumerate((n, g, g)))
    for x, (i, length) in itertools.product((q, k, v), enumerate(lengths)):
        x[i, length:] = torch.nan
    sequences = {"lengths": torch.tensor(lengths, dtype=torch.int32, device=device)}
    return Inputs(q, k, v, torch.tensor(alpha, device=device), form, sequences)


def packed(
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    form: str = "row",
    alpha: Any = 0.3,
    tail: int = 7,
) -> Inputs:
    """Sequences one behind the other, then NaN."""
    t, (n, g) = sum(lengths) + tail, heads
    q, k, v = (normal(device, dtype, t, m, head_dim, seed=seed) for seed, m in enumerate((n, g, g)))
    for x in (q, k, v):
        x[sum(lengths) :] = torch.nan
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    sequences = {"cu_seqlens": bounds, "max_length": max(lengths)}
    return Inputs(q, k, v, torch.tensor(alpha, device=device), form, sequences)


def exact(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The definition in fp64: [b, l, n, d] -> out [b, l, n, d], lse [b, n, l]."""
    return reference(q.double(), k.double(), v.double(), alpha.double(), form)  # type: ignore[arg-type]


def stock(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's attention in the inputs' dtype, [b, l, n, d]."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))  # [b, l, g, d] -> [b, l, n, d]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, l, n, d] -> [b, n, l, d]
    with sdpa_kernel(STOCK):
        return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def check_limit(name: str, found: Tensor, expected: Tensor, stock_errors: list[Tensor], roundings: int = 1) -> None:
    """Asserts that the error, at its largest and in the mean square, is at most twice torch's.

    torch's is the larger of causal and full attention, on the same inputs in the same dtype: any other mask it would take
    rounded to that dtype. Nothing below half a unit in the last place of the result is asked for, `roundings` times, nor below
    fp32's noise on sums of terms of size 1.
    """
    eps = torch.finfo(found.dtype).eps if found.dtype in (BF16, FP16) else 0.0
    assert found.isfinite().all(), f"{name} is not finite"
    for kind, norm in NORMS:
        error = norm(found.double() - expected).item()
        limit = max(
            2 * max(norm(x.double()).item() for x in stock_errors), norm(roundings * eps / 2 * expected).item(), 2**-18
        )
        assert error <= limit, f"{kind} error of {name} {error:.2e}, limit {limit:.2e}, {list(found.shape)}"


def check_forward(inputs: Inputs) -> None:
    """Asserts output and lse of every sequence, and zeros and -inf elsewhere."""
    out, lse = inputs.run()
    assert out.shape == inputs.q.shape
    assert out.dtype == inputs.q.dtype
    outside = torch.ones(inputs.q.shape[:-2], dtype=torch.bool, device=out.device)  # [b, s] or [t]
    lse_rows = lse.movedim(-2, -1)  # [b, n, s] -> [b, s, n], [n, t] -> [t, n]
    for part, length in inputs.parts():
        outside[part] = False
        one = inputs.sequence(part)
        want, want_lse = exact(one.q, one.k, one.v, one.alpha, one.form)
        errors = [
            stock(one.q, one.k, one.v, causal).double()
            - exact(one.q, one.k, one.v, one.alpha.new_tensor(0.0 if causal else 1.0), "constant")[0]
            for causal in (True, False)
        ]
        name = f"the output, {inputs.form}, alpha {inputs.alpha.tolist()}, length {length}"
        check_limit(name, out[part][None], want, errors)
        check_lse(lse_rows[part], want_lse[0].t(), one)
    assert not out[outside].any()
    assert (lse_rows[outside] == -torch.inf).all()


def check_lse(lse: Tensor, want: Tensor, one: Inputs) -> None:
    """lse [l, n]: d additions, each rounds by 2^-24 of the sum of the terms' magnitudes at most; exponentials do the rest."""
    q, k = one.q[0].double().abs(), one.k[0].double().abs()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [l, g, d] -> [l, n, d]
    largest = torch.einsum("ihd,jhd->hij", q, k).amax(-1).t()  # [l, n]
    # a tensor core may truncate where a sum would be rounded: twice that of rounding
    limit = 2**-17 + 2**-21 * want.abs() + 2**-23 * one.q.shape[-1] ** 0.5 * largest
    error = (lse.double() - want).abs()
    assert (error <= limit).all(), f"error of lse {(error - limit).max():.2e} beyond its limit"


def bits(*tensors: Tensor) -> list[bytes]:
    """For comparing bit by bit, NaN and -0 included."""
    return [x.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes() for x in tensors]


def gradients(call: Any, inputs: Inputs, direction: Tensor, wide: bool = False) -> list[Tensor]:
    """Of q, k, v, alpha; in fp64 with `wide`."""
    leaves = [x.double() if wide else x.clone() for x in (inputs.q, inputs.k, inputs.v, inputs.alpha)]
    leaves = [x.detach().requires_grad_(i < 3 or inputs.form != "column") for i, x in enumerate(leaves)]
    out = call(*leaves)
    # what is unused is alpha where nothing is above the diagonal, or no gradient is defined
    found = torch.autograd.grad(
        out, leaves[: 3 + (inputs.form != "column")], direction.to(out.dtype), allow_unused=True
    )
    return [torch.zeros_like(x) if y is None else y for x, y in zip(leaves, found, strict=False)]


def check_gradients(inputs: Inputs) -> None:
    """Asserts the gradients of every sequence, zeros elsewhere, and alpha's, which is a sum over all of them.

    The parts below and above the diagonal are rounded to the dtype, so may be those of a group's heads, and their sums: four
    roundings where torch has one or two.
    """
    direction = normal(inputs.q.device, inputs.q.dtype, *inputs.q.shape, seed=9)

    def call(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        return soft_mask_attention_with_lse(q, k, v, alpha, inputs.form, **inputs.sequences)[0]  # type: ignore[arg-type]

    found = gradients(call, inputs, direction)
    outside = torch.ones(inputs.q.shape[:-2], dtype=torch.bool, device=inputs.q.device)  # [b, s] or [t]
    alpha_gradient, alpha_terms = 0.0, 0.0
    for part, length in inputs.parts():
        outside[part] = False
        one, along = inputs.sequence(part), direction[part][None]
        want = gradients(lambda *x: reference(*x, inputs.form)[0], one, along, wide=True)
        errors = []
        for causal in (True, False):
            end = Inputs(one.q, one.k, one.v, one.alpha.new_tensor(0.0 if causal else 1.0), "constant")
            ideal = gradients(lambda *x: reference(*x, "constant")[0], end, along, wide=True)
            ours = gradients(lambda q, k, v, _, c=causal: stock(q, k, v, c), end, along)
            errors.append([a.double() - b for a, b in zip(ours[:3], ideal, strict=False)])
        for name, got, good, *stocks in zip("qkv", found, want, *errors, strict=False):
            check_limit(
                f"d{name}, {one.form}, alpha {one.alpha.tolist()}, length {length}", got[part][None], good, stocks, 4
            )
        if one.form != "column":
            alpha_gradient = alpha_gradient + want[3]
            alpha_terms = alpha_terms + _alpha_terms(one, along)
    for got in found[:3]:
        assert not got[outside].any()
    if inputs.form != "column":
        check_alpha_gradient(found[3], alpha_gradient, alpha_terms, inputs.q.dtype)


def check_alpha_gradient(found: Tensor, want: Tensor, terms: Tensor, dtype: torch.dtype) -> None:
    """It is a sum over rows of dO.(O2 - O), and O and O2 are rounded to `dtype`: errors that mostly cancel.

    Measured on a CPU: .007 eps of the sum of magnitudes.
    """
    error = (found.double() - want).abs()
    assert (error <= torch.finfo(dtype).eps / 16 * terms + 2**-20).all(), f"{error} of {terms}, {found}, {want}"


def _alpha_terms(one: Inputs, direction: Tensor) -> Tensor:
    """The sum of the magnitudes of what d(alpha) is a sum of; as alpha."""
    q, k, v, alpha = (x.double() for x in (one.q, one.k, one.v, one.alpha))
    out, lse = exact(one.q, one.k, one.v, one.alpha, one.form)
    length = q.shape[1]
    upper = torch.ones(length, length, device=q.device).triu(1).bool()
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))  # [b, l, g, d] -> [b, l, n, d]
    scores = torch.einsum("bind,bjnd->bnij", q, k) * q.shape[-1] ** -0.5
    open_terms = torch.where(upper, torch.exp(scores - lse[..., None]), 0.0)  # [b, n, l, l]
    share = open_terms.sum(-1)  # exp(L2 - L)
    along = torch.einsum("bind,bind->bni", direction.double().abs(), out.abs()) + torch.einsum(
        "bind,bnij,bjnd->bni", direction.double().abs(), open_terms / share.clamp(min=1e-300)[..., None], v.abs()
    )
    if one.form == "row":
        ratio = length / torch.arange(1, length + 1, device=q.device, dtype=torch.float64)
        share = share * torch.where(alpha * ratio <= 1, ratio, 0.0)
    terms = share * along
    return terms.sum((0, 2)) if alpha.dim() else terms.sum()
