"""Every rank runs the evaluation; each embeds its part of the texts, and all get the scores of one process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo_pool import WorkerPool

WORDS = ["fox", "dog", "lazy", "brown", "read", "path", "open", "file", "numbers", "runs", "spaces"]


def embed_words(texts: list[str]) -> np.ndarray:
    """Mean of fixed random word vectors -> [len(texts), 16] float32."""
    rows = [
        np.mean([np.random.default_rng(list(word.encode())).standard_normal(16) for word in text.split()], axis=0)
        for text in texts
    ]
    return np.array(rows, dtype=np.float32).reshape(len(texts), 16)


def evaluate_on_rank(folder: str, out: str) -> tuple[float, float, int]:
    """mteb's score, the quick score, and the number of texts this rank embedded itself."""
    from megatron_conan.evaluation.encoder import EmbeddingEncoder
    from megatron_conan.evaluation.retrieval import evaluate_retrieval
    from megatron_conan.evaluation.run import run_mteb

    rank, world, embedded = dist.get_rank(), dist.get_world_size(), 0

    def embed_texts(texts: list[str], kind: str, prompt: str | None = None) -> np.ndarray:
        nonlocal embedded
        own = torch.zeros(len(texts), 16)
        own[rank::world] = torch.from_numpy(embed_words(texts[rank::world]))
        embedded += len(texts[rank::world])
        dist.all_reduce(own)
        return own.numpy()

    scores = run_mteb(EmbeddingEncoder(embed_texts, name="words"), [folder], out, write=rank == 0)
    return scores["small"], evaluate_retrieval(embed_texts, folder).mean_ndcg, embedded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = np.random.default_rng(4)
    folder = tmp_path / "small"
    (folder / "qrels").mkdir(parents=True)
    for name, count, length in [("corpus", 31, 6), ("queries", 9, 2)]:
        rows = [{"_id": f"{name[0]}{n}", "text": " ".join(draw.choice(WORDS, length))} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [f"q{n}\tc{draw.integers(31)}\t1\n" for n in range(9)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(pairs))
    return folder


def test_all_ranks_get_the_scores_of_one_process(workers: WorkerPool, folder: Path, tmp_path: Path) -> None:
    from megatron_conan.evaluation.retrieval import evaluate_retrieval

    alone = evaluate_retrieval(lambda texts, kind: embed_words(texts), folder).mean_ndcg
    results = workers.run(evaluate_on_rank, 2, str(folder), str(tmp_path / "evaluation"))
    assert [result[1] for result in results] == [alone, alone]
    assert [result[0] for result in results] == pytest.approx([alone, alone], abs=6e-6)
    assert [result[2] for result in results] == [2 * (16 + 5), 2 * (15 + 4)]
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["small.json"]
