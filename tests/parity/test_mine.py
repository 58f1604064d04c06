"""`conan mine` on a real trained run and on its export: brute force, sentence-transformers, other layouts, interruptions."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gloo_pool import WorkerPool
from layouts import tiny_config, train_run
from mined_rows import Mined, command, command_here, negatives_of, positives_of, read_jsonl, write_inputs

PROMPTS = {"query": "find:\n", "document": "text\n", "other": "like this:\n"}
NEAR = 1e-5
"""Scores that differ by less may change places: one sums in another order than the other."""


def export_here(run: Path, out: Path) -> None:
    from megatron_conan.export.trained import export_run, load_run

    export_run(load_run(run), out, ["abc def"])


@pytest.fixture(scope="module")
def mined(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mined:
    folder = tmp_path_factory.mktemp("mined")
    lengths = {"max_query_length": 48, "max_document_length": 48}  # an export knows one length
    opened = {"schedule": "constant", "alpha": 1.0}
    config = tiny_config("weak", tiny_data, folder / "run", soft_mask=opened, prompts=PROMPTS, data=lengths)
    workers.run(train_run, 1, config)
    workers.run(export_here, 1, folder / "run", folder / "export")
    return Mined(folder / "run", folder / "export", *write_inputs(folder), tiny_data["tokenizer"])


def vectors_here(mined: Mined) -> dict[str, Any]:
    """Vectors of all queries and documents, by the trained run."""
    from megatron_conan.export.trained import load_run

    run, queries, documents = load_run(mined.run), list(mined.positives()), mined.documents()
    return {
        "query": dict(zip(queries, run.embed(queries, "query"), strict=True)),
        "document": dict(zip(documents, run.embed(documents, "document"), strict=True)),
        "plain query": dict(zip(queries, run.embed(queries, "query", ""), strict=True)),
        "other document": dict(zip(documents, run.embed(documents, "document", "other"), strict=True)),
    }


@pytest.fixture(scope="module")
def vectors(workers: WorkerPool, mined: Mined) -> dict[str, dict[str, np.ndarray]]:
    return workers.run(vectors_here, 1, mined)[0]


def selected(
    query: str, positives: list[str], queries: dict[str, np.ndarray], documents: dict[str, np.ndarray], **rule: Any
) -> list[float]:
    """Scores of the negatives that plain loops choose, best first."""
    score = {text: float(vector @ queries[query]) for text, vector in documents.items()}
    lowest = min(score[text] for text in positives)
    near = sorted((text for text in score if text != query and text not in positives), key=lambda text: -score[text])
    kept = [score[text] for text in near[rule.get("skip", 0) : rule.get("window", 100)]]
    if (absolute := rule.get("absolute")) is not None:
        kept = [s for s in kept if s <= lowest - absolute]
    if (margin := rule.get("margin", 0.95)) is not None:
        kept = [s for s in kept if s <= lowest - (1 - margin) * abs(lowest)]
    return [s for s in kept if s <= rule.get("ceiling", 9)][: rule.get("count", 7)]


CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "as it is": ([], {}),
    "no margin": (["--no-margin", "--num-negatives", "3"], {"margin": None, "count": 3}),
    "window": (
        ["--window", "40", "--skip-top", "2", "--ceiling", "0.85", "--margin", "0.98"],
        {"window": 40, "skip": 2, "ceiling": 0.85, "margin": 0.98},
    ),
    "absolute": (["--margin-kind", "absolute", "--margin", "0.1"], {"margin": None, "absolute": 0.1}),
    "prompts": (["--query-prompt", "", "--document-prompt", "other"], {"vectors": ("plain query", "other document")}),
}


@pytest.mark.parametrize("model", ["run", "export"])
def test_negatives_are_those_of_plain_loops(
    workers: WorkerPool, mined: Mined, vectors: dict[str, dict[str, np.ndarray]], tmp_path: Path, model: str
) -> None:
    """Trained run and export alike, with batches of many sizes; scores, texts, order and the report of short queries."""
    folder = str(mined.run if model == "run" else mined.export)
    tail = ["--scores", "--max-tokens", "200"]
    commands = [
        [folder, *mined.arguments, "--output-prefix", str(tmp_path / name), *arguments, *tail]
        for name, (arguments, _) in CASES.items()
    ]
    outcomes = command(workers, *commands)
    positives, num_documents = mined.positives(), len(mined.documents())
    for outcome, (name, (_, rule)) in zip(outcomes, CASES.items(), strict=True):
        queries, documents = (vectors[key] for key in rule.get("vectors", ("query", "document")))
        expected = {query: selected(query, texts, queries, documents, **rule) for query, texts in positives.items()}
        rows = read_jsonl(tmp_path / f"{name}.jsonl")
        assert len(rows) == len(mined.rows())
        for row in rows:
            query, texts = row["query"], negatives_of(row)
            scores = {text: vector @ queries[query] for text, vector in documents.items()}
            np.testing.assert_allclose(row["negative_scores"], expected[query], atol=NEAR)
            np.testing.assert_allclose([scores[text] for text in texts], row["negative_scores"], atol=NEAR)
            np.testing.assert_allclose([scores[text] for text in positives_of(row)], row["positive_scores"], atol=NEAR)
            assert len(set(texts)) == len(texts)
            assert not set(texts) & {query, *positives[query]}
        wanted = rule.get("count", 7)
        found = {query: len(scores) for query, scores in expected.items()}
        short = {line["query"]: line for line in read_jsonl(tmp_path / f"{name}.short.jsonl")}
        assert {query: line["found"] for query, line in short.items()} == {q: n for q, n in found.items() if n < wanted}
        summary = json.loads((tmp_path / f"{name}.json").read_text())
        assert (summary["rows"], summary["queries"]) == (len(rows), len(positives))
        assert summary["documents"] == num_documents
        assert summary["negatives"] == sum(found.values())
        chosen = np.concatenate(list(expected.values()))
        assert summary["mean_negative_score"] == pytest.approx(chosen.mean(), abs=NEAR)
        lowest = [min(float(documents[text] @ queries[q]) for text in texts) for q, texts in positives.items()]
        assert summary["mean_positive_score"] == pytest.approx(np.mean(lowest), abs=NEAR)
        assert sum(summary["short_queries"].values()) == len(short)
        assert f"{summary['negatives']:,} negatives" in outcome.stdout
        assert (f"{len(short):,} queries have fewer than {wanted}" in outcome.stdout) == bool(short)
        assert f"documents: {num_documents:,} texts in" in outcome.stderr
    window = {line["query"]: line for line in read_jsonl(tmp_path / "window.short.jsonl")}
    assert window  # a window of 40 without the first 2: the rest is turned down by score
    for line in window.values():
        turned_down = line["rejected"]
        assert turned_down["skipped"] == 2
        assert line["found"] + turned_down.get("margin", 0) + turned_down.get("ceiling", 0) == 38
        assert line["wanted"] == 7
        assert turned_down[line["reason"]] == max(n for reason, n in turned_down.items() if reason != "known")


def stock_here(mined: Mined, settings: dict[str, Any]) -> dict[str, list[str]]:
    """Negatives of every query, by sentence-transformers."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    pairs = [(query, text) for query, texts in mined.positives().items() for text in dict.fromkeys(texts)]
    with contextlib.redirect_stderr(io.StringIO()):
        dataset = mine_hard_negatives(
            Dataset.from_dict({"query": [query for query, _ in pairs], "positive": [text for _, text in pairs]}),
            SentenceTransformer(str(mined.export), device="cpu"),
            corpus=mined.documents(),
            verbose=False,
            query_prompt_name="query",
            corpus_prompt_name="document",
            **settings,
        )
    found: dict[str, list[str]] = {query: [] for query, _ in pairs}
    for row in dataset:
        if row["negative"] not in found[row["query"]]:
            found[row["query"]].append(row["negative"])
    return found


