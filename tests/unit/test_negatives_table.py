"""The rule for single negatives against a step-by-step transcription of the paper's sentence, and the table's files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_conan.mining.rules import SwapRule
from megatron_conan.mining.table import CorpusFingerprint, NegativesTable

CORPUS = CorpusFingerprint(
    num_rows=3, num_texts=50, num_documents=40, tokenizer_sha256="a" * 64, tokens_sha256="b" * 64, rows_sha256="c" * 64
)


class PlainRow:
    """One query's negatives: a list in use, their S0, and what is left of the pool."""

    def __init__(self, pool: list[tuple[int, float]], num_negatives: int) -> None:
        self.in_use = pool[:num_negatives]
        self.left = pool[num_negatives:]
        self.num_dry = 0

    def step(self, similarities: dict[int, float]) -> int:
        replaced = 0
        for slot in sorted(similarities):
            if slot >= len(self.in_use):
                continue
            now, initial = similarities[slot], self.in_use[slot][1]
            if initial < 0.4 or (1.2 * now < initial and now < 0.7):
                if self.left:
                    self.in_use[slot] = self.left.pop(0)
                    replaced += 1
                else:
                    self.num_dry += 1
        return replaced


# Scores in steps of 1/16 around the thresholds; as float32 they are exact.
score_values = st.integers(-4, 16).map(lambda n: n / 16)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_rule_equals_the_plain_transcription(data: st.DataObject) -> None:
    num_rows, pool_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    num_negatives = data.draw(st.integers(1, pool_size))
    pool_ids = np.full((num_rows, pool_size), -1, np.int64)
    pool_scores = np.full((num_rows, pool_size), -np.inf, np.float32)
    plain = []
    for row in range(num_rows):
        scores = sorted(data.draw(st.lists(score_values, max_size=pool_size)), reverse=True)
        pool = [(100 * row + i, score) for i, score in enumerate(scores)]
        pool_ids[row, : len(pool)] = [i for i, _ in pool]
        pool_scores[row, : len(pool)] = scores
        plain.append(PlainRow(pool, num_negatives))
    corpus = CorpusFingerprint(num_rows, 1000, 1000, "x", "y", "z")
    table = NegativesTable.from_pools(pool_ids, pool_scores, num_negatives, corpus=corpus)
    for _ in range(data.draw(st.integers(1, 5))):
        rows = data.draw(st.lists(st.integers(0, num_rows - 1), unique=True))
        seen = {row: {s: data.draw(score_values) for s in range(num_negatives)} for row in rows}
        triples = [(row, slot, value) for row in rows for slot, value in seen[row].items()]
        triples += [(0, -1, 0.0)]  # a negative of the file: not this table's business
        shuffled = data.draw(st.permutations(triples))
        replaced = table.apply_updates(*(np.array(column) for column in zip(*shuffled, strict=True)), step=1)
        assert replaced == sum(plain[row].step(seen[row]) for row in rows)
        current = table.current(np.arange(num_rows))
        for row in range(num_rows):
            in_use = plain[row].in_use
            assert current[row, : len(in_use)].tolist() == [i for i, _ in in_use]
            assert (current[row, len(in_use) :] == -1).all()
            assert table.initial_score[row, : len(in_use)].tolist() == [score for _, score in in_use]
        assert table.num_dry == sum(row.num_dry for row in plain)


def small_table() -> NegativesTable:
    pool_ids = np.array([[1, 2, 3, 4], [5, 6, 7, -1], [8, -1, -1, -1]])
    pool_scores = np.array(
        [[0.875, 0.75, 0.75, 0.625], [0.5, 0.25, 0.125, -np.inf], [0.875, -np.inf, -np.inf, -np.inf]]
    )
    return NegativesTable.from_pools(pool_ids, pool_scores, 2, corpus=CORPUS, version=3, step=40)


