"""Both replacement rules against plain transcriptions of the papers' sentences, over random sequences of batches."""

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_conan.mining.rules import QueryRule, Rule, SwapRule
from megatron_conan.mining.table import CorpusFingerprint, NegativesTable

Triple = tuple[int, int, float]
"""Row, slot, similarity."""
GRID = [3 * i / 64 for i in range(-21, 22)]
"""Scores and similarities: sums and means of up to four are exact, and many lie right on a threshold."""


class PlainQuery:
    """One query: its ranked pool of scores, and places in the pool and S0 of the negatives in use."""

    def __init__(self, pool: list[float], num_negatives: int) -> None:
        self.pool = pool
        self.take(list(range(min(num_negatives, len(pool)))))
        self.times_replaced = 0

    def take(self, places: list[int]) -> None:
        self.places = places
        self.initial = [self.pool[place] for place in places]


class PlainTable:
    """The rules as their papers say them, query by query; `events` counts what happened."""

    def __init__(self, rule: Rule, pools: list[list[float]], num_negatives: int) -> None:
        self.rule, self.num_negatives = rule, num_negatives
        self.queries = [PlainQuery(pool, num_negatives) for pool in pools]
        self.last_mean: dict[int, float] = {}
        self.events: Counter[str] = Counter()

    def in_use(self, batch: list[Triple]) -> list[Triple]:
        return [triple for triple in batch if 0 <= triple[1] < len(self.queries[triple[0]].places)]

    def drift(self, batch: list[Triple]) -> tuple[float, int]:
        differences = [now - self.queries[row].initial[slot] for row, slot, now in self.in_use(batch)]
        return sum(differences), len(differences)

    def update(self, batch: list[Triple], step: int) -> None:
        lowest: dict[tuple[int, int], float] = {}
        for row, slot, now in self.in_use(batch):
            lowest[row, slot] = min(now, lowest.get((row, slot), math.inf))
        if isinstance(self.rule, SwapRule):
            self.swap(self.rule, lowest)
            return
        of_row: dict[int, list[float]] = {}
        for (row, _), now in lowest.items():
            of_row.setdefault(row, []).append(now)
        self.last_mean |= {row: sum(values) / len(values) for row, values in of_row.items()}
        if step % self.rule.every == 0:
            self.test_all(self.rule)
            self.last_mean = {}

    def swap(self, rule: SwapRule, lowest: dict[tuple[int, int], float]) -> None:
        for row, slot in sorted(lowest):
            query, now = self.queries[row], lowest[row, slot]
            initial = query.initial[slot]
            if initial < rule.low_score or (rule.drop_ratio * now < initial and now < rule.high_score):
                place = self.num_negatives + query.times_replaced
                if place < len(query.pool):
                    query.places[slot], query.initial[slot] = place, query.pool[place]
                    query.times_replaced += 1
                    self.events["replaced"] += 1
                else:
                    self.events["dry"] += 1
            else:
                self.events["kept"] += 1

    def test_all(self, rule: QueryRule) -> None:
        n = self.num_negatives
        for row, now in self.last_mean.items():
            query = self.queries[row]
            initial = sum(query.initial) / len(query.initial)
            if rule.drop_ratio * now < initial and abs(now) < rule.high_score:
                i = query.times_replaced + 1
                candidates = list(range((i - 1) * n + rule.offset, i * n + rule.offset))
                if candidates[-1] < len(query.pool):
                    query.take(candidates)
                    query.times_replaced += 1
                    self.events["replaced"] += n
                else:
                    self.events["dry"] += 1
            else:
                self.events["kept"] += 1

    def next_candidate(self, query: PlainQuery) -> int:
        if isinstance(self.rule, QueryRule):
            return self.rule.offset + query.times_replaced * self.num_negatives
        return len(query.places) + query.times_replaced

    def dry_rows(self) -> int:
        block = self.num_negatives if isinstance(self.rule, QueryRule) else 1
        return sum(
            len(query.places) > 0 and self.next_candidate(query) + block > len(query.pool) for query in self.queries
        )


def make_table(rule: Rule | None, pools: list[list[float]], num_negatives: int) -> NegativesTable:
    """A table of these pools of scores; candidate p of row r has the id 1000 r + p."""
    size = max(num_negatives, *map(len, pools))
    ids, scores = np.full((len(pools), size), -1, np.int64), np.full((len(pools), size), -np.inf, np.float32)
    for row, pool in enumerate(pools):
        ids[row, : len(pool)] = 1000 * row + np.arange(len(pool))
        scores[row, : len(pool)] = pool
    corpus = CorpusFingerprint(len(pools), 10**6, 10**6, "x", "y", "z")
    return NegativesTable.from_pools(ids, scores, num_negatives, corpus=corpus, rule=rule)