STOCK: dict[str, tuple[dict[str, Any], list[str]]] = {
    "relative": ({"relative_margin": 0.05, "num_negatives": 7}, []),
    "absolute": ({"absolute_margin": 0.1, "num_negatives": 4, "max_score": 0.7},
                 ["--margin-kind", "absolute", "--margin", "0.1", "--num-negatives", "4", "--ceiling", "0.7"]),
    "no margin": ({"num_negatives": 5, "range_min": 3}, ["--no-margin", "--num-negatives", "5", "--skip-top", "3"]),
}  # fmt: skip


@pytest.mark.parametrize("use_faiss", [False, True])
def test_negatives_are_those_of_sentence_transformers(
    workers: WorkerPool, mined: Mined, vectors: dict[str, dict[str, np.ndarray]], tmp_path: Path, use_faiss: bool
) -> None:
    """With a window over everything: sentence-transformers counts places after the margin, and the positives among them.

    It also skips its first places after the margin, and takes a query that is a document for its own negative.
    """
    commands = [
        [str(mined.run), *mined.arguments, "--window", "400", "--output-prefix", str(tmp_path / name), *arguments]
        for name, (_, arguments) in STOCK.items()
    ]
    command(workers, *commands)
    for name, (settings, _) in STOCK.items():
        (stock,) = workers.run(stock_here, 1, mined, {"range_max": 400, "use_faiss": use_faiss, **settings})
        rows = {row["query"]: negatives_of(row) for row in read_jsonl(tmp_path / f"{name}.jsonl")}
        itself = set(mined.documents()) & set(rows)
        assert len(itself) == 1
        assert sum(map(len, rows.values())) > 2 * len(rows)
        differing = 0
        for query in rows.keys() - itself:
            if set(rows[query]) != set(stock[query]):
                differing += 1
                scores = {text: vector @ vectors["query"][query] for text, vector in vectors["document"].items()}
                found, wanted = (sorted(scores[text] for text in texts[query]) for texts in (rows, stock))
                np.testing.assert_allclose(found, wanted, atol=NEAR, err_msg=f"{name}: {query}")
        assert differing <= 1


