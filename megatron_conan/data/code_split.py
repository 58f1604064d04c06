"""Divide documented functions into training and held-out ones without a leak, and choose the test queries.

The side of a function is that of its file. What repeats a held-out function (the same words, long shared passages, a
test query word for word) leaves the training side: large packages copy functions from file to file.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_conan.data.code_functions import STDLIB, CodeFunction, stable_fraction
from megatron_conan.data.near_duplicates import WordSequences, contains_whole, near_duplicates, shared_run_share

WORD_SET_THRESHOLD = 0.8  # Jaccard similarity from which two texts count as the same
SHARED_RUN_WORDS = 12
SHARED_RUN_THRESHOLD = 0.2  # share of a training function's 12-word runs that may occur in held-out files
MIN_PHRASE_WORDS = 6  # a test query this long must not occur word for word in training text


@dataclass(frozen=True)
class CodeSplit:
    """Functions for training and for evaluation; all lists are in the order of the input."""

    training: list[CodeFunction]
    held_out: list[CodeFunction]  # the evaluation corpus
    test_queries: list[CodeFunction]  # those of `held_out` whose first sentence is asked
    num_duplicates: int
    num_near_duplicates: int


def split_functions(functions: Sequence[CodeFunction], num_queries: int) -> CodeSplit:
    """Split usable functions by their files and clean the training side.

    Args:
        functions: usable functions (`CodeFunction.usable`) in a deterministic order; of duplicates the first stays.
        num_queries: test queries from the standard library, and as many from the other packages.
    """
    seen: tuple[set[frozenset[str]], set[frozenset[str]]] = (set(), set())
    held_out = _first_of_each(seen, (f for f in functions if f.held_out))
    training = _first_of_each(seen, (f for f in functions if not f.held_out))
    queries = _choose_queries(held_out, num_queries)
    repeats = _repeats_held_out(training, held_out, queries)
    kept = [function for function, repeated in zip(training, repeats, strict=True) if not repeated]
    return CodeSplit(
        training=kept,
        held_out=held_out,
        test_queries=queries,
        num_duplicates=len(functions) - len(held_out) - len(training),
        num_near_duplicates=len(training) - len(kept),
    )


def _first_of_each(
    seen: tuple[set[frozenset[str]], set[frozenset[str]]], functions: Iterable[CodeFunction]
) -> list[CodeFunction]:
    """Functions whose words of code and whose words of query were both not `seen` yet; adds theirs."""
    kept = []
    for function in functions:
        code, query = frozenset(function.prepared_code.split()), frozenset(function.prepared_query.split())
        if code not in seen[0] and query not in seen[1]:
            kept.append(function)
            seen[0].add(code)
            seen[1].add(query)
    return kept


def _choose_queries(held_out: Sequence[CodeFunction], num_queries: int) -> list[CodeFunction]:
    chosen: set[str] = set()
    for stdlib in (True, False):
        side = [f for f in held_out if (f.package == STDLIB) == stdlib]
        side.sort(key=lambda f: (stable_fraction("query", f.name), f.name, f.line))
        chosen.update(f"{f.file}:{f.line}" for f in side[:num_queries])
    return [f for f in held_out if f"{f.file}:{f.line}" in chosen]


def _repeats_held_out(
    training: Sequence[CodeFunction], held_out: Sequence[CodeFunction], queries: Sequence[CodeFunction]
) -> np.ndarray:
    """bool [training]: the function repeats a held-out one, or contains a test query."""
    repeats = near_duplicates(
        [f.prepared_code for f in training], [f.prepared_code for f in held_out], WORD_SET_THRESHOLD
    )
    repeats |= near_duplicates(
        [f.prepared_query for f in training], [f.prepared_query for f in held_out], WORD_SET_THRESHOLD
    )
    whole = WordSequences(f"{f.docstring}\n{f.code}" for f in training)
    held_out_texts = WordSequences(f"{f.docstring}\n{f.code}" for f in held_out)
    repeats |= shared_run_share(whole, held_out_texts, SHARED_RUN_WORDS) >= SHARED_RUN_THRESHOLD
    repeats |= contains_whole(whole, WordSequences(f.query for f in queries), MIN_PHRASE_WORDS)
    return repeats
