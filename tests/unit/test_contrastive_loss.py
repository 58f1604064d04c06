"""InfoNCE: another library's values and gradients, what is left out, invariances, extremes."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch.nn.functional import normalize

from megatron_conan.loss.blockwise import Exclusions
from megatron_conan.loss.contrastive import Bank, ContrastiveLoss, OwnNegatives, info_nce_loss
from megatron_conan.loss.cosent import cosent
from megatron_conan.loss.matryoshka import truncate

NUM_ROWS, DIM, TEMPERATURE = 7, 8, 0.05


class Table(torch.nn.Module):
    """A model of which every text is a row of a table: its gradient is that of the embeddings."""

    def __init__(self, num_texts: int) -> None:
        super().__init__()
        weight = torch.randn(num_texts, DIM, generator=torch.Generator().manual_seed(num_texts))
        self.weight = torch.nn.Parameter(weight)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**features, "sentence_embedding": self.weight[features["input_ids"][:, 0]]}

    def get_embedding_dimension(self) -> int:
        return DIM


def stock(num_columns: int, make: Callable[[SentenceTransformer], torch.nn.Module], labels: torch.Tensor | None = None):
    """Value and gradient ([n, e]) of a sentence-transformers loss; column i holds texts i * NUM_ROWS and on."""
    model = SentenceTransformer(modules=[Table(num_columns * NUM_ROWS)], device="cpu")
    features = [{"input_ids": ids[:, None]} for ids in torch.arange(num_columns * NUM_ROWS).split(NUM_ROWS)]
    loss = make(model)(features, labels)
    loss.backward()
    return loss.detach(), model[0].weight.grad


def ours(num_columns: int, loss: Callable[[list[torch.Tensor]], torch.Tensor]):
    """Value and gradient of a loss of the columns' unit vectors, each [NUM_ROWS, e]."""
    weight = Table(num_columns * NUM_ROWS).weight
    value = loss(list(normalize(weight, dim=-1).split(NUM_ROWS)))
    value.backward()
    return value.detach(), weight.grad


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Both in fp32, in other orders of summation."""
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=2e-6)
    assert expected[1].abs().amax() > 1e-2
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=2e-6)


def diagonal(num_blocks: int = 1) -> torch.Tensor:
    """[2, n] pairs of row i with candidates i, i + NUM_ROWS, ..."""
    candidate = torch.arange(num_blocks * NUM_ROWS)
    return torch.stack([candidate % NUM_ROWS, candidate])


def bank(anchor: torch.Tensor, candidate: torch.Tensor, pairs: torch.Tensor | None = None) -> Bank:
    excluded = Exclusions.nothing(len(anchor), len(candidate))
    return Bank(anchor, candidate, excluded if pairs is None else excluded.with_pairs(pairs))


def row_loss(query: torch.Tensor, positive: torch.Tensor, banks: list[Bank], **options) -> ContrastiveLoss:
    """One positive a row."""
    options = {"temperature": TEMPERATURE, "block_size": 3, **options}
    return info_nce_loss(torch.arange(len(query)), (query * positive).sum(-1), len(query), banks, **options)


def query_to_document(columns: list[torch.Tensor]) -> torch.Tensor:
    query, positive = columns[:2]
    return row_loss(query, positive, [bank(query, torch.cat(columns[1:]), diagonal())]).losses.mean()


@pytest.mark.parametrize("num_columns", [2, 3, 5])
def test_multiple_negatives_ranking(num_columns):
    """In-batch negatives, without and with hard ones."""
    expected = stock(num_columns, lambda model: MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE))
    assert_same(ours(num_columns, query_to_document), expected)


@pytest.mark.parametrize("mini_batch_size", [2, 5, 64])
def test_cached_multiple_negatives_ranking(mini_batch_size):
    def make(model):
        return CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=mini_batch_size)

    assert_same(ours(4, query_to_document), stock(4, make))


def test_symmetric():
    """The mean of both directions, each with its own softmax."""

    def make(model):
        directions = ("query_to_doc", "doc_to_query")
        return MultipleNegativesRankingLoss(
            model, scale=1 / TEMPERATURE, directions=directions, partition_mode="per_direction"
        )

    def loss(columns):
        query, positive, _ = columns
        back = row_loss(query, positive, [bank(positive, query, diagonal())])
        return 0.5 * (query_to_document(columns) + back.losses.mean())

    assert_same(ours(3, loss), stock(3, make))


@pytest.mark.parametrize("num_columns", [2, 3])
@pytest.mark.parametrize("directions", ["qq", "dd", "dq", "qq dd dq"])
def test_directions_jointly(num_columns, directions):
    """One softmax over several banks. Theirs counts the positive again in doc_to_query, so here it isn't excluded."""
    names = {"qq": "query_to_query", "dd": "doc_to_doc", "dq": "doc_to_query"}

    def make(model):
        chosen = ("query_to_doc", *(names[direction] for direction in directions.split()))
        return MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, directions=chosen)

    def loss(columns):
        query, positive, documents = columns[0], columns[1], torch.cat(columns[1:])
        further = {
            "qq": bank(query, query, diagonal()),
            "dd": bank(positive, documents, diagonal(num_columns - 1)),
            "dq": bank(positive, query),
        }
        banks = [bank(query, documents, diagonal()), *(further[direction] for direction in directions.split())]
        return row_loss(query, positive, banks).losses.mean()

    assert_same(ours(num_columns, loss), stock(num_columns, make))