@pytest.mark.parametrize("model", ["run", "export"])
def test_two_ranks_write_what_one_writes(workers: WorkerPool, mined: Mined, tmp_path: Path, model: str) -> None:
    folder = str(mined.run if model == "run" else mined.export)
    (tmp_path / "scratch").mkdir()
    for number in (1, 2):
        arguments = [folder, *mined.arguments, "--max-tokens", "256", "--output-prefix", str(tmp_path / str(number))]
        arguments += ["--window", "30", "--ceiling", "0.8"]
        command(workers, arguments, [*arguments, "--scratch-dir", str(tmp_path / "scratch")], world_size=number)
    for suffix in (".jsonl", ".short.jsonl"):
        one, two = (tmp_path / f"{number}{suffix}" for number in (1, 2))
        assert one.read_bytes() == two.read_bytes()
        assert len(one.read_bytes()) > 300
    summaries = [json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2)]
    assert [summary.pop("ranks") for summary in summaries] == [1, 2]
    assert summaries[0].pop("seconds").keys() == summaries[1].pop("seconds").keys()
    assert summaries[0] == summaries[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["scratch", *(f"{number}{suffix}" for number in (1, 2) for suffix in (".json", ".jsonl", ".short.jsonl"))]
    )
    assert list((tmp_path / "scratch").iterdir()) == []


def test_rows_keep_their_order_and_keys_and_are_read_by_the_tools(
    workers: WorkerPool, mined: Mined, tmp_path: Path
) -> None:
    from megatron_conan.data.pair_files import preprocess_pairs
    from megatron_conan.data.pairs import PairStore
    from megatron_conan.data.tokenizer import Tokenizer

    arguments = [str(mined.run), *mined.arguments, "--output-prefix", str(tmp_path / "out")]
    command(workers, arguments, [*arguments[:-1], str(tmp_path / "drawn"), "--sample-seed", "5"])
    rows, results = mined.rows(), read_jsonl(tmp_path / "out.jsonl")
    for before, after in zip(rows, results, strict=True):
        key = "neg" if "pos" in before else "negative"
        assert list(after) == [*before, *([] if key in before else [key])]
        assert {name: value for name, value in before.items() if name != key} == {
            name: value for name, value in after.items() if name != key
        }
    by_query: dict[str, Any] = {}
    for row in results:
        assert by_query.setdefault(row["query"], negatives_of(row)) == negatives_of(row)
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert '"title": "é\u2028"' in text
    assert '"odd": "\\ud800"' in text  # which UTF-8 can't hold
    preprocess_pairs("retrieval", [tmp_path / "out.jsonl"], mined.tokenizer, tmp_path / "pairs")
    store = PairStore(tmp_path / "pairs", Tokenizer(mined.tokenizer))
    assert store.summary["negatives_dropped"] == 0
    for number, row in enumerate(results):
        assert [store.text(i) for i in store.negatives(number)] == by_query[row["query"]]
    drawn = [negatives_of(row) for row in read_jsonl(tmp_path / "drawn.jsonl")]
    nearest = [by_query[row["query"]] for row in results]
    assert drawn != nearest
    assert list(map(len, drawn)) == list(map(len, nearest))


