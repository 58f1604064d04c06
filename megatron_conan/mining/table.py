"""The negatives in use, and what replaces them between two minings.

Shapes: `R` rows of the source, `P` pool size, `K` negatives a query.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_conan.data.durable import save_array, sync
from megatron_conan.mining.rules import QueryRule, Rule, SwapRule

FORMAT = 2
REMEDY = "put a whole one back, or go on from an earlier checkpoint: write its name into checkpoints/latest"
ARRAYS = ("pool_ids", "pool_scores", "pointer", "initial_score", "next_candidate", "seen")


@dataclass(frozen=True)
class CorpusFingerprint:
    """What a table's row numbers and text ids refer to."""

    num_rows: int
    num_texts: int
    num_documents: int
    tokenizer_sha256: str
    tokens_sha256: str
    """Of all texts' tokens."""
    rows_sha256: str
    """Of all rows' queries and positives, and the documents."""


class NegativesTable:
    """Every row's pool of candidates and which of them are in use; every rank holds the whole table.

    Attributes:
        pool_ids: [R, P] int64 text ids, best first, -1 behind the last candidate.
        pool_scores: [R, P] float32 score of every candidate when it was mined.
        pointer: [R, K] int32 place in the pool of the negative in use, -1 for an empty slot.
        initial_score: [R, K] float32 S0, the pool score of the negative in use (NaN for an empty slot).
        next_candidate: [R] int32 place in the pool of the next replacement, or of its first candidate (`QueryRule`).
        seen: [R] float32 mean similarity of the row's negatives when it was last in a batch; NaN if it was in none since
            the last test of `QueryRule` (always for `SwapRule`).
        filled: [R] int32 candidates in the pool.
        num_dry: replacements due, but not possible because the row's pool was used up (the negatives stay): one a
            negative (`SwapRule`), one a row (`QueryRule`).
        num_replaced: negatives replaced.
        version: number of the mining that made the pools, from 1.
        step: training step of that mining.
    """

    def __init__(
        self,
        pool_ids: np.ndarray,
        pool_scores: np.ndarray,
        pointer: np.ndarray,
        initial_score: np.ndarray,
        next_candidate: np.ndarray,
        seen: np.ndarray,
        *,
        corpus: CorpusFingerprint,
        version: int = 1,
        step: int = 0,
        num_dry: int = 0,
        num_replaced: int = 0,
        rule: Rule | None = None,
    ) -> None:
        self.pool_ids = pool_ids
        self.pool_scores = pool_scores
        self.pointer = pointer
        self.initial_score = initial_score
        self.next_candidate = next_candidate
        self.seen = seen
        self.filled = _count_filled(pool_ids)
        self.corpus = corpus
        self.version = version
        self.step = step
        self.num_dry = num_dry
        self.num_replaced = num_replaced
        self.rule: Rule = rule or SwapRule()

    @classmethod
    def from_pools(
        cls,
        pool_ids: np.ndarray,
        pool_scores: np.ndarray,
        num_negatives: int,
        *,
        corpus: CorpusFingerprint,
        version: int = 1,
        step: int = 0,
        rule: Rule | None = None,
    ) -> NegativesTable:
        """Start with the first `num_negatives` candidates of every pool ([R, P] ids, -1 padded, and scores)."""
        if pool_ids.shape != pool_scores.shape:
            raise ValueError(f"pool_ids {pool_ids.shape} and pool_scores {pool_scores.shape} must have one shape")
        if not 1 <= num_negatives <= pool_ids.shape[1]:
            raise ValueError(f"num_negatives={num_negatives} must be 1 to the pool size {pool_ids.shape[1]}")
        filled = _count_filled(pool_ids)
        slots = np.arange(num_negatives)
        used = slots < filled[:, None]  # [R, K]
        following = np.full_like(filled, rule.offset) if isinstance(rule, QueryRule) else filled.clip(max=num_negatives)
        return cls(
            np.ascontiguousarray(pool_ids, np.int64),
            np.ascontiguousarray(pool_scores, np.float32),
            np.where(used, slots, -1).astype(np.int32),
            np.where(used, pool_scores[:, :num_negatives], np.nan).astype(np.float32),
            following,
            np.full(len(filled), np.nan, np.float32),
            corpus=corpus,
            version=version,
            step=step,
            rule=rule,
        )

    @property
    def num_negatives(self) -> int:
        """Slots of a row."""
        return self.pointer.shape[1]

    @property
    def dry_rows(self) -> int:
        """Number of rows with a negative in use whose pool doesn't hold another replacement."""
        needed = self.num_negatives if isinstance(self.rule, QueryRule) else 1
        return int(((self.filled > 0) & (self.next_candidate + needed > self.filled)).sum())

    def current(self, rows: np.ndarray) -> np.ndarray:
        """Text ids of the negatives in use: [len(rows), K] int64, -1 for an empty slot."""
        pointer = self.pointer[rows]
        ids = self.pool_ids[np.asarray(rows)[:, None], pointer.clip(min=0)]
        return np.where(pointer >= 0, ids, -1)

    def drift(self, rows: np.ndarray, slots: np.ndarray, similarities: np.ndarray) -> tuple[float, int]:
        """Sum of S - S0 over the given negatives in use, and their number; arguments as for `apply_updates`."""
        rows, slots, scores = self._sorted_in_use(rows, slots, similarities)
        return float((scores - self.initial_score[rows, slots]).sum()), len(rows)

    def apply_updates(self, rows: np.ndarray, slots: np.ndarray, similarities: np.ndarray, *, step: int) -> int:
        """Replace the negatives that the rule says have become easy; in use from the next `current` on.

        `SwapRule` looks at the given negatives, each by itself. `QueryRule` notes the mean over each row's given negatives
        and, every `rule.every` steps, looks at the rows seen since it last did; rows can be empty for just that.
        Every rank must call it with the same values, so that all tables stay alike.

        Args:
            rows, slots: [n] int64, which negatives; entries with slot -1 (not from this table) are passed over.
            similarities: [n] the loss's cosine similarities of these negatives with their queries (S).
            step: number of the optimizer step whose loss this is, from 1.

        The order of the triples doesn't matter: they are taken by (row, slot), and of several for one negative (a row
        twice in a global batch) the one with the lowest similarity counts. Returns the number of negatives replaced.
        """
        rows, slots, scores = self._sorted_in_use(rows, slots, similarities)
        first = _starts_run(rows) | _starts_run(slots)
        rows, slots, scores = rows[first], slots[first], scores[first]
        replaced = 0
        if isinstance(self.rule, SwapRule):
            replaced = self._swap(self.rule, rows, slots, scores)
        else:
            seen, place, count = np.unique(rows, return_inverse=True, return_counts=True)
            self.seen[seen] = np.bincount(place, scores, len(seen)) / count
            if step % self.rule.every == 0:
                replaced = self._replace_seen(self.rule)
        self.num_replaced += replaced
        return replaced

    def content_hash(self) -> str:
        """sha256 over everything that training depends on; equal on all ranks."""
        digest = hashlib.sha256(json.dumps(self._metadata(), sort_keys=True).encode())
        for name in ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the table to `folder` (one rank calls): all of it under another name first, then renamed."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
        for leftover in (draft, old):  # of a process that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
        draft.mkdir()
        for name in ARRAYS:
            save_array(draft / f"{name}.npy", getattr(self, name))
        (draft / "table.json").write_text(json.dumps(self._metadata(), indent=2) + "\n")
        for file in draft.iterdir():
            sync(file)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path, corpus: CorpusFingerprint, rule: Rule | None = None) -> NegativesTable:
        """Read a saved table. Raises ValueError where it is missing, damaged or of another corpus than `corpus`."""
        folder = Path(folder)
        metadata = _read(folder / "table.json", lambda file: json.loads(file.read_text()))
        if metadata["format"] != FORMAT:
            raise ValueError(f"{folder} is of format {metadata['format']}; this version reads format {FORMAT}")
        saved = metadata["corpus"]
        differences = [
            f"{name}: {saved.get(name)} in the table, {value} now"
            for name, value in dataclasses.asdict(corpus).items()
            if saved.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"{folder} was mined from other data ({'; '.join(differences)}); train with that data, or start "
                "another run from this one's weights (checkpoint.init_from), which mines anew"
            )
        arrays = {name: _read(folder / f"{name}.npy", partial(np.load, allow_pickle=False)) for name in ARRAYS}
        if any(len(array) != corpus.num_rows for array in arrays.values()):
            lengths = {name: len(array) for name, array in arrays.items()}
            raise ValueError(f"{folder} is damaged: {corpus.num_rows} rows expected, found {lengths}; {REMEDY}")
        state = {name: metadata[name] for name in ("version", "step", "num_dry", "num_replaced")}
        return cls(**arrays, corpus=corpus, rule=rule, **state)

    def _sorted_in_use(
        self, rows: np.ndarray, slots: np.ndarray, similarities: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The triples of negatives in use, sorted by (row, slot, similarity): int64, int64, float64, [n] each."""
        rows, slots = np.asarray(rows, np.int64), np.asarray(slots, np.int64)
        scores = np.asarray(similarities, np.float64)
        if not len(rows) == len(slots) == len(scores):
            raise ValueError(f"{len(rows)} rows, {len(slots)} slots, {len(scores)} similarities must be equally many")
        mined = slots >= 0
        rows, slots, scores = rows[mined], slots[mined], scores[mined]
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self.pointer) or slots.max() >= self.num_negatives):
            raise ValueError(
                f"updates name rows {rows.min()}..{rows.max()} and slots up to {slots.max()}; the table has "
                f"{len(self.pointer)} rows and {self.num_negatives} slots"
            )
        order = np.lexsort((scores, slots, rows))
        order = order[self.pointer[rows[order], slots[order]] >= 0]
        return rows[order], slots[order], scores[order]

    def _swap(self, rule: SwapRule, rows: np.ndarray, slots: np.ndarray, scores: np.ndarray) -> int:
        """Replace single negatives, given in order of (row, slot). Returns how many."""
        due = rule.is_due(self.initial_score[rows, slots], scores)
        rows, slots = rows[due], slots[due]
        # Slots of one row take consecutive candidates, in slot order; rows are sorted, so count from each row's start.
        row_start = np.flatnonzero(_starts_run(rows))
        place = np.arange(len(rows)) - np.repeat(row_start, np.diff(np.append(row_start, len(rows))))
        candidate = self.next_candidate[rows] + place
        left = candidate < self.filled[rows]
        rows, slots, candidate = rows[left], slots[left], candidate[left]
        self.pointer[rows, slots] = candidate
        self.initial_score[rows, slots] = self.pool_scores[rows, candidate]
        np.add.at(self.next_candidate, rows, 1)
        self.num_dry += int((~left).sum())
        return len(rows)

    def _replace_seen(self, rule: QueryRule) -> int:
        """Test all rows seen, replace all negatives of those due, and start over. Returns how many negatives."""
        rows = np.flatnonzero(~np.isnan(self.seen))
        # a row seen has a negative in use, so a mean
        initial = np.asarray(np.nanmean(self.initial_score[rows], axis=1, dtype=np.float64))
        due = rows[rule.is_due(initial, self.seen[rows])]
        candidates = self.next_candidate[due, None] + np.arange(self.num_negatives)  # [due, K]
        left = candidates[:, -1] < self.filled[due]
        due, candidates = due[left], candidates[left]
        self.pointer[due] = candidates
        self.initial_score[due] = self.pool_scores[due[:, None], candidates]
        self.next_candidate[due] += self.num_negatives
        self.num_dry += int((~left).sum())
        self.seen[rows] = np.nan
        return candidates.size

    def _metadata(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "version": self.version,
            "step": self.step,
            "num_dry": self.num_dry,
            "num_replaced": self.num_replaced,
            "corpus": dataclasses.asdict(self.corpus),
        }


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file. Raises ValueError where it is missing or damaged."""
    try:
        return read(file)
    except (OSError, EOFError, ValueError) as error:
        problem = f"is damaged ({error})" if file.exists() else "is missing"
        raise ValueError(f"{file} {problem}; {REMEDY}") from None


def _count_filled(pool_ids: np.ndarray) -> np.ndarray:
    """Candidates of every pool: [R] int32 from [R, P] ids, -1 behind the last."""
    return (pool_ids >= 0).sum(axis=1, dtype=np.int32)


def _starts_run(values: np.ndarray) -> np.ndarray:
    """[n] bool, where a value differs from the one before it; true for the first."""
    starts = np.ones(len(values), bool)
    starts[1:] = values[1:] != values[:-1]
    return starts
