"""Soft-mask attention by torch's own: gradients of alpha, half precision, padding.

Shapes: `b` batch, `s` sequence, `n` query heads, `d` head dim.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_conan.kernels.soft_mask_attention import reference, soft_mask_attention
from megatron_conan.kernels.soft_mask_attention.sdpa import sdpa


@pytest.mark.parametrize("form", ["row", "column", "constant"])
def test_sdpa_learns_alpha_and_says_what_it_does_not_take(form):
    q, k, v = (torch.randn(2, 6, n, 4, dtype=torch.float64) for n in (4, 2, 2))
    opening = torch.tensor(0.4, dtype=torch.float64)
    gradients = []
    for attend in (sdpa, lambda *x, known_alpha, **y: reference(*x, **y)[0]):
        alpha = opening.clone().requires_grad_()
        out = attend(q, k, v, alpha, form, lengths=torch.tensor([6, 3]), known_alpha=0.0)  # a learned alpha isn't known
        gradients.append(torch.autograd.grad(out.square().sum(), alpha)[0])
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match=r"sdpa takes padded sequences only, q has shape \[6, 4, 4\]; use two_pass"):
        sdpa(q[0], k[0], v[0], opening, form, cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32), max_length=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["row", "column", "constant"])
def test_half_precision(form, dtype, monkeypatch):
    """alpha stays fp32, but the mask must be of q's dtype: a GPU silently misreads another, pytorch issue 191612."""
    seen = []

    def attend(*tensors, attn_mask, **options):
        seen.append(attn_mask.dtype)
        return scaled_dot_product_attention(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 40, n, 16, generator=generator).to(dtype) for n in (4, 2, 2))
    sequences = {"lengths": torch.tensor([40, 7])}
    found = sdpa(q, k, v, torch.tensor(0.1), form, **sequences)
    assert [found.dtype, *seen] == [dtype, dtype]
    wanted = reference(q.double(), k.double(), v.double(), torch.tensor(0.1), form, **sequences)[0]
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02)


def test_padding_that_nobody_looks_at_is_left_as_it_is():
    q, k, v = (torch.randn(2, 5, n, 8) for n in (4, 2, 2))
    lengths = torch.tensor([5, 2])
    zeroed, left = (
        soft_mask_attention(q, k, v, torch.tensor(0.5), lengths=lengths, backend="sdpa", zero_padding=zero)
        for zero in (True, False)
    )
    inside = torch.arange(5) < lengths[:, None]
    assert torch.equal(zeroed[inside], left[inside])
    assert not zeroed[~inside].any()
    assert left[~inside].any()
    assert left.isfinite().all()