def test_thresholds_one_by_one() -> None:
    table = small_table()
    # 1.2 x 0.75 = 0.9 is not below 0.875; and 0.71875 is below 0.875 / 1.2 but not below 0.7.
    assert table.apply_updates(np.array([0, 0]), np.array([0, 0]), np.array([0.75, 0.75]), step=1) == 0
    assert table.apply_updates(np.array([0]), np.array([0]), np.array([0.71875]), step=1) == 0
    assert table.apply_updates(np.array([0]), np.array([0]), np.array([0.6875]), step=1) == 1
    assert table.current(np.array([0])).tolist() == [[3, 2]]
    # In with 0.25 < 0.4: replaced though its similarity is high; the replacement came in with 0.125, then it is dry.
    assert table.apply_updates(np.array([1]), np.array([1]), np.array([0.9]), step=1) == 1
    assert table.current(np.array([1])).tolist() == [[5, 7]]
    assert table.apply_updates(np.array([1]), np.array([1]), np.array([0.9]), step=1) == 0
    assert (table.num_dry, table.num_replaced) == (1, 2)
    assert table.current(np.array([2, 1])).tolist() == [[8, -1], [5, 7]]
    assert table.apply_updates(np.array([2]), np.array([1]), np.array([-1.0]), step=1) == 0  # an empty slot stays empty


def test_own_thresholds() -> None:
    strict = small_table()
    strict.rule = SwapRule(low_score=0.0, drop_ratio=2.0, high_score=0.3)
    assert strict.apply_updates(np.array([1, 0]), np.array([1, 0]), np.array([0.25, 0.375]), step=1) == 0
    assert strict.apply_updates(np.array([0]), np.array([0]), np.array([0.25]), step=1) == 1


def test_a_row_twice_in_a_batch_is_replaced_once_by_its_lowest_similarity() -> None:
    for similarities in ([0.5, 0.8], [0.8, 0.5]):
        table = small_table()
        assert table.apply_updates(np.array([0, 0]), np.array([0, 0]), np.array(similarities), step=1) == 1
        assert table.current(np.array([0])).tolist() == [[3, 2]]


def test_updates_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="table has 3 rows and 2 slots"):
        small_table().apply_updates(np.array([0]), np.array([2]), np.array([0.5]), step=1)
    with pytest.raises(ValueError, match="2 rows, 2 slots, 1 similarities must be equally many"):
        small_table().apply_updates(np.array([0, 1]), np.array([0, 0]), np.array([0.5]), step=1)
    with pytest.raises(ValueError, match="num_negatives=5"):
        NegativesTable.from_pools(np.zeros((3, 4), int), np.zeros((3, 4)), 5, corpus=CORPUS)


def test_save_and_load(tmp_path: Path) -> None:
    table = small_table()
    folder = tmp_path / "negatives" / "step_40"
    table.save(folder)
    table.apply_updates(np.array([0]), np.array([0]), np.array([0.1]), step=1)
    table.save(folder)  # over the older one
    loaded = NegativesTable.load(folder, CORPUS)
    assert loaded.content_hash() == table.content_hash() != small_table().content_hash()
    assert (loaded.version, loaded.step, loaded.num_replaced) == (3, 40, 1)
    assert [path.name for path in folder.parent.iterdir()] == ["step_40"]
    update = (np.array([0, 1]), np.array([0, 1]), np.array([0.1, 0.1]))
    assert loaded.apply_updates(*update, step=1) == table.apply_updates(*update, step=1) == 2
    assert loaded.content_hash() == table.content_hash()


def test_load_refuses_other_data_and_names_the_difference(tmp_path: Path) -> None:
    small_table().save(tmp_path / "table")
    other = replace(CORPUS, num_texts=51, tokenizer_sha256="b" * 64, rows_sha256="d" * 64)
    with pytest.raises(ValueError, match=r"num_texts: 50 in the table, 51 now; tokenizer_sha256: a{64} in the table"):
        NegativesTable.load(tmp_path / "table", other)
    with pytest.raises(ValueError, match=r"table\.json is missing"):
        NegativesTable.load(tmp_path / "nothing", CORPUS)
    metadata = tmp_path / "table" / "table.json"
    text = metadata.read_text()
    metadata.write_text(text.replace('"format": 2', '"format": 1'))
    with pytest.raises(ValueError, match="is of format 1; this version reads format 2"):
        NegativesTable.load(tmp_path / "table", CORPUS)
    metadata.write_text(text)
    np.save(tmp_path / "table" / "pointer.npy", np.zeros((2, 2), np.int32))
    with pytest.raises(ValueError, match="damaged: 3 rows expected"):
        NegativesTable.load(tmp_path / "table", CORPUS)
