"""InfoNCE over the dense matrix of similarities."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from megatron_conan.loss.contrastive import excluded_documents, info_nce

NUM_QUERIES, NUM_DOCUMENTS, DIM = 5, 12, 8


def unit(rows: int, seed: int) -> torch.Tensor:
    """Unit vectors [rows, e] that take a gradient."""
    x = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))
    return normalize(x, dim=-1).requires_grad_()


def nothing() -> torch.Tensor:
    return torch.zeros(NUM_QUERIES, NUM_DOCUMENTS, dtype=torch.bool)


POSITIVE = torch.arange(NUM_QUERIES)


@pytest.mark.parametrize("temperature", [0.02, 0.05, 1.0])
def test_info_nce_by_hand(temperature):
    query, document = unit(NUM_QUERIES, 0), unit(NUM_DOCUMENTS, 1)
    result = info_nce(query, document, POSITIVE, nothing(), temperature)
    for i in range(NUM_QUERIES):
        scores = [math.fsum((query[i] * d).tolist()) / temperature for d in document.detach()]
        top = max(scores)
        expected = top + math.log(math.fsum(math.exp(score - top) for score in scores)) - scores[i]
        assert result.losses[i].item() == pytest.approx(expected, rel=2e-5, abs=2e-5)
        assert result.correct[i].item() == (scores[i] == top)


def test_info_nce_is_multiple_negatives_ranking_in_value_and_gradient():
    """MultipleNegativesRankingLoss is cross_entropy(scale * cos(query, documents), arange), scale = 1 / temperature."""
    found, expected = [(unit(NUM_QUERIES, 0), unit(NUM_DOCUMENTS, 1)) for _ in range(2)]
    info_nce(*found, POSITIVE, nothing(), 0.05).losses.mean().backward()
    loss = cross_entropy(20.0 * expected[0] @ expected[1].T, POSITIVE)
    loss.backward()
    torch.testing.assert_close(info_nce(*found, POSITIVE, nothing(), 0.05).losses.mean(), loss)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_excluded_documents_change_nothing_wherever_they_point():
    query, document = unit(NUM_QUERIES, 0), unit(NUM_DOCUMENTS, 1)
    excluded = nothing()
    excluded[0, 3:8] = True
    excluded[2, 9] = True
    result = info_nce(query, document, POSITIVE, excluded, 0.05)
    kept = [0, 1, 2, 8, 9, 10, 11]
    alone = info_nce(query[:1], document[kept], POSITIVE[:1], nothing()[:1, kept], 0.05)
    torch.testing.assert_close(result.losses[:1], alone.losses)
    result.losses[0].backward()
    assert not document.grad[3:8].any()
    assert document.grad[[1, 2, 8]].abs().amin(dim=1).min() > 0
    assert result.similarities.requires_grad is False
    torch.testing.assert_close(result.similarities, (query @ document.T).detach())


def test_masked_copies_of_the_positives_change_neither_loss_nor_accuracy():
    query, document = unit(NUM_QUERIES, 0), unit(NUM_DOCUMENTS, 1)
    doubled = torch.cat([document, document[:NUM_QUERIES]])
    plain = info_nce(query, document, POSITIVE, nothing(), 0.05)
    copies = torch.ones(NUM_QUERIES, NUM_QUERIES, dtype=torch.bool)
    excluded = torch.cat([nothing(), copies], 1)
    masked = info_nce(query, doubled, POSITIVE, excluded, 0.05)
    torch.testing.assert_close(masked.losses, plain.losses)
    assert torch.equal(masked.correct, plain.correct)


def test_the_positive_counts_even_where_it_is_marked_as_excluded():
    query, document = unit(NUM_QUERIES, 0), unit(NUM_DOCUMENTS, 1)
    excluded = nothing()
    excluded[torch.arange(NUM_QUERIES), POSITIVE] = True
    torch.testing.assert_close(
        info_nce(query, document, POSITIVE, excluded, 0.05).losses,
        info_nce(query, document, POSITIVE, nothing(), 0.05).losses,
    )


def test_order_of_queries_and_documents_does_not_matter():
    query, document = unit(NUM_QUERIES, 0), unit(NUM_DOCUMENTS, 1)
    excluded = torch.rand(NUM_QUERIES, NUM_DOCUMENTS, generator=torch.Generator().manual_seed(2)) < 0.3
    q = torch.randperm(NUM_QUERIES, generator=torch.Generator().manual_seed(3))
    d = torch.randperm(NUM_DOCUMENTS, generator=torch.Generator().manual_seed(4))
    place = torch.argsort(d)  # place[j]: where document j went
    plain = info_nce(query, document, POSITIVE, excluded, 0.05)
    moved = info_nce(query[q], document[d], place[POSITIVE[q]], excluded[q][:, d], 0.05)
    torch.testing.assert_close(moved.losses, plain.losses[q])
    assert torch.equal(moved.correct, plain.correct[q])


@pytest.mark.parametrize("temperature", [1e-4, 0.02])
@pytest.mark.parametrize("opposite", [False, True])
def test_extremes_give_numbers(temperature, opposite):
    query = normalize(torch.ones(NUM_QUERIES, DIM), dim=-1).requires_grad_()
    document = (normalize(torch.ones(NUM_DOCUMENTS, DIM), dim=-1) * (-1 if opposite else 1)).requires_grad_()
    excluded = nothing()
    excluded[0] = True  # nothing but the positive is left
    result = info_nce(query, document, POSITIVE, excluded, temperature)
    result.losses.sum().backward()
    assert result.losses[0].item() == 0.0
    torch.testing.assert_close(result.losses[1:], torch.full((NUM_QUERIES - 1,), math.log(NUM_DOCUMENTS)))
    assert query.grad.isfinite().all()
    assert document.grad.isfinite().all()


def test_info_nce_of_bf16_embeddings_is_computed_in_fp32():
    query, document = unit(NUM_QUERIES, 0).bfloat16(), unit(NUM_DOCUMENTS, 1).bfloat16()
    result = info_nce(query, document, POSITIVE, nothing(), 0.02)
    exact = info_nce(query.float(), document.float(), POSITIVE, nothing(), 0.02)
    assert result.losses.dtype == torch.float32
    assert torch.equal(result.losses, exact.losses)


def test_which_documents_are_no_negatives():
    query_ids = torch.tensor([10, 20, 10])
    # the positives of the three rows, then a hard negative of each; the last has the text of query 20
    document_ids = torch.tensor([1, 2, 3, 4, 5, 20])
    owners = torch.tensor([10, 20, 10, -1, -1, -1])
    known = torch.zeros(3, 6, dtype=torch.bool)
    known[1, 3] = True
    expected = torch.tensor(
        [
            [True, False, True, False, False, False],  # its positive, and that of the row with the same query
            [False, True, False, True, False, True],  # its positive, a known one, its own text
            [True, False, True, False, False, False],
        ]
    )
    assert torch.equal(excluded_documents(query_ids, document_ids, owners, known), expected)
