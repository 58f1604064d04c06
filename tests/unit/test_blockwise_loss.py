"""Log-sum-exp over blocks: equal to the dense matrix in value, gradient and statistics; memory grows with the batch."""

import math
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from megatron_conan.loss import blockwise
from megatron_conan.loss.blockwise import Exclusions, NegativeStatistics, negative_logsumexp

DIM = 6


def unit(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Unit vectors [rows, e] that take a gradient. fp64: then dense and blockwise agree about every comparison."""
    x = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return normalize(x, dim=-1).requires_grad_()


def matrix(excluded: Exclusions) -> torch.Tensor:
    """[q, k] bool, cell by cell."""
    result = torch.zeros(len(excluded.anchor_keys), len(excluded.candidate_keys), dtype=torch.bool)
    for i, anchor_keys in enumerate(excluded.anchor_keys.tolist()):
        for j, candidate_keys in enumerate(excluded.candidate_keys.tolist()):
            result[i, j] = any(a == b >= 0 for a, b in zip(anchor_keys, candidate_keys, strict=True))
    for i, j in excluded.pairs.T.tolist():
        result[i, j] = True
    return result


def dense(
    anchor: torch.Tensor,
    candidate: torch.Tensor,
    temperature: float,
    excluded: torch.Tensor,
    ceiling: torch.Tensor | None,
) -> tuple[torch.Tensor, NegativeStatistics]:
    """What `negative_logsumexp` computes, with all [q, k] similarities at once."""
    cosines = anchor @ candidate.T
    above = torch.zeros_like(excluded) if ceiling is None else ~excluded & (cosines > ceiling[:, None])
    counts = ~excluded & ~above
    rows = [
        torch.logsumexp(row[kept] / temperature, 0) if kept.any() else row.sum() * 0 - torch.inf
        for row, kept in zip(cosines, counts, strict=True)
    ]
    inf = torch.full((len(anchor), 1), -torch.inf, dtype=cosines.dtype)
    seen = cosines.detach()
    highest = torch.cat([inf, seen.masked_fill(~counts, -torch.inf)], 1).amax(1)
    statistics = NegativeStatistics(counts.sum(1), above.sum(1), highest, (seen * counts).sum(1))
    return torch.stack(rows), statistics


def assert_equal_results(
    anchor: torch.Tensor,
    candidate: torch.Tensor,
    excluded: Exclusions,
    ceiling: torch.Tensor | None,
    block_size: int,
    temperature: float = 0.1,
) -> NegativeStatistics:
    found = negative_logsumexp(anchor, candidate, temperature, excluded, ceiling, block_size=block_size)
    expected = dense(anchor, candidate, temperature, matrix(excluded), ceiling)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    for name, value in vars(expected[1]).items():
        torch.testing.assert_close(getattr(found[1], name), value, rtol=1e-12, atol=1e-12, msg=name)
        assert not getattr(found[1], name).requires_grad
    weight = torch.arange(1.0, len(anchor) + 1).double()  # rows without negatives too: their gradient is zero
    ours, theirs = (torch.autograd.grad(result, (anchor, candidate), weight) for result, _ in (found, expected))
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10)
    return found[1]


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, Exclusions, torch.Tensor | None]:
    """Vectors, keys (few different ones, so that they agree; some negative), pairs (in any order, some twice), ceiling."""
    num_anchors, num_candidates = draw(st.integers(1, 7)), draw(st.integers(0, 9))
    seed, num_columns = draw(st.integers(0, 2**16)), draw(st.integers(0, 3))
    num_pairs = draw(st.integers(0, 12)) if num_candidates else 0
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    pairs = torch.stack([integers(0, num_anchors, num_pairs), integers(0, max(num_candidates, 1), num_pairs)])
    excluded = Exclusions(
        integers(-2, 6, num_anchors, num_columns), integers(-2, 6, num_candidates, num_columns), pairs
    )
    ceiling = torch.rand(num_anchors, generator=generator).double() - 0.3 if draw(st.booleans()) else None
    return unit(num_anchors, seed), unit(num_candidates, seed + 1), excluded, ceiling


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases(), block_size=st.integers(1, 6), listed=st.sampled_from([0, 16]))
def test_equals_the_dense_matrix(case, block_size, listed):
    """Value, gradient and statistics. `listed`: keys are compared in every block, or become pairs."""
    anchor, candidate, excluded, ceiling = case
    with patch.object(blockwise, "LISTED_PAIRS", listed):
        assert_equal_results(anchor, candidate, excluded, ceiling, block_size)


@pytest.mark.parametrize("listed", [0, 16])
@pytest.mark.parametrize("block_size", [1, 16, 33, 1024])
def test_equals_the_dense_matrix_with_everything_at_once(block_size, listed):
    generator = torch.Generator().manual_seed(3)
    anchor, candidate = unit(50, 0), unit(67, 1)
    pairs = torch.stack([torch.randint(0, n, (80,), generator=generator) for n in (50, 67)])
    keys = [torch.randint(-1, 12, (n, 2), generator=generator) for n in (50, 67)]
    excluded = Exclusions(*keys, pairs[:, :40]).with_pairs(pairs[:, 30:])
    with patch.object(blockwise, "LISTED_PAIRS", listed):
        seen = assert_equal_results(anchor, candidate, excluded, torch.full((50,), 0.6).double(), block_size, 0.02)
    assert (seen.count < 67).all()
    assert seen.masked.sum() > 20


def test_keys_become_pairs_only_where_they_are_few():
    """Else a batch of one class would list [q, k] pairs."""
    one = torch.zeros(200, 1, dtype=torch.int64)
    many, few = Exclusions(one, one, torch.empty(2, 0).long()), Exclusions(one, one.clone(), torch.empty(2, 0).long())
    few.candidate_keys[3:] = 1 + torch.arange(197)[:, None]
    assert [len(blockwise._plan(excluded, 64).pair_rows) for excluded in (many, few)] == [0, 600]
    assert [blockwise._plan(excluded, 64).anchor_keys.shape[1] for excluded in (many, few)] == [1, 0]


@pytest.mark.parametrize("ceiling", [None, 0.5])
def test_gradcheck(ceiling):
    anchor, candidate = unit(5, 0), unit(7, 1)
    excluded = Exclusions.nothing(5, 7).with_pairs(torch.tensor([[0, 4, 2], [1, 6, 2]]))
    limit = None if ceiling is None else torch.full((5,), ceiling).double()
    assert torch.autograd.gradcheck(
        lambda a, c: negative_logsumexp(a, c, 0.1, excluded, limit, block_size=3)[0], (anchor, candidate)
    )


def test_only_the_side_that_takes_a_gradient_gets_one():
    anchor, candidate = unit(5, 0), unit(7, 1)
    plain = negative_logsumexp(anchor, candidate, 0.1, Exclusions.nothing(5, 7))[0]
    expected = torch.autograd.grad(plain.sum(), (anchor, candidate))
    for i, sides in enumerate([(anchor, candidate.detach()), (anchor.detach(), candidate)]):
        result = negative_logsumexp(*sides, 0.1, Exclusions.nothing(5, 7))[0]
        assert torch.equal(torch.autograd.grad(result.sum(), sides[i])[0], expected[i])


def test_the_same_vectors_may_be_anchors_and_candidates():
    x = unit(6, 0)
    itself = Exclusions.nothing(6, 6).with_pairs(torch.arange(6).repeat(2, 1))
    result = negative_logsumexp(x, x, 0.1, itself, block_size=4)[0]
    expected = dense(x, x, 0.1, torch.eye(6, dtype=torch.bool), None)[0]
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (result, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("temperature", [1e-4, 0.02, 100.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_give_numbers(temperature, sign):
    """Identical or opposite vectors; no logit overflows or is lost, and rows without negatives have no gradient."""
    anchor = normalize(torch.ones(4, DIM), dim=-1).requires_grad_()
    candidate = (sign * normalize(torch.ones(5, DIM), dim=-1)).requires_grad_()
    alone = torch.stack([torch.zeros(5, dtype=torch.int64), torch.arange(5)])  # the first anchor has no negatives
    result, seen = negative_logsumexp(
        anchor, candidate, temperature, Exclusions.nothing(4, 5).with_pairs(alone), block_size=2
    )
    result.sum().backward()
    assert result.tolist() == pytest.approx([-math.inf] + [sign / temperature + math.log(5)] * 3, rel=1e-6)
    assert seen.count.tolist() == [0, 5, 5, 5]
    assert seen.highest.tolist() == pytest.approx([-math.inf, sign, sign, sign])
    assert seen.total.tolist() == pytest.approx([0.0, 5 * sign, 5 * sign, 5 * sign])
    assert anchor.grad.isfinite().all()
    assert candidate.grad.isfinite().all()
    assert not anchor.grad[0].any()
    assert anchor.grad[1:].any()


def test_a_ceiling_of_infinity_masks_nothing_and_of_minus_infinity_everything():
    anchor, candidate = unit(2, 0), unit(5, 1)
    excluded = Exclusions.nothing(2, 5).with_pairs(torch.tensor([[0, 1], [3, 4]]))
    seen = assert_equal_results(anchor, candidate, excluded, torch.tensor([1, -1]).double() * torch.inf, 3)
    assert seen.masked.tolist() == [0, 4]
    assert seen.count.tolist() == [4, 0]


def test_backward_leaves_out_exactly_what_forward_left_out():
    """All cosines are the ceiling but for rounding. Shares add up to 1, which one other decision changes by 1 in 200."""
    generator = torch.Generator().manual_seed(0)
    anchor, candidate = (torch.randn(1, 63, generator=generator).repeat(rows, 1) for rows in (150, 400))
    candidate = candidate + 1e-7 * torch.randn(400, 63, generator=generator)
    candidate = torch.cat([candidate, torch.ones(400, 1)], 1)  # the last dim's gradient is the sum of the shares
    anchor = torch.cat([anchor, torch.zeros(150, 1)], 1).requires_grad_()
    ceiling = (anchor @ candidate.T).median(dim=1)[0]
    result, seen = negative_logsumexp(anchor, candidate, 1.0, Exclusions.nothing(150, 400), ceiling, block_size=64)
    result.sum().backward()
    assert 50 < seen.masked.float().mean() < 350
    torch.testing.assert_close(anchor.grad[:, -1], torch.ones(150), rtol=0, atol=1e-4)


def test_low_precision_input_is_computed_in_fp32():
    anchor, candidate = unit(5, 0).bfloat16().detach(), unit(7, 1).bfloat16().detach()
    low, high = [], []
    for found, dtype in ((low, torch.bfloat16), (high, torch.float32)):
        x = anchor.clone().to(dtype).requires_grad_()
        found.append(negative_logsumexp(x, candidate.to(dtype), 0.02, Exclusions.nothing(5, 7))[0])
        found[0].sum().backward()
        found.append(x.grad)
    assert low[0].dtype == torch.float32
    assert torch.equal(low[0], high[0])
    assert low[1].dtype == torch.bfloat16
    assert torch.equal(low[1], high[1].bfloat16())


MEMORY = """
import torch
from pathlib import Path
from torch.nn.functional import cross_entropy, normalize
from megatron_conan.loss.blockwise import Exclusions, negative_logsumexp

def peak():  # bytes; not getrusage, whose maximum may be that of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

def data(n):
    return [normalize(torch.randn(n, 64), dim=-1).requires_grad_() for _ in range(2)]

def blockwise(n):
    keys = torch.arange(n)[:, None] // 4
    compared = torch.zeros(n, 1, dtype=torch.int64)  # excludes half of the batch
    compared[::2] = 1
    excluded = Exclusions(torch.cat([keys, compared], 1), torch.cat([keys, 1 - compared], 1), torch.arange(n).repeat(2, 1))
    negative_logsumexp(*data(n), 0.05, excluded, torch.full((n,), 0.3))[0].sum().backward()

def dense(n):
    query, document = data(n)
    cross_entropy(query @ document.T / 0.05, torch.arange(n)).backward()

torch.set_num_threads(1)
blockwise(2048)  # buffers and work spaces of fixed size
dense(2048)
for loss in (blockwise, dense):
    before = peak()
    loss(8192)
    print(peak() - before)
"""


def test_memory_does_not_grow_with_the_square_of_the_batch():
    """8,192 x 8,192 in fp32 are 256 MB. The dense loss in the same process shows that the measure works."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    found, dense_peak = (int(line) / 2**20 for line in run.stdout.split())
    assert found < 64
    assert dense_peak > 512