DIMS, WEIGHTS = [8, 5, 2], [1.0, 0.5, 0.25]


def at_all_dims(loss: Callable[[list[torch.Tensor]], torch.Tensor]) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    return lambda columns: sum(
        weight * loss([truncate(column, dim) for column in columns]) for dim, weight in zip(DIMS, WEIGHTS, strict=True)
    )


@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka_over_multiple_negatives_ranking(cached):
    def make(model):
        inner = CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss
        return MatryoshkaLoss(model, inner(model, scale=1 / TEMPERATURE), DIMS, WEIGHTS)

    assert_same(ours(3, at_all_dims(query_to_document)), stock(3, make))


@pytest.mark.parametrize("matryoshka", [False, True])
def test_cosent(matryoshka):
    scores = torch.tensor([1.0, 0, 3, 3, 2, 0, 5])

    def make(model):
        inner = CoSENTLoss(model, scale=1 / TEMPERATURE)
        return MatryoshkaLoss(model, inner, DIMS, WEIGHTS) if matryoshka else inner

    def loss(columns):
        return cosent((columns[0] * columns[1]).sum(-1), scores, TEMPERATURE)

    assert_same(ours(2, at_all_dims(loss) if matryoshka else loss), stock(2, make, scores))


def vectors(rows: int, seed: int) -> torch.Tensor:
    x = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(x, dim=-1).requires_grad_()


def test_by_hand():
    query, positive, others = vectors(3, 0), vectors(3, 1), vectors(4, 2)
    positive = torch.cat([positive[:1], query[1:2], positive[2:]])  # one right answer
    own = OwnNegatives(torch.tensor([2, 0, 2]), torch.tensor([0.5, -0.25, 0.125]).double())
    result = row_loss(query, positive, [bank(query, others, torch.tensor([[1, 1], [0, 3]]))], own=own)
    cosines = (query @ others.T).tolist()
    negatives = [[*cosines[0], -0.25], cosines[1][1:3], [*cosines[2], 0.5, 0.125]]
    for i, scores in enumerate(negatives):
        similarity = (query[i] @ positive[i]).item()
        total = math.fsum(math.exp((score - similarity) / TEMPERATURE) for score in scores)
        assert result.losses[i].item() == pytest.approx(math.log(1 + total), rel=1e-12)
        assert result.correct[i].item() == (similarity > max(scores))
        assert result.num_negatives[i].item() == len(scores)
        assert result.negative_total[i].item() == pytest.approx(math.fsum(scores), abs=1e-12)
    assert result.correct.tolist() == [False, True, False]
    assert not result.num_masked.any()
    assert not any(value.requires_grad for name, value in vars(result).items() if name != "losses")


def test_several_positives_are_the_mean_of_one_at_a_time():
    """Each of them without the row's others."""
    query, documents = vectors(4, 0), vectors(9, 1)
    row, document = torch.tensor([3, 0, 1, 0, 2, 0]), torch.tensor([0, 1, 2, 3, 4, 5])
    similarity = (query[row] * documents[document]).sum(-1)
    options = {"temperature": TEMPERATURE, "block_size": 4}
    candidates = [bank(query, documents, torch.stack([row, document]))]
    together = info_nce_loss(row, similarity, 4, candidates, **options)
    losses = [[] for _ in range(4)]
    for i, (r, d) in enumerate(zip(row.tolist(), document.tolist(), strict=True)):
        kept = [j for j in range(9) if j == d or (r, j) not in set(zip(row.tolist(), document.tolist(), strict=True))]
        logits = query[r] @ documents[kept].T / TEMPERATURE
        losses[r].append(torch.logsumexp(logits, 0) - logits[kept.index(d)])
        assert similarity[i].item() / TEMPERATURE == pytest.approx(logits[kept.index(d)].item())
    expected = torch.stack([torch.stack(parts).mean() for parts in losses])
    torch.testing.assert_close(together.losses, expected)
    gradients = [
        torch.autograd.grad(x.sum(), (query, documents), retain_graph=True) for x in (together.losses, expected)
    ]
    torch.testing.assert_close(*gradients)
    lowest = similarity.new_full((4,), 2).scatter_reduce(0, row, similarity, "amin")
    negatives = (query @ documents.T).detach().clone()
    negatives[row, document] = -2
    assert torch.equal(together.correct, lowest > negatives.amax(1))


