"""CoSENT, Matryoshka, alignment and uniformity, the sum over tokens: formulas, invariances, extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from megatron_conan.loss.cosent import cosent
from megatron_conan.loss.embedding_metrics import alignment, uniformity_sum
from megatron_conan.loss.lm import masked_sum
from megatron_conan.loss.matryoshka import truncate


def dense_cosent(similarities: torch.Tensor, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """As the formula says, all pairs of pairs at once, in fp64."""
    similarities = similarities.double()
    differences = (similarities[None, :] - similarities[:, None]) / temperature  # [a, b]: cos_b - cos_a
    chosen = differences[scores[:, None] > scores[None, :]]
    return torch.logsumexp(torch.cat([differences.new_zeros(1), chosen]), dim=0)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    scores=st.lists(st.integers(-2, 3), min_size=0, max_size=12),
    temperature=st.sampled_from([1e-4, 0.05, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_cosent_is_the_sum_over_all_pairs_in_value_and_gradient(scores, temperature, seed):
    found = (2 * torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)) - 1).requires_grad_()
    expected, labels = found.detach().clone().requires_grad_(), torch.tensor(scores, dtype=torch.float32)
    loss, reference = cosent(found, labels, temperature), dense_cosent(expected, labels, temperature)
    loss.backward()
    reference.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference.float(), rtol=1e-6, atol=1e-6)
    # relative to the largest possible gradient, 1 / temperature
    torch.testing.assert_close(found.grad * temperature, expected.grad * temperature, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-4, 0.05])
def test_cosent_of_many_pairs(temperature):
    """Long cumulative sums keep their accuracy: gradients within 1e-6 of the largest."""
    generator = torch.Generator().manual_seed(0)
    found = (2 * torch.rand(3000, generator=generator) - 1).requires_grad_()
    scores = torch.rand(3000, generator=generator)
    expected = found.detach().clone().requires_grad_()
    cosent(found, scores, temperature).backward()
    dense_cosent(expected, scores, temperature).backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-6 * expected.grad.abs().amax().item())


def test_cosent_of_a_hundred_thousand_pairs_fits():
    """Their differences would be 10^10."""
    similarities = torch.linspace(-1, 1, 100_000).requires_grad_()
    loss = cosent(similarities, torch.arange(100_000.0), 0.05)
    loss.backward()
    assert 0 < loss.item() < 2 * math.log(100_000)
    assert similarities.grad.isfinite().all()


def test_cosent_by_hand_and_its_invariances():
    similarities, scores = torch.tensor([0.9, 0.1, 0.5]), torch.tensor([1.0, 3.0, 3.0])
    expected = math.log(1 + math.exp((0.9 - 0.1) / 0.5) + math.exp((0.9 - 0.5) / 0.5))
    assert cosent(similarities, scores, 0.5).item() == pytest.approx(expected, rel=1e-6)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(cosent(similarities[order], scores[order], 0.5), cosent(similarities, scores, 0.5))
    torch.testing.assert_close(cosent(similarities, 10 * scores - 7, 0.5), cosent(similarities, scores, 0.5))


def test_cosent_extremes_give_numbers():
    similarities = torch.tensor([1.0, -1.0, 1.0, -1.0], requires_grad=True)
    loss = cosent(similarities, torch.tensor([0.0, 1.0, 0.0, 1.0]), 1e-4)
    loss.backward()
    assert loss.item() == pytest.approx(2e4, rel=1e-3)
    assert similarities.grad.tolist() == pytest.approx([5e3, -5e3, 5e3, -5e3])
    equal = torch.tensor([0.3, 0.9], requires_grad=True)
    loss = cosent(equal, torch.ones(2), 1e-4)
    loss.backward()
    assert loss.item() == 0.0
    assert not equal.grad.any()


def unit(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(x, dim=-1)


def test_truncated_embeddings_are_unit_vectors_along_the_first_columns():
    x = unit(5, 8)
    assert truncate(x, 8) is x
    short = truncate(x, 3)
    assert short.shape == (5, 3)
    torch.testing.assert_close(short.norm(dim=1), torch.ones(5).double())
    torch.testing.assert_close(torch.linalg.vecdot(short, x[:, :3]), x[:, :3].norm(dim=1))
    low = x.bfloat16()
    assert torch.equal(truncate(low, 3), truncate(low.float(), 3))
    zeros = torch.zeros(1, 4, requires_grad=True)
    truncate(zeros, 2).sum().backward()
    assert zeros.grad.isfinite().all()


def test_alignment_is_the_squared_distance():
    x, y = unit(6, 5), unit(6, 5, 1)
    torch.testing.assert_close(alignment((x * y).sum(-1)), (x - y).square().sum(-1))


@pytest.mark.parametrize("num_own", [1, 3, 6])
def test_uniformity_of_ranks_adds_up_to_that_of_all(num_own):
    everyone = unit(6, 5)
    parts = [uniformity_sum(everyone[i : i + num_own], everyone, i) for i in range(0, 6, num_own)]
    total, count = (sum(values) for values in zip(*parts, strict=True))
    # all pairs once; the paper's metric is a mean, so that counting each pair twice changes nothing
    expected = torch.pdist(everyone).square().mul(-2).exp().mean().log().item()
    assert count == 30
    assert math.log(total / count) == pytest.approx(expected, rel=1e-6)


def test_uniformity_extremes():
    same, opposite = unit(1, 5).repeat(4, 1), torch.cat([unit(1, 5), -unit(1, 5)])
    assert uniformity_sum(same, same, 0) == (pytest.approx(12.0), 12)
    assert uniformity_sum(opposite, opposite, 0) == (pytest.approx(2 * math.exp(-8), rel=1e-6), 2)
    assert uniformity_sum(same[:1], same[:1], 0) == (0.0, 0)


def test_masked_sum_counts_what_the_mask_names():
    losses = torch.arange(6.0).reshape(2, 3).requires_grad_()
    mask = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    total, count = masked_sum(losses, mask)
    total.backward()
    assert (total.item(), count.item(), count.dtype) == (9.0, 3, torch.int32)
    assert torch.equal(losses.grad, mask)
