"""Rows to mine, a model with its export, and the command `conan mine` in the processes of the pool."""

from __future__ import annotations

import contextlib
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from gloo_pool import WorkerPool


@dataclass(frozen=True)
class Mined:
    """A model, its export, and rows to mine."""

    run: Path
    export: Path
    inputs: list[Path]
    corpus: list[Path]
    tokenizer: Path

    @property
    def arguments(self) -> list[str]:
        return ["--input", *map(str, self.inputs), "--corpus", *map(str, self.corpus)]

    def rows(self) -> list[dict[str, Any]]:
        return [row for path in self.inputs for row in read_jsonl(path)]

    def documents(self) -> list[str]:
        """All distinct documents."""
        texts = [text for row in self.rows() for text in positives_of(row) + negatives_of(row)]
        texts += [row["text"] for row in read_jsonl(self.corpus[0])] + self.corpus[1].read_text("utf-8").split("\n")
        return list(dict.fromkeys(text for text in texts if text.strip()))

    def positives(self) -> dict[str, list[str]]:
        """All positives of every distinct query."""
        found: dict[str, list[str]] = {}
        for row in self.rows():
            found.setdefault(row["query"], []).extend(positives_of(row))
        return found


def negatives_of(row: dict[str, Any]) -> list[str]:
    """Under either key."""
    return listed(row, "negative") + listed(row, "neg")


def positives_of(row: dict[str, Any]) -> list[str]:
    """Under either key."""
    return listed(row, "positive") + listed(row, "pos")


def listed(row: dict[str, Any], key: str) -> list[str]:
    value = row.get(key) or []
    return value if isinstance(value, list) else [value]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_inputs(folder: Path) -> tuple[list[Path], list[Path]]:
    """Rows in both spellings and with further keys; queries and documents that come again, also in the other file.

    A topic has letters of its own, so that even a model that knows little finds its documents nearer than others.
    """
    rng = random.Random(3)
    topics = ["abc", "def", "ghi", "jkl", "mno", "pab", "cde", "fgh"]

    def words(topic: int) -> str:
        letters = topics[topic % len(topics)]
        return " ".join("".join(rng.choices(letters, k=rng.randint(2, 4))) for _ in range(rng.randint(1, 9)))

    documents = [words(i) for i in range(130)] + ["Größe 北京 ünï", "tab\there\nand there"]
    rows: list[dict[str, Any]] = []
    for i in range(40):
        some = [documents[j] for j in rng.sample(range(i % len(topics), 100, len(topics)), k=2)]
        query = f"{words(i)} {some[0]}"
        if i % 2:
            rows.append({"id": i, "query": query, "pos": some, "neg": rng.sample(documents, k=3)})
        else:
            rows.append({"query": query, "positive": some[0], "meta": {"n": [i, None]}, "title": "é\u2028"})
            rows.append({"query": query, "positive": [some[1]], "negative": documents[i]})
    rows.append({"query": documents[0], "positive": [documents[1], documents[1]], "odd": "\ud800"})
    rows.append({"query": "no negatives", "pos": documents[2], "neg": None})
    half = len(rows) // 2
    inputs = [folder / "first.jsonl", folder / "second.jsonl"]
    for path, part in zip(inputs, (rows[:half] + rows[-2:], rows[half:-2] + rows[:3]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    more = write_jsonl(folder / "more.jsonl", [{"text": text} for text in ["", *documents[90:], documents[91]]])
    lines = folder / "lines.txt"
    lines.write_text("\n".join([words(i) for i in range(10)] + ["", documents[95]]) + "\n", encoding="utf-8")
    return inputs, [more, lines]


@dataclass(frozen=True)
class Outcome:
    """How the command ended."""

    code: int
    stdout: str
    stderr: str
    num_embedded: int
    """Texts that a trained run embedded."""


def command_here(*commands: list[str]) -> list[Outcome]:
    """`conan mine` in this process of the pool, once for each list of arguments."""
    from megatron_conan.cli import main
    from megatron_conan.export.trained import TrainedRun

    outcomes = []
    with mock.patch("megatron_conan.parallel.context.destroy_context"):  # the pool's group serves all commands
        for arguments in commands:
            out, err, embed, counts = io.StringIO(), io.StringIO(), TrainedRun.embed_packed, []

            def counting(run: Any, batches: Any, embed: Any = embed, counts: list[int] = counts) -> Any:
                counts += [len(batch.prompt_lengths) for batch in batches]
                return embed(run, batches)

            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                mock.patch.object(TrainedRun, "embed_packed", counting),
            ):
                code = main(["mine", *arguments])
            outcomes.append(Outcome(code, out.getvalue(), err.getvalue(), sum(counts)))
    return outcomes


def command(workers: WorkerPool, *commands: list[str], world_size: int = 1) -> list[Outcome]:
    """The same from outside; rank 0's outcomes, all successful."""
    outcomes = workers.run(command_here, world_size, *commands)
    assert all(outcome.code == 0 for rank in outcomes for outcome in rank), outcomes
    assert all(outcome.stdout == "" for rank in outcomes[1:] for outcome in rank)
    return outcomes[0]
