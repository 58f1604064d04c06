"""The negatives in use, and the rule that replaces single ones between two minings.

Shapes: `R` rows of the source, `P` pool size, `K` negatives a query.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FORMAT = 1
ARRAYS = ("pool_ids", "pool_scores", "pointer", "initial_score", "next_candidate")


@dataclass(frozen=True)
class SwapRule:
    """When a negative gives way to the next candidate (Conan-embedding-v2, dynamic hard negatives).

    With S the loss's similarity now and S0 the score with which the negative came in: replaced if S0 < low_score, or
    if drop_ratio x S < S0 and S < high_score.
    """

    low_score: float = 0.4
    drop_ratio: float = 1.2
    high_score: float = 0.7


@dataclass(frozen=True)
class CorpusFingerprint:
    """What a table's row numbers and text ids refer to."""

    num_rows: int
    num_texts: int
    num_documents: int
    tokenizer_sha256: str


class NegativesTable:
    """Every row's pool of candidates and which of them are in use; every rank holds the whole table.

    Attributes:
        pool_ids: [R, P] int64 text ids, best first, -1 behind the last candidate.
        pool_scores: [R, P] float32 score of every candidate when it was mined.
        pointer: [R, K] int32 place in the pool of the negative in use, -1 for an empty slot.
        initial_score: [R, K] float32 S0, the pool score of the negative in use (NaN for an empty slot).
        next_candidate: [R] int32 place in the pool of the next replacement.
        num_dry: replacements due, but not possible because the row's pool was used up (the negative stays).
        num_replaced: replacements made.
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
        *,
        corpus: CorpusFingerprint,
        version: int = 1,
        step: int = 0,
        num_dry: int = 0,
        num_replaced: int = 0,
        rule: SwapRule | None = None,
    ) -> None:
        self.pool_ids = pool_ids
        self.pool_scores = pool_scores
        self.pointer = pointer
        self.initial_score = initial_score
        self.next_candidate = next_candidate
        self.corpus = corpus
        self.version = version
        self.step = step
        self.num_dry = num_dry
        self.num_replaced = num_replaced
        self.rule = rule or SwapRule()

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
        rule: SwapRule | None = None,
    ) -> NegativesTable:
        """Start with the first `num_negatives` candidates of every pool ([R, P] ids, -1 padded, and scores)."""
        if pool_ids.shape != pool_scores.shape:
            raise ValueError(f"pool_ids {pool_ids.shape} and pool_scores {pool_scores.shape} must have one shape")
        if not 1 <= num_negatives <= pool_ids.shape[1]:
            raise ValueError(f"num_negatives={num_negatives} must be 1 to the pool size {pool_ids.shape[1]}")
        filled = (pool_ids >= 0).sum(axis=1)
        slots = np.arange(num_negatives)
        used = slots < filled[:, None]  # [R, K]
        return cls(
            np.ascontiguousarray(pool_ids, np.int64),
            np.ascontiguousarray(pool_scores, np.float32),
            np.where(used, slots, -1).astype(np.int32),
            np.where(used, pool_scores[:, :num_negatives], np.nan).astype(np.float32),
            np.minimum(filled, num_negatives).astype(np.int32),
            corpus=corpus,
            version=version,
            step=step,
            rule=rule,
        )

    @property
    def num_negatives(self) -> int:
        """Slots of a row."""
        return self.pointer.shape[1]

    def current(self, rows: np.ndarray) -> np.ndarray:
        """Text ids of the negatives in use: [len(rows), K] int64, -1 for an empty slot."""
        pointer = self.pointer[rows]
        ids = np.take_along_axis(self.pool_ids[rows], pointer.clip(min=0).astype(np.int64), axis=1)
        return np.where(pointer >= 0, ids, -1)

    def apply_updates(self, rows: np.ndarray, slots: np.ndarray, similarities: np.ndarray) -> int:
        """Replace the negatives that the rule says have become easy; in use from the next `current` on.

        Every rank must call it with the same values, so that all tables stay alike.

        Args:
            rows, slots: [n] int64, which negatives; entries with slot -1 (not from this table) are passed over.
            similarities: [n] the loss's cosine similarities of these negatives with their queries (S).

        The order of the triples doesn't matter: they are taken by (row, slot), and of several for one negative (a row
        twice in a global batch) the one with the lowest similarity counts. Returns the number replaced.
        """
        rows, slots = np.asarray(rows, np.int64), np.asarray(slots, np.int64)
        scores = np.asarray(similarities, np.float64)
        if not len(rows) == len(slots) == len(scores):
            raise ValueError(f"{len(rows)} rows, {len(slots)} slots, {len(scores)} similarities must be equally many")
        mined = slots >= 0
        rows, slots, scores = rows[mined], slots[mined], scores[mined]
        if not len(rows):
            return 0
        if rows.min() < 0 or rows.max() >= len(self.pointer) or slots.max() >= self.num_negatives:
            raise ValueError(
                f"updates name rows {rows.min()}..{rows.max()} and slots up to {slots.max()}; the table has "
                f"{len(self.pointer)} rows and {self.num_negatives} slots"
            )
        order = np.lexsort((scores, slots, rows))
        rows, slots, scores = rows[order], slots[order], scores[order]
        first = np.append(True, (rows[1:] != rows[:-1]) | (slots[1:] != slots[:-1]))
        due = first & (self.pointer[rows, slots] >= 0) & self._is_due(self.initial_score[rows, slots], scores)
        rows, slots = rows[due], slots[due]
        # Slots of one row take consecutive candidates, in slot order; rows are sorted, so count from each row's start.
        row_start = np.flatnonzero(np.append(True, rows[1:] != rows[:-1])) if len(rows) else np.empty(0, np.int64)
        place = np.arange(len(rows)) - np.repeat(row_start, np.diff(np.append(row_start, len(rows))))
        candidate = self.next_candidate[rows] + place
        left = candidate < (self.pool_ids[rows] >= 0).sum(axis=1)
        rows, slots, candidate = rows[left], slots[left], candidate[left]
        self.pointer[rows, slots] = candidate
        self.initial_score[rows, slots] = self.pool_scores[rows, candidate]
        np.add.at(self.next_candidate, rows, 1)
        self.num_dry += int((~left).sum())
        self.num_replaced += len(rows)
        return len(rows)

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
        draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for name in ARRAYS:
            np.save(draft / f"{name}.npy", getattr(self, name))
        (draft / "table.json").write_text(json.dumps(self._metadata(), indent=2) + "\n")
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(old)
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)

    @classmethod
    def load(cls, folder: str | Path, corpus: CorpusFingerprint, rule: SwapRule | None = None) -> NegativesTable:
        """Read a saved table. Raises ValueError where it is missing, damaged or of another corpus than `corpus`."""
        folder = Path(folder)
        if not (folder / "table.json").is_file():
            raise ValueError(f"{folder} holds no negatives table (table.json is missing)")
        metadata = json.loads((folder / "table.json").read_text())
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
                f"{folder} was mined from other data ({'; '.join(differences)}); train with that data, or delete the "
                "folder to mine again"
            )
        arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS}
        if any(len(array) != corpus.num_rows for array in arrays.values()):
            lengths = {name: len(array) for name, array in arrays.items()}
            raise ValueError(f"{folder} is damaged: {corpus.num_rows} rows expected, found {lengths}")
        state = {name: metadata[name] for name in ("version", "step", "num_dry", "num_replaced")}
        return cls(**arrays, corpus=corpus, rule=rule, **state)

    def _is_due(self, initial: np.ndarray, now: np.ndarray) -> np.ndarray:
        rule = self.rule
        initial = initial.astype(np.float64)
        return (initial < rule.low_score) | ((rule.drop_ratio * now < initial) & (now < rule.high_score))

    def _metadata(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "version": self.version,
            "step": self.step,
            "num_dry": self.num_dry,
            "num_replaced": self.num_replaced,
            "corpus": dataclasses.asdict(self.corpus),
        }