KILLED = """
import os, signal, sys
from megatron_conan.cli import main
from megatron_conan.export.trained import TrainedRun
from megatron_conan.mining import rows
rows.SAVE_SECONDS, embed, batches = 0, TrainedRun.embed_packed, []
def embed_some(run, packed):
    if len(batches) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    batches.append(len(packed[0].prompt_lengths))
    print(batches[-1], flush=True)
    return embed(run, packed)
TrainedRun.embed_packed = embed_some
main(sys.argv[1:])
"""


def test_a_killed_mining_goes_on(workers: WorkerPool, mined: Mined, tmp_path: Path) -> None:
    arguments = [str(mined.run), *mined.arguments, "--max-tokens", "128", "--output-prefix", str(tmp_path / "out")]
    scratch = tmp_path / "scratch"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "mine", *arguments, "--scratch-dir", str(scratch)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = sum(map(int, killed.stdout.split()))
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    (rows,) = scratch.glob("*.npy")
    shutil.copytree(scratch, tmp_path / "again")
    whole, rest, other, repeated = command(
        workers,
        [*arguments[:-1], str(tmp_path / "whole")],
        [*arguments, "--scratch-dir", str(scratch)],
        [*arguments, "--scratch-dir", str(tmp_path / "again"), "--document-prompt", "other"],
        [*arguments, "--scratch-dir", str(scratch)],
    )
    total = len(mined.documents()) + len(mined.positives())
    assert 0 < done < len(mined.documents())
    assert [whole.num_embedded, rest.num_embedded] == [total, total - done]
    assert [other.num_embedded, repeated.num_embedded] == [total, total]  # another prompt; and nothing is left
    assert list(scratch.iterdir()) == list((tmp_path / "again").iterdir()) == []
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert rows.name.startswith("out.")


def test_what_the_model_cannot_do_is_told(workers: WorkerPool, mined: Mined, tmp_path: Path) -> None:
    """After the rows are read; nothing is left, and an older result stays."""
    (tmp_path / "out.jsonl").write_text("older\n")
    tail = [*mined.arguments, "--output-prefix", str(tmp_path / "out"), "--scratch-dir", str(tmp_path / "scratch")]
    messages = {
        "'weak' is no prompt of": [str(mined.run), *tail, "--query-prompt", "weak"],
        "--document-prompt 'weak' is no prompt of": [str(mined.export), *tail, "--document-prompt", "weak"],
        "max_tokens=8 is below the longest text": [str(mined.run), *tail, "--max-tokens", "8"],
    }
    (outcomes,) = workers.run(command_here, 1, *messages.values())
    for message, outcome in zip(messages, outcomes, strict=True):
        assert (outcome.code, outcome.stdout, outcome.num_embedded) == (2, "", 0)
        (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        assert message in line
        assert "prompt" not in message or all(repr(name) in line for name in PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "older\n"


def changed_here(mined: Mined, folder: Path) -> str:
    """The error where an input is written anew while it is mined."""
    from megatron_conan.export.text_models import RunModel
    from megatron_conan.mining.offline import MineRequest, TextModel, mine_files
    from megatron_conan.mining.select import SelectionSettings

    changing = folder / "in.jsonl"

    def load() -> TextModel:
        model = RunModel.load(mined.run)
        model.context.barrier()  # all have read it
        if model.context.rank == 0:
            changing.write_text(mined.inputs[1].read_text())
        return model

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        mine_files(MineRequest([changing], folder / "out", SelectionSettings(3), mined.corpus), load)
    return str(caught.value)


def test_an_input_that_changes_stops_all_ranks(workers: WorkerPool, mined: Mined, tmp_path: Path) -> None:
    shutil.copy(mined.inputs[0], tmp_path / "in.jsonl")
    first, second = workers.run(changed_here, 2, mined, tmp_path)
    assert first == f"{tmp_path / 'in.jsonl'} changed while it was mined; start again"
    assert second == "rank 0 could not write the result"
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