def test_margin_leaves_out_what_scores_above_the_lowest_positive():
    """In banks and own negatives alike; the second positive of row 0 is the lower one."""
    query = torch.eye(2, dtype=torch.float64)
    candidates = torch.tensor([[0.55, 0.2], [0.65, 0.9], [0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    own_similarity = torch.tensor([0.58, 0.62, 0.1], dtype=torch.float64, requires_grad=True)
    own = OwnNegatives(torch.tensor([0, 0, 1]), own_similarity)
    positive_row, similarity = torch.tensor([0, 1, 0]), torch.tensor([0.8, 0.8, 0.5], dtype=torch.float64)
    options = {"temperature": 0.1, "own": own, "margin": 0.1}
    result = info_nce_loss(positive_row, similarity, 2, [bank(query, candidates)], **options)
    result.losses.sum().backward()
    z = sum(math.exp(s / 0.1) for s in (0.55, 0.3, 0.58))
    parts = [math.log(1 + z / math.exp(s / 0.1)) for s in (0.8, 0.5)]
    assert result.losses[0].item() == pytest.approx(sum(parts) / 2, rel=1e-9)
    assert result.num_negatives.tolist() == [3, 4]
    assert result.num_masked.tolist() == [2, 0]
    assert result.correct.tolist() == [False, False]
    assert result.negative_total.tolist() == pytest.approx([0.55 + 0.3 + 0.58, 0.2 + 0.9 + 0.5 + 0.1])
    assert candidates.grad[1, 0] == 0
    assert own_similarity.grad[1] == 0
    assert candidates.grad[[0, 2], 0].min() > 0
    assert own_similarity.grad[0] > 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), num_rows=st.integers(1, 6), num_candidates=st.integers(0, 7))
def test_order_of_rows_and_candidates_does_not_matter(seed, num_rows, num_candidates):
    generator = torch.Generator().manual_seed(seed)
    query, positive, candidate = vectors(num_rows, seed), vectors(num_rows, seed + 1), vectors(num_candidates, seed + 2)
    keys = [torch.randint(-1, 4, (n, 2), generator=generator) for n in (num_rows, num_candidates)]
    cells = (torch.rand(num_rows, num_candidates, generator=generator) < 0.2).nonzero().T
    q, k = (torch.randperm(n, generator=generator) for n in (num_rows, num_candidates))
    moved_cells = torch.stack([q.argsort()[cells[0]], k.argsort()[cells[1]]])
    plain = Bank(query, candidate, Exclusions(*keys, cells))
    moved = Bank(query[q], candidate[k], Exclusions(keys[0][q], keys[1][k], moved_cells))
    expected = row_loss(query, positive, [plain], margin=0.1)
    found = row_loss(query[q], positive[q], [moved], margin=0.1, block_size=2)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value[q], msg=name)
    inputs = (query, positive, candidate)
    gradients = [torch.autograd.grad(x.losses.sum(), inputs) for x in (expected, found)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("how", ["pairs", "keys", "margin"])
def test_masked_duplicates_change_nothing(how):
    """Copies of the positives among the candidates: neither value, gradient, accuracy nor the mean similarity."""
    query, positive, candidate = vectors(5, 0), vectors(5, 1), vectors(6, 2)
    doubled = torch.cat([candidate, positive.detach().clone()])
    copies = torch.stack([torch.arange(5).repeat_interleave(5), 6 + torch.arange(5).repeat(5)])
    excluded, margin = Exclusions.nothing(5, 11), None
    if how == "pairs":
        excluded = excluded.with_pairs(copies)
    elif how == "keys":
        key = torch.full((11, 1), 7)
        key[:6] = -1
        excluded = Exclusions(torch.full((5, 1), 7), key, torch.empty(2, 0).long())
    else:  # only what scores above the positive; so the others' copies go by pairs
        excluded, margin = excluded.with_pairs(copies[:, copies[0] != copies[1] - 6]), -1e-9
    plain = row_loss(query, positive, [bank(query, candidate)])
    if how == "margin":
        plain = row_loss(query, positive, [bank(query, candidate)], margin=margin)
    masked = row_loss(query, positive, [Bank(query, doubled, excluded)], margin=margin)
    for name, value in vars(plain).items():
        if name != "num_masked":
            torch.testing.assert_close(getattr(masked, name), value, msg=name)
    assert torch.equal(masked.num_masked - plain.num_masked, torch.full((5,), int(how == "margin")))
    inputs = (query, positive, candidate)
    gradients = [torch.autograd.grad(x.losses.sum(), inputs) for x in (plain, masked)]
    torch.testing.assert_close(*gradients)


def test_temperature_limits():
    """Infinite: all negatives count alike. Zero: how far the hardest negative is above the positive."""
    query, positive, candidate = vectors(5, 0), vectors(5, 1), vectors(6, 2)
    warm = row_loss(query, positive, [bank(query, candidate)], temperature=1e6)
    torch.testing.assert_close(warm.losses, torch.full((5,), math.log(7)).double(), rtol=1e-5, atol=0)
    cold = row_loss(query, positive, [bank(query, candidate)], temperature=1e-5)
    gap = (query @ candidate.T).amax(1) - (query * positive).sum(1)
    assert gap.min() < 0 < gap.max()
    torch.testing.assert_close(cold.losses * 1e-5, gap.clamp(min=0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("temperature", [1e-4, 0.02])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("num_candidates", [0, 5])
def test_extremes_give_numbers(temperature, sign, num_rows, num_candidates):
    """Identical or opposite vectors, row 0 without any negative, no candidates at all."""
    query = normalize(torch.ones(num_rows, DIM), dim=-1).requires_grad_()
    candidate = (sign * normalize(torch.ones(num_candidates, DIM), dim=-1)).requires_grad_()
    all_of_first = torch.stack([torch.zeros(num_candidates).long(), torch.arange(num_candidates)])
    result = row_loss(
        query, query.detach(), [bank(query, candidate, all_of_first)], temperature=temperature, margin=0.1
    )
    result.losses.sum().backward()
    expected = math.log1p(num_candidates * math.exp((sign - 1) / temperature))
    assert result.losses.tolist() == pytest.approx([0.0] + [expected] * (num_rows - 1), rel=1e-2 if sign > 0 else 0)
    assert not result.correct[0]  # there is no negative to be above
    assert query.grad.isfinite().all()
    assert candidate.grad.isfinite().all()
    assert not query.grad[0].any()


def test_own_negatives_alone_and_rows_without_any():
    similarity = torch.tensor([0.5, 0.4], requires_grad=True)
    negative = torch.tensor([0.45, 0.2], requires_grad=True)
    own = OwnNegatives(torch.tensor([1, 1]), negative)
    result = info_nce_loss(torch.arange(2), similarity, 2, [], temperature=1e-3, own=own)
    result.losses.sum().backward()
    assert result.losses.tolist() == pytest.approx([0.0, 50.0], rel=1e-5)
    assert result.correct.tolist() == [False, False]
    assert result.num_negatives.tolist() == [0, 2]
    assert similarity.grad.tolist() == pytest.approx([0.0, -1000.0])
    assert negative.grad.tolist() == pytest.approx([1000.0, 0.0])


def test_no_negatives_at_all():
    similarity = torch.tensor([0.5, 0.4], requires_grad=True)
    result = info_nce_loss(torch.arange(2), similarity, 2, [], temperature=0.05)
    result.losses.sum().backward()
    assert result.losses.tolist() == [0.0, 0.0]
    assert similarity.grad.tolist() == [0.0, 0.0]
    assert result.num_negatives.tolist() == [0, 0]


def test_low_precision_is_computed_in_fp32():
    query, positive, candidate = (vectors(4, seed).detach().bfloat16() for seed in range(3))
    low = row_loss(query, positive, [bank(query, candidate)], temperature=0.02)
    assert low.losses.dtype == torch.float32
    similarity = (query * positive).sum(-1).float()
    logits = torch.cat([similarity[:, None], query.float() @ candidate.float().T], 1) / 0.02
    torch.testing.assert_close(low.losses, torch.logsumexp(logits, 1) - logits[:, 0], rtol=1e-5, atol=1e-5)
