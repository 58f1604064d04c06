"""Pooling: every mode by hand, padded = packed, only a text's own tokens count, fp32 from bf16."""

import pytest
import torch
from torch import Tensor

from megatron_conan.model.pooling import PoolingMode, pool_packed, pool_padded, pooling_weights

LENGTHS = torch.tensor([1, 3, 7, 4])
PROMPTS = torch.tensor([0, 2, 3, 1])
CASES = [(mode, include) for mode in ("mean", "weighted_mean", "last") for include in (True, False)]
all_cases = pytest.mark.parametrize(("mode", "include_prompt"), CASES)


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)  # [s, b, h]


def direction() -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))  # [b, h]


def by_definition(x: Tensor, mode: PoolingMode, include_prompt: bool) -> Tensor:
    """[s, b, h] -> [b, h], token by token."""
    rows = []
    for i, (length, prompt) in enumerate(zip(LENGTHS.tolist(), PROMPTS.tolist(), strict=True)):
        places = range(0 if include_prompt else prompt, length)
        if mode == "mean":
            rows.append(sum(x[p, i] for p in places) / len(places))
        elif mode == "weighted_mean":
            rows.append(sum((p + 1) * x[p, i] for p in places) / sum(p + 1 for p in places))
        else:
            rows.append(x[length - 1, i])
    return torch.stack(rows)


def packed(x: Tensor, tail: int = 0) -> tuple[Tensor, Tensor]:
    """[s, b, h] -> (tokens of all texts one behind the other and `tail` more [t + tail, h], position [t])."""
    rows = [x[:length, i] for i, length in enumerate(LENGTHS.tolist())]
    rows.append(torch.full((tail, x.shape[2]), 1e4, dtype=x.dtype))
    return torch.cat(rows), torch.cat([torch.arange(length) for length in LENGTHS.tolist()])


@pytest.mark.parametrize(
    ("mode", "include_prompt", "expected"),
    [
        ("mean", True, [1 / 4, 1 / 4, 1 / 4, 1 / 4, 0]),
        ("mean", False, [0, 0, 1 / 2, 1 / 2, 0]),
        ("weighted_mean", True, [1 / 10, 2 / 10, 3 / 10, 4 / 10, 0]),
        ("weighted_mean", False, [0, 0, 3 / 7, 4 / 7, 0]),
        ("last", True, [0, 0, 0, 1, 0]),
        ("last", False, [0, 0, 0, 1, 0]),
    ],
)
def test_weights_by_hand(mode: PoolingMode, include_prompt: bool, expected: list[float]) -> None:
    """A text of 4 tokens, 2 of them a prompt, and one padded place."""
    weights = pooling_weights(torch.arange(5), torch.tensor(4), 2, mode, include_prompt)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-7)


@all_cases
def test_weights_sum_to_one_over_long_texts(mode: PoolingMode, include_prompt: bool) -> None:
    """Each weight is rounded to fp32 (6e-8 of it); the totals 1 + .. + l are whole numbers."""
    for length in (1, 2, 1000, 32768):
        weights = pooling_weights(torch.arange(length), torch.tensor(length), length // 3, mode, include_prompt)
        assert weights.double().sum().item() == pytest.approx(1, abs=1e-6)


@all_cases
def test_padded_value_and_gradient_by_definition_in_fp64(mode: PoolingMode, include_prompt: bool) -> None:
    x, exact = hidden().requires_grad_(), hidden(torch.float64).requires_grad_()
    out = pool_padded(x, LENGTHS, mode, PROMPTS, include_prompt)
    expected = by_definition(exact, mode, include_prompt)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    (out * direction()).sum().backward()
    (expected * direction()).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@all_cases
@pytest.mark.parametrize("tail", [0, 3])
def test_packed_equals_padded(mode: PoolingMode, include_prompt: bool, tail: int) -> None:
    """Value and gradient; what follows the last text gets neither. Sums of 7 numbers in fp32, in another order."""
    x, y = hidden().requires_grad_(), hidden().requires_grad_()
    rows, position = packed(y, tail)
    out = pool_packed(rows, position, LENGTHS, mode, PROMPTS, include_prompt)
    expected = pool_padded(x, LENGTHS, mode, PROMPTS, include_prompt)
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    (out * direction()).sum().backward()
    (expected * direction()).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-6, atol=1e-6)


@all_cases
def test_padding_has_no_influence_and_no_gradient(mode: PoolingMode, include_prompt: bool) -> None:
    x, noisy = hidden().requires_grad_(), hidden()
    out = pool_padded(x, LENGTHS, mode, PROMPTS, include_prompt)
    (out * direction()).sum().backward()
    for i, (length, prompt) in enumerate(zip(LENGTHS.tolist(), PROMPTS.tolist(), strict=True)):
        noisy[length:, i] = 1e4
        assert not x.grad[length:, i].any()
        assert x.grad[length - 1, i].any()
        if mode != "last":
            assert bool(x.grad[:prompt, i].any()) == (include_prompt and prompt > 0)
    torch.testing.assert_close(pool_padded(noisy, LENGTHS, mode, PROMPTS, include_prompt), out, rtol=0, atol=0)


@all_cases
def test_bf16_is_pooled_in_fp32(mode: PoolingMode, include_prompt: bool) -> None:
    """Nothing but the input is rounded: the result is that of the same numbers in fp32."""
    x = hidden(torch.bfloat16).requires_grad_()
    rows, position = packed(x)
    expected = pool_padded(x.detach().float(), LENGTHS, mode, PROMPTS, include_prompt)
    for out in (
        pool_padded(x, LENGTHS, mode, PROMPTS, include_prompt),
        pool_packed(rows, position, LENGTHS, mode, PROMPTS, include_prompt),
    ):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        assert gradient.dtype == torch.bfloat16


def test_one_prompt_length_for_all() -> None:
    lengths = torch.tensor([4, 3, 7, 5])
    for mode in ("mean", "weighted_mean"):
        one = pool_padded(hidden(), lengths, mode, 2, include_prompt=False)
        torch.testing.assert_close(one, pool_padded(hidden(), lengths, mode, torch.full((4,), 2), False))
        whole = pool_padded(hidden(), lengths, mode)
        assert torch.equal(whole, pool_padded(hidden(), lengths, mode, 2, include_prompt=True))
        assert not torch.allclose(whole, one)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown pooling mode 'max'; known are mean, weighted_mean, last"):
        pool_padded(hidden(), LENGTHS, "max")  # type: ignore[arg-type]