def arrays(batch: list[Triple]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, slots, values = zip(*batch, strict=True) if batch else ((), (), ())
    return np.array(rows, np.int64), np.array(slots, np.int64), np.array(values, np.float32)


def assert_equal(table: NegativesTable, plain: PlainTable) -> None:
    current = table.current(np.arange(len(plain.queries)))
    for row, query in enumerate(plain.queries):
        used, empty = query.places, [-1] * (table.num_negatives - len(query.places))
        assert table.pointer[row].tolist() == used + empty
        assert current[row].tolist() == [1000 * row + place for place in used] + empty
        assert table.initial_score[row, : len(used)].tolist() == query.initial
        assert np.isnan(table.initial_score[row, len(used) :]).all()
        assert table.next_candidate[row] == plain.next_candidate(query)
        assert table.seen[row] == plain.last_mean[row] if row in plain.last_mean else np.isnan(table.seen[row])
    assert (table.num_replaced, table.num_dry) == (plain.events["replaced"], plain.events["dry"])
    assert table.dry_rows == plain.dry_rows()


def random_pools(rng: random.Random, num_rows: int, size: int) -> list[list[float]]:
    """An empty and a full one, the others anything between."""
    sizes = [0, size, *(rng.randint(0, size) for _ in range(num_rows - 2))]
    return [sorted((rng.choice(GRID[12:]) for _ in range(size)), reverse=True) for size in sizes]


def random_batch(rng: random.Random, num_rows: int, num_negatives: int) -> list[Triple]:
    """Rows, some of them twice, with all or some of their slots, used or empty; and negatives of the file (slot -1)."""
    batch = [(rng.randrange(num_rows), -1, rng.choice(GRID))]
    for _ in range(rng.randint(0, num_rows // 2)):
        row, some = rng.randrange(num_rows), rng.random() < 0.3
        slots = [slot for slot in range(num_negatives) if not some or rng.random() < 0.5]
        level = rng.randint(0, 2 * len(GRID) // 3)  # so that means are spread as widely as single similarities
        batch += [(row, slot, GRID[level + rng.randint(0, len(GRID) // 3)]) for slot in slots]
    rng.shuffle(batch)
    return batch


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_negatives", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "rule",
    [
        SwapRule(),
        SwapRule(low_score=0.09375, drop_ratio=1.25, high_score=0.46875),
        QueryRule(every=3),
        QueryRule(drop_ratio=1.25, high_score=0.46875, every=1, offset=2),
        QueryRule(drop_ratio=1.5, high_score=0.75, every=5, offset=0),
    ],
    ids=["v2", "v2 on its thresholds", "v1", "v1 on its thresholds", "v1 from the first candidate"],
)
def test_rules_equal_the_plain_transcription(rule: Rule, num_negatives: int, seed: int) -> None:
    rng = random.Random(f"{rule} {num_negatives} {seed}")
    pools = random_pools(rng, 32, 10 + 4 * num_negatives)
    table, plain = make_table(rule, pools, num_negatives), PlainTable(rule, pools, num_negatives)
    assert_equal(table, plain)
    for step in range(1, 81):
        batch = random_batch(rng, len(pools), num_negatives)
        assert table.drift(*arrays(batch)) == plain.drift(batch)
        before = plain.events["replaced"]
        replaced = table.apply_updates(*arrays(batch), step=step)
        plain.update(batch, step)
        assert replaced == plain.events["replaced"] - before
        assert_equal(table, plain)
    assert min(plain.events[name] for name in ("replaced", "dry", "kept")) >= 5, plain.events


def test_published_numbers_of_the_query_rule() -> None:
    table = make_table(QueryRule(), [[0.875] * 10 + [0.5] * 2 + [0.75] * 2 + [0.25]], 2)

    def update(step: int, *similarities: float) -> list[int]:
        batch = [(0, slot, value) for slot, value in enumerate(similarities)]
        table.apply_updates(*arrays(batch), step=step)
        return table.pointer[0].tolist()

    assert update(50, 0.125, 0.25) == [0, 1]  # nothing before step 100, where the last sight counts:
    assert update(100, 0.53125, 1.0) == [0, 1]  # 1.15 x 0.765625 isn't below S0 = 0.875
    assert update(200, 0.5, 1.0) == [10, 11]  # 1.15 x 0.75 is, and 0.75 < 0.8, though not both similarities are
    assert update(300, 0.375, 0.5) == [10, 11]  # S0 is 0.5 now, and 1.15 x 0.4375 isn't below it
    assert update(400, 0.25, 0.5) == [12, 13]
    assert update(500, -0.875, -0.75) == [12, 13]  # |S| isn't below 0.8
    assert (table.num_replaced, table.num_dry, table.dry_rows) == (4, 0, 1)
    assert update(599, -0.75, -0.75) == update(600) == [12, 13]  # due, but place 15 is beyond the pool
    assert update(700) == [12, 13]  # not seen since the last test, so not due again
    assert (table.num_replaced, table.num_dry) == (4, 1)


@pytest.mark.parametrize(("rule", "now"), [(SwapRule(), 0.5), (QueryRule(), 0.4375)], ids=["v2", "v1"])
def test_rules_are_computed_in_float64(rule: Rule, now: float) -> None:
    initial = np.array([rule.drop_ratio * now], np.float32)  # rounded up
    assert not np.float32(rule.drop_ratio) * np.float32(now) < initial[0]
    assert rule.is_due(initial, np.array([now], np.float32)).tolist() == [True]


@pytest.mark.parametrize("rule", [SwapRule(), QueryRule(every=4, offset=2)], ids=["v2", "v1"])
def test_the_order_of_the_triples_does_not_matter(rule: Rule) -> None:
    rng = random.Random(5)
    pools = [sorted((rng.uniform(-0.5, 1) for _ in range(16)), reverse=True) for _ in range(12)]
    tables = [make_table(rule, pools, 3) for _ in range(2)]
    for step in range(1, 21):
        batch = [(rng.randrange(12), rng.randint(-1, 2), rng.uniform(-0.5, 0.9)) for _ in range(40)]
        orders = [rng.sample(batch, len(batch)) for _ in tables]
        assert len({table.drift(*arrays(order)) for table, order in zip(tables, orders, strict=True)}) == 1
        for table, order in zip(tables, orders, strict=True):
            table.apply_updates(*arrays(order), step=step)
        assert tables[0].content_hash() == tables[1].content_hash()
    assert tables[0].num_replaced > 0


def test_a_period_of_the_query_rule_goes_on_after_loading(tmp_path: Path) -> None:
    rng = random.Random(6)
    rule, pools = QueryRule(every=8, offset=2), [[0.9 - 0.01 * i for i in range(12)] for _ in range(10)]
    table = make_table(rule, pools, 2)
    for step in range(1, 14):
        table.apply_updates(*arrays([(rng.randrange(10), slot, rng.uniform(0, 0.9)) for slot in (0, 1)]), step=step)
    assert 0 < np.isnan(table.seen).sum() < 10
    table.save(tmp_path / "table")
    loaded = NegativesTable.load(tmp_path / "table", table.corpus, rule)
    assert loaded.content_hash() == table.content_hash()
    nothing = arrays([])
    replaced = [part.apply_updates(*nothing, step=step) for step in (14, 16, 24) for part in (table, loaded)]
    assert replaced[0] == replaced[1] == 0 < replaced[2] == replaced[3]
    assert replaced[4] == replaced[5] == 0
    assert loaded.content_hash() == table.content_hash()


def test_updates_that_do_not_fit_the_table_are_refused() -> None:
    table = make_table(QueryRule(), [[0.5, 0.25]] * 3, 2)
    before = table.content_hash()
    for rows, slots, message in (
        ([3], [0], "updates name rows 3..3 and slots up to 0; the table has 3 rows and 2 slots"),
        ([-1, 1], [0, 1], "updates name rows -1..1"),
        ([0], [2], "slots up to 2"),
        ([0, 1], [0], "2 rows, 1 slots, 1 similarities must be equally many"),
    ):
        triples = np.array(rows), np.array(slots), np.zeros(len(slots))
        with pytest.raises(ValueError, match=message):
            table.apply_updates(*triples, step=100)
        with pytest.raises(ValueError, match=message):
            table.drift(*triples)
    with pytest.raises(TypeError, match="step"):
        table.apply_updates(*arrays([]))  # type: ignore[call-arg]
    assert table.content_hash() == before
