"""Small real data for the training tests: made by the project's own tools from generated text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _words(rng: random.Random, low: int, high: int) -> str:
    letters = "abcdefghijklmnop"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(rng.randint(low, high)))


def _tool(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "data_tools" / name), *arguments], check=True, capture_output=True)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prefixes of a tokenizer, a language-model corpus, SFT rows, pairs with ragged negatives, and scored pairs."""
    folder = tmp_path_factory.mktemp("tiny_data")
    rng = random.Random(7)
    texts = [_words(rng, 5, 60) for _ in range(300)]
    pairs = []
    for i in range(200):
        words = texts[i].split()
        row = {"query": " ".join(rng.sample(words, k=min(4, len(words)))), "positive": texts[i]}
        row["negative"] = rng.sample(texts, k=i % 4)  # 0 to 3 hard negatives a query
        pairs.append(row)
    # the same query and the same document in several rows, as real data has them
    pairs += [{"query": pairs[i]["query"], "positive": texts[i + 50], "negative": [texts[5]]} for i in range(20)]
    scored = [{"text1": texts[i], "text2": texts[i + 1], "score": rng.randint(0, 5)} for i in range(100)]
    sft = [{"instruction": "say", "input": _words(rng, 2, 6), "output": _words(rng, 2, 9)} for _ in range(60)]
    rows = {"lm": [{"text": t} for t in texts], "pairs": pairs, "sts": scored, "sft": sft}
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
    tokenizer = folder / "tokenizer"
    _tool(
        "train_tokenizer.py",
        "--input",
        str(folder / "lm.jsonl"),
        "--vocab-size",
        "512",
        "--output-prefix",
        str(tokenizer),
        "--special-tokens",  # none
    )
    model = ["--tokenizer-model", f"{tokenizer}.model"]
    _tool(
        "preprocess.py",
        "--input",
        str(folder / "lm.jsonl"),
        *model,
        "--output-prefix",
        str(folder / "lm"),
        "--append-eod",
    )
    for name, task in {"pairs": "retrieval", "sts": "sts", "sft": "sft"}.items():
        source = str(folder / f"{name}.jsonl")
        _tool("preprocess_pairs.py", "--task", task, "--input", source, *model, "--output-prefix", str(folder / name))
    return {name: folder / name for name in rows} | {"tokenizer": folder / "tokenizer.model"}
