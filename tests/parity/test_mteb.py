"""The quick evaluation gives real mteb's scores on the same local data, without a network."""

import itertools
import json
import random
import socket
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from plain_decoder import PlainModel
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from megatron_conan.data.format import TextKind
from megatron_conan.evaluation.encoder import EmbeddingEncoder, task_prompt
from megatron_conan.evaluation.retrieval import evaluate_retrieval
from megatron_conan.evaluation.run import run_mteb
from megatron_conan.evaluation.tasks import load_task
from megatron_conan.export.hf import ExportSettings, export_sentence_transformer

TOPICS = [
    ["fox", "dog", "lazy", "brown"],
    ["read", "path", "open", "file"],
    ["Tag", "München", "schöner", "Ein"],
    ["numbers", "runs", "spaces", "tabs"],
    ["天气", "今天", "很好", "0123"],
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"tried to reach the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents (5 exact duplicates of some, under ids on both sides) and 20 judged queries of 5 topics."""
    draw = random.Random(5)
    folder = tmp_path_factory.mktemp("data") / "topics"
    (folder / "qrels").mkdir(parents=True)
    documents: list[dict[str, str]] = []
    for number in range(48):
        words = draw.choices(TOPICS[number % 5], k=6) + draw.choices([word for topic in TOPICS for word in topic], k=3)
        documents.append(
            {"_id": f"d{number:02}", "title": words[0] if number % 3 else "", "text": " ".join(words[1:]) + " "}
        )
    documents += [
        {**documents[number], "_id": f"{prefix}{number:02}"} for number in range(4) for prefix in ("a", "x", "z")
    ]
    queries = [{"_id": f"q{n}", "text": f" {' '.join(draw.choices(TOPICS[n % 5], k=3))}"} for n in range(20)]
    qrels = ["query-id\tcorpus-id\tscore"]
    for number in range(20):
        own = [document for document in range(48) if document % 5 == number % 5]
        qrels += [f"q{number}\td{document:02}\t{draw.randint(0, 2)}" for document in draw.sample(own, 5)]
    qrels += ["q0\tmissing_document\t1", "missing_query\td01\t1"]
    queries.append({"_id": "unjudged", "text": "fox"})
    for name, rows in {"corpus": documents, "queries": queries}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n")
    return folder


def embed_words(texts: list[str], kind: TextKind, prompt: str | None = None) -> np.ndarray:
    """Mean of fixed random word vectors; queries and prompts get an offset, so that mixing them up changes the scores."""
    offset = np.zeros(24) + (0.3 if kind == "query" else 0.0)
    if prompt is not None:
        offset = offset + np.random.default_rng(list(prompt.encode())).standard_normal(24)
    vectors = []
    for text in texts:
        words = [np.random.default_rng(list(word.encode())).standard_normal(24) for word in text.split()]
        vectors.append(np.mean(words, axis=0) + offset)
    return np.array(vectors, dtype=np.float32)


def test_retrieval_equals_mteb(folder: Path, tmp_path: Path) -> None:
    """mteb rounds means to 5 decimals."""
    quick = evaluate_retrieval(embed_words, folder)
    scores = run_mteb(EmbeddingEncoder(embed_words, name="words"), [folder], tmp_path, details={"step": 3})
    assert 0.2 < quick.mean_ndcg < 0.9
    assert scores == {"topics": pytest.approx(quick.mean_ndcg, abs=6e-6)}
    record = json.loads((tmp_path / "topics.json").read_text())
    assert record["main_score"] == scores["topics"]
    assert record["step"] == 3
    assert record["model"] == "local/words"
    assert record["scores"]["test"][0]["recall_at_10"] == pytest.approx(quick.mean_recall, abs=6e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["topics.json"]
    low, high = quick.ndcg_interval()
    assert low < quick.mean_ndcg < high


def test_hits_come_in_canonical_order(folder: Path) -> None:
    result = evaluate_retrieval(embed_words, folder, k=7)
    assert len(result.query_ids) == len(result.ndcg) == 20
    assert "unjudged" not in result.query_ids
    ties = 0
    for hits in result.hits:
        assert len(hits) == 7
        assert hits == sorted(hits, key=lambda hit: (-hit[1], hit[0]))
        ties += sum(first[1] == second[1] for first, second in itertools.pairwise(hits))
    assert ties > 0


def test_quick_evaluation_equals_mteb_where_everything_ties(folder: Path) -> None:
    """A collapsed model: all scores equal, so the metric's own order among ties decides."""

    def collapse(texts: list[str], kind: TextKind, prompt: str | None = None) -> np.ndarray:
        return np.tile(np.array([[3.0, 4.0]], dtype=np.float32), (len(texts), 1))

    quick = evaluate_retrieval(collapse, folder)
    assert run_mteb(EmbeddingEncoder(collapse, name="collapsed"), [folder], None) == {
        "topics": pytest.approx(quick.mean_ndcg, abs=6e-6)
    }


SCORED = [
    ("fox dog", "fox dog lazy", 5),
    ("fox dog", "read path", 0),
    ("open file", "open path file", 4.5),
    ("Ein Tag", "Ein schöner Tag", 3),
    ("numbers", "fox runs", 1),
    ("read", "spaces tabs runs", 2),
    ("lazy brown", "brown brown fox", 3.5),
]


def write_scored(file: Path) -> None:
    rows = [{"text1": first, "text2": second, "score": score} for first, second, score in SCORED]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def spearman_of(first: np.ndarray, second: np.ndarray) -> float:
    cosines = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    return spearmanr(cosines, [score for *_, score in SCORED]).statistic


def test_sts_equals_scipy(tmp_path: Path) -> None:
    """Both texts get the prompt `sts`."""
    write_scored(tmp_path / "pairs_en.jsonl")
    expected, without = (
        spearman_of(*(embed_words([pair[side] for pair in SCORED], "document", prompt) for side in (0, 1)))
        for prompt in ("sts", None)
    )
    assert expected != without
    task = load_task(tmp_path / "pairs_en.jsonl", language="eng-Latn")
    assert run_mteb(EmbeddingEncoder(embed_words, name="lab/words"), [task], None) == {
        "pairs_en": pytest.approx(expected)
    }


def test_random_state_is_left_alone(folder: Path) -> None:
    """mteb seeds the global generators; a training run must not notice."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    expected = (random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore
    run_mteb(EmbeddingEncoder(embed_words, name="words"), [folder], None)
    assert (random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == expected  # type: ignore


def test_prompts_of_task_types() -> None:
    assert [task_prompt(kind) for kind in ("STS", "PairClassification", "Classification", "Clustering")] == [
        "sts", "sts", "classification", "clustering"
    ]  # fmt: skip
    assert task_prompt("MultilabelClassification") == "classification"


def export_random_model(folder: Path, **changes: Any) -> tuple[PlainModel, ExportSettings, Path]:
    model = PlainModel(folder, projection_dim=24)
    settings = model.settings(**changes)
    export_sentence_transformer(
        model.weights,
        model.shape,
        settings,
        folder / "export",
        verify_texts=["a text"],
        reference=model.reference(settings),
    )
    return model, settings, folder / "export"


@pytest.mark.parametrize("document", ["", "file\n"])
def test_an_export_through_mteb_equals_the_live_model(folder: Path, tmp_path: Path, document: str) -> None:
    """The plain decoder plays the live model: the same scores, and the same as mteb's own reading of the folder.

    Its vectors and the export's differ by rounding, so documents must not repeat: copies would be ordered by rounding.
    """
    prompts = {"query": "read\n", "sts": "same?\n", **({"document": document} if document else {})}
    model, settings, export = export_random_model(
        tmp_path, prompts=prompts, pooling="weighted_mean", include_prompt=False
    )

    def embed_live(texts: list[str], kind: TextKind, prompt: str | None = None) -> np.ndarray:
        return model.vectors(texts, settings, kind if prompt is None else prompt)

    distinct = tmp_path / "topics"
    (distinct / "qrels").mkdir(parents=True)
    for name in ("queries.jsonl", "qrels/test.tsv"):
        (distinct / name).write_bytes((folder / name).read_bytes())
    rows = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (distinct / "corpus.jsonl").write_text("".join(rows[:48]), encoding="utf-8")
    write_scored(tmp_path / "pairs.jsonl")
    quick = evaluate_retrieval(embed_live, distinct)
    sides = [[pair[side] for pair in SCORED] for side in (0, 1)]
    spearman = spearman_of(*(embed_live(texts, "document", "sts") for texts in sides))
    expected = {"topics": pytest.approx(quick.mean_ndcg, abs=6e-6), "pairs": pytest.approx(spearman)}
    tasks = [distinct, tmp_path / "pairs.jsonl"]
    assert run_mteb(export, tasks, None) == expected
    assert run_mteb(EmbeddingEncoder(embed_live, name="live"), tasks, None) == expected
    # each prompt matters to its score
    assert quick.mean_ndcg != evaluate_retrieval(lambda t, kind: embed_live(t, kind, ""), distinct).mean_ndcg
    assert spearman != spearman_of(*(embed_live(texts, "document") for texts in sides))
    stock = SentenceTransformer(str(export), device="cpu")  # mteb itself knows the prompts of queries and documents
    result = mteb.evaluate(stock, load_task(distinct), cache=None, co2_tracker=False, show_progress_bar=False)
    assert result.task_results[0].get_score() == expected["topics"]


def test_real_data_through_an_export(real_data: Path, tmp_path: Path) -> None:
    """A random model's export on a small public set: real mteb against the quick evaluation."""
    from megatron_conan.evaluation.encoder import load_folder_encoder

    source = real_data / "retrieval" / "mctest_dev_en"
    *_, export = export_random_model(tmp_path, prompts={})
    encoder = load_folder_encoder(export, device="cpu", batch_size=64)
    quick = evaluate_retrieval(encoder.embed_texts, source)
    scores = run_mteb(export, [source], tmp_path / "evaluation")
    assert len(quick.ndcg) == 316
    assert scores == {"mctest_dev_en": pytest.approx(quick.mean_ndcg, abs=6e-6)}


def test_malformed_data_names_file_and_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no BEIR folder: .*queries.jsonl"):
        evaluate_retrieval(embed_words, tmp_path)
    broken = tmp_path / "broken"
    (broken / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (broken / name).write_bytes((folder / name).read_bytes())
    with (broken / "qrels" / "test.tsv").open("a") as qrels:
        qrels.write("q1 d1 1\n")
    with pytest.raises(ValueError, match=r"test.tsv:104: expected query-id, corpus-id and a whole score"):
        evaluate_retrieval(embed_words, broken)
    with (broken / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": 7, "text": "x"}\n')
    with pytest.raises(ValueError, match=r"corpus.jsonl:61: field '_id' is missing or of another type"):
        evaluate_retrieval(embed_words, broken)
    with pytest.raises(ValueError, match="no mteb task"):
        load_task("no_such_task_anywhere")
    with pytest.raises(ValueError, match="20 of 20 query vectors are not finite"):
        evaluate_retrieval(lambda texts, kind: np.full((len(texts), 4), np.nan, dtype=np.float32), folder)
