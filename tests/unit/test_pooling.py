"""Pooling: only the sequence's own tokens count, unit length, gradient nowhere else."""

import pytest
import torch

from megatron_conan.model.pooling import pool

LENGTHS = torch.tensor([1, 3, 7])


def hidden(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)  # [s, b, h]


def by_definition(x: torch.Tensor, mode: str) -> torch.Tensor:
    rows = []
    for i, length in enumerate(LENGTHS.tolist()):
        vector = x[:length, i].mean(0) if mode == "mean" else x[length - 1, i]
        rows.append(vector / vector.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["mean", "last"])
def test_value_and_gradient_by_definition_in_fp64(mode):
    x, exact = hidden().requires_grad_(), hidden(torch.float64).requires_grad_()
    out, expected = pool(x, LENGTHS, mode), by_definition(exact, mode)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "last"])
def test_padding_has_no_influence_and_no_gradient(mode):
    x = hidden().requires_grad_()
    out = pool(x, LENGTHS, mode)
    noisy = hidden()
    for i, length in enumerate(LENGTHS.tolist()):
        noisy[length:, i] = 1e4
    assert torch.equal(pool(noisy, LENGTHS, mode), out.detach())
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    for i, length in enumerate(LENGTHS.tolist()):
        assert not x.grad[length:, i].any()
        assert x.grad[length - 1, i].any()


@pytest.mark.parametrize("mode", ["mean", "last"])
def test_result_is_fp32_of_unit_length_also_from_bf16(mode):
    out = pool(hidden(torch.bfloat16), LENGTHS, mode)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(3))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"unknown pooling mode 'max'; known are mean, last"):
        pool(hidden(), LENGTHS, "max")  # type: ignore[arg-type]
