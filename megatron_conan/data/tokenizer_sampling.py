"""A sample of a corpus to train a tokenizer on, with chosen shares of its languages.

A language is what rows say under a key, else the file's name. Documents are drawn at a rate of their language's own; where it
is above 1 they come more than once. The sample depends on the files and the seed, not on the number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_conan.data.command_line import Progress
from megatron_conan.data.documents import DocumentFormat
from megatron_conan.data.passes import Inputs
from megatron_conan.data.process_map import process_map
from megatron_conan.data.text_files import Chunk, Fault, Record, cut_into_chunks, fault_error, parse_records
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import training_lines

FERTILITY_CHARACTERS = 1 << 20
"""Text of each language that fertility is measured on."""


@dataclass(frozen=True)
class SampleTask:
    """A chunk to count, or, with rates, to draw from."""

    chunk: Chunk
    source: DocumentFormat
    rates: Mapping[str, float] | None
    seed: int


@dataclass(frozen=True)
class SampledChunk:
    """What was found, and drawn."""

    chunk: Chunk
    lines: int
    faults: list[Fault]
    characters: Counter[str]
    """By language, of all documents of the chunk or of those drawn."""
    texts: list[tuple[str, str]]
    """(language, document) of those drawn."""


def sample_chunk(task: SampleTask) -> SampledChunk:
    """Count the characters of a chunk by language, or draw from it."""
    faults: list[Fault] = []
    lines = [0]
    characters: Counter[str] = Counter()
    drawn: list[tuple[str, str]] = []
    draws = np.random.Generator(np.random.PCG64([task.seed, *task.chunk.key]))

    def parse(record: Record) -> tuple[str, list[str]] | None:
        texts = task.source.texts(task.chunk.file, record)
        return None if texts is None else (task.source.language(task.chunk.file, record), texts)

    columns = task.source.columns
    for language, texts in parse_records(task.chunk, parse, faults, stop_at_fault=True, columns=columns, count=lines):
        for text in texts:
            rate = 1.0 if task.rates is None else task.rates.get(language, 1.0)
            copies = int(rate + draws.random())  # the floor, or one more with the chance of the rest
            characters[language] += copies * len(text)
            if task.rates is not None:
                drawn += [(language, text)] * copies
    chunk = task.chunk
    kept = Chunk(chunk.file, chunk.file_number, chunk.number, chunk.start, chunk.end, chunk.work)  # without the text
    return SampledChunk(kept, lines[0], faults, characters, drawn)


class Corpus:
    """Documents of some files with their languages.

    Args:
        inputs: the files.
        source: what a document is; names the key of its language.
        num_workers: processes that read.
    """

    def __init__(self, inputs: Inputs, source: DocumentFormat, num_workers: int = 1) -> None:
        self.inputs, self.source, self.num_workers = inputs, source, num_workers

    def characters(self) -> dict[str, int]:
        """Characters of each language, in order of first appearance. Raises ValueError with file and line."""
        total: Counter[str] = Counter()
        for result in self._read("counting", None, 0):
            total.update(result.characters)
        return dict(total)

    def draw(self, rates: Mapping[str, float], seed: int) -> Iterator[tuple[str, str]]:
        """(language, document), in the order of the files. Raises ValueError for a bad line, with file and line."""
        for result in self._read("sampling", rates, seed):
            yield from result.texts

    def _read(self, label: str, rates: Mapping[str, float] | None, seed: int) -> Iterator[SampledChunk]:
        files = self.inputs.files
        progress = Progress(label, sum(file.path.stat().st_size for file in files), "characters", is_bytes=True)
        tasks = (SampleTask(chunk, self.source, rates, seed) for chunk in cut_into_chunks(files, self.inputs.size))
        file_number, before = -1, 0
        for result in process_map(sample_chunk, tasks, self.num_workers):
            if result.chunk.file_number != file_number:
                file_number, before = result.chunk.file_number, 0
            for fault in result.faults:
                raise fault_error(result.chunk.file, before, fault)
            before += result.lines
            progress.advance(result.chunk.work, sum(result.characters.values()))
            yield result
        progress.finish()


def language_shares(
    characters: Mapping[str, int], weights: Mapping[str, float] | None = None, temperature: float = 1.0
) -> dict[str, float]:
    """Share of each language in the sample, summing to 1.

    Args:
        characters: what there is of each.
        weights: what is wanted of some; the others share what is left of 1 by characters^(1 / temperature). Weights that
            reach 1 or more leave nothing: then all languages must be named, and are taken in proportion.
        temperature: 1 is as found, larger values closer to alike.

    Raises:
        ValueError: an unknown language, a weight or temperature that is not positive, languages left without a share.
    """
    weights = dict(weights or {})
    found = {language: number for language, number in characters.items() if number}
    unknown = [language for language in weights if language not in found]
    if unknown:
        raise ValueError(
            f"language {unknown[0]!r} has a weight, but no text; there are {', '.join(sorted(found)) or 'none'}"
        )
    if temperature <= 0 or any(not 0 < weight < np.inf for weight in weights.values()):
        raise ValueError(f"language weights {weights} and temperature={temperature} must be positive")
    others = {language: number ** (1 / temperature) for language, number in found.items() if language not in weights}
    left = 1.0 - sum(weights.values())
    if others and left <= 1e-9:
        raise ValueError(
            f"the language weights sum to {1 - left:g} and leave nothing for {', '.join(sorted(others))}; lower them, or give "
            "those a weight too"
        )
    shares = {**weights, **{language: left * part / sum(others.values()) for language, part in others.items()}}
    total = sum(shares.values())
    return {language: shares[language] / total for language in found}


def sampling_rates(characters: Mapping[str, int], shares: Mapping[str, float], budget: int | None) -> dict[str, float]:
    """How often each document of a language is drawn, for about `budget` characters; None: as many as there are."""
    total = sum(characters.values()) if budget is None else budget
    rates = dict.fromkeys(characters, 0.0)
    return rates | {language: share * total / characters[language] for language, share in shares.items()}


class FertilityText:
    """Collects some text of each language while a sample goes by."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}
        self.documents: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self._held: Counter[str] = Counter()

    def add(self, language: str, text: str) -> None:
        """Take note of a document of the sample."""
        self.documents[language] += 1
        self.characters[language] += len(text)
        if self._held[language] < FERTILITY_CHARACTERS:
            kept = text[: FERTILITY_CHARACTERS - self._held[language]]
            self.texts.setdefault(language, []).append(kept)
            self._held[language] += len(kept)

    def report(self, tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
        """By language: what the sample held, and how many tokens its text takes.

        `tokens_per_word` counts words between white space, so says little of Chinese or Japanese; `characters_per_token`
        and `bytes_per_token` can be compared over languages; `byte_tokens` is the share of tokens that stand for single
        bytes of characters without a piece.
        """
        byte_ids = {
            number for number, piece in enumerate(tokenizer.pieces()) if piece.startswith("<0x") and len(piece) == 6
        }
        found = {}
        for language, texts in self.texts.items():
            ids = [number for sequence in tokenizer.encode_batch(texts) for number in sequence]
            words = sum(len(text.split()) for text in texts)
            size = sum(map(len, texts))
            found[language] = {
                "documents": self.documents[language],
                "characters": self.characters[language],
                "share": round(self.characters[language] / max(self.characters.total(), 1), 4),
                "tokens_per_word": round(len(ids) / max(words, 1), 3),
                "characters_per_token": round(size / max(len(ids), 1), 3),
                "bytes_per_token": round(sum(len(text.encode()) for text in texts) / max(len(ids), 1), 3),
                "byte_tokens": round(sum(number in byte_ids for number in ids) / max(len(ids), 1), 4),
            }
        return found


def write_sample(path: Path, documents: Iterator[tuple[str, str]], fertility: FertilityText) -> int:
    """Write the lines that the trainer reads, and note them for the report. Returns how many."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for language, text in documents:
            fertility.add(language, text)
            for line in training_lines(text):
                file.write(line + "\n")
                count += 1
    return count


def parse_weights(words: Sequence[str]) -> dict[str, float]:
    """`en=.5 zh=.3` as numbers. Raises ValueError."""
    weights: dict[str, float] = {}
    for word in words:
        language, _, number = word.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not language or not 0 < weight < float("inf") or language in weights:
            raise ValueError(f"{word!r}: a weight is written LANGUAGE=NUMBER, above 0 and once a language, e.g. en=.5")
        weights[language] = weight
    return weights
