"""Does contrastive training help on real text? `python benchmarks/real_pairs.py --data DIR`.

Starts from the demo's pretrained weights (`make demo` leaves them in runs/demo/pretrain), trains stage `weak` on the pairs,
scored pairs and labelled texts of an external data folder, and compares retrieval (nDCG@10) and STS (Spearman) on that
folder's held-out sets with the same weights before training, in paired bootstrap intervals over queries and pairs. BM25
stands beside it. The demo's decoder has 2.3 M parameters and a tokenizer of English code: this is a check of the training,
not a good embedder.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from external_data import prepare_sources, read_sts, retrieval_sets, sts_test_sets
from recording import print_table, write_record
from scipy.stats import spearmanr

from megatron_conan.config import check_config, load_config
from megatron_conan.config.tree import RunConfig
from megatron_conan.data.command_line import run_tool
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.evaluation.beir import RetrievalData, read_beir
from megatron_conan.evaluation.bm25 import Bm25Settings, bm25_rank
from megatron_conan.evaluation.metrics import ndcg_at_k, paired_bootstrap_interval, rankings_to_run
from megatron_conan.evaluation.retrieval import EmbedTexts, evaluate_retrieval
from megatron_conan.parallel import hide_engine_warnings

ROOT = Path(__file__).resolve().parents[1]
CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
BOOTSTRAP_SAMPLES = 1000
TASK_SHARES = {"retrieval": 0.6, "sts": 0.3, "classification": 0.1}
"""Shares of the steps; within a task sources are drawn by the square root of their rows."""


@dataclass(frozen=True)
class Comparison:
    """One held-out set before and after."""

    name: str
    kind: str
    count: int
    """Queries, or pairs."""
    bm25: float | None
    before: float
    after: float
    low: float
    """95% bootstrap interval of after - before."""
    high: float


def training_config(arguments: argparse.Namespace, sources: dict[str, Any]) -> RunConfig:
    """The demo's model, trained on all sources."""
    totals = {task: sum(source.rows**0.5 for source in sources.values() if source.task == task) for task in TASK_SHARES}
    rows = [
        {"prefix": str(source.prefix), "weight": TASK_SHARES[source.task] * source.rows**0.5 / totals[source.task]}
        for source in sources.values()
    ]
    return load_config(
        ROOT / "configs" / "demo" / "weak.yaml",
        [
            f"run_dir={arguments.work / 'run'}",
            f"tokenizer.model={arguments.demo / 'data' / 'tokenizer.model'}",
            f"data.sources={rows}",
            "model.max_seq_length=512",
            "data.max_query_length=128",
            f"data.max_document_length={arguments.max_length}",
            f"train.steps={arguments.steps}",
            "train.micro_batch_size=null",
            f"train.micro_batch_tokens={arguments.micro_batch_tokens}",
            f"train.global_batch_size={arguments.batch_size}",
            "contrastive.num_hard_negatives=1",
            "contrastive.matryoshka_dims=[64,256]",
            f"contrastive.temperature={arguments.temperature}",
            f"optimizer.decoupled_lr={arguments.table_lr}",
            f"checkpoint.init_from={arguments.demo / 'pretrain'}",
            "evaluation=null",
        ],
    )


def train(config: RunConfig, evaluate: Callable[[EmbedTexts], Any]) -> tuple[Any, Any]:
    """Evaluate the start (with the mask open, as at the end), train, evaluate the end."""
    from megatron_conan.evaluation.live import live_embedder
    from megatron_conan.parallel.context import build_context, destroy_context, initialize_distributed
    from megatron_conan.train import loop
    from megatron_conan.train.setup import Setup

    device = initialize_distributed()
    try:
        setup = Setup(config, build_context(config.parallel, device), Tokenizer(config.tokenizer.model))
        trainer = loop.build_trainer(setup, {})
        embedder = live_embedder(trainer, max_tokens=16384)
        trainer.soft_mask.set(1.0)
        before = evaluate(embedder)
        loop.train(trainer)
        return before, evaluate(embedder)
    finally:
        destroy_context()


def evaluate_sets(embed: EmbedTexts, data: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """name -> nDCG@10 of each query, or the Spearman correlation of each bootstrap sample (the whole set first)."""
    scores: dict[str, np.ndarray] = {}
    for folder in retrieval_sets(data):
        scores[folder.name] = evaluate_retrieval(embed, folder).ndcg
    for name, path in sts_test_sets(data):
        first, second, gold = read_sts(path)
        a, b = (_unit(embed(texts, "document", "sts")) for texts in (first, second))
        found = (a * b).sum(axis=1)
        rng = np.random.default_rng(seed)  # the same samples before and after
        samples = [np.arange(len(gold)), *rng.integers(0, len(gold), (BOOTSTRAP_SAMPLES, len(gold)))]
        scores[name] = np.array([spearmanr(found[s], gold[s]).statistic for s in samples])
    return scores


def compare(data: Path, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> list[Comparison]:
    """One line a set, and the mean over the sets of each kind."""
    lines = []
    for folder in retrieval_sets(data):
        old, new = before[folder.name], after[folder.name]
        interval = paired_bootstrap_interval(new, old, samples=BOOTSTRAP_SAMPLES)
        lines.append(
            Comparison(folder.name, "nDCG@10", len(old), bm25(read_beir(folder)), old.mean(), new.mean(), *interval)
        )
    for name, path in sts_test_sets(data):
        old, new = before[name], after[name]
        low, high = np.quantile(new[1:] - old[1:], (0.025, 0.975))
        lines.append(Comparison(name, "Spearman", len(read_sts(path)[2]), None, old[0], new[0], low, high))
    names = [folder.name for folder in retrieval_sets(data)]
    rng = np.random.default_rng(0)
    means = [
        np.mean([(after[n] - before[n])[rng.integers(0, len(after[n]), len(after[n]))].mean() for n in names])
        for _ in range(BOOTSTRAP_SAMPLES)
    ]
    sts = [name for name, _ in sts_test_sets(data)]
    drawn = np.mean([after[name][1:] - before[name][1:] for name in sts], axis=0)
    return [*lines, _mean("nDCG@10", lines, np.array(means)), _mean("Spearman", lines, drawn)]


def _mean(kind: str, lines: list[Comparison], differences: np.ndarray) -> Comparison:
    own = [line for line in lines if line.kind == kind]
    low, high = np.quantile(differences, (0.025, 0.975))
    scores = [line.bm25 for line in own if line.bm25 is not None]
    return Comparison(
        f"mean of {len(own)} sets",
        kind,
        sum(line.count for line in own),
        float(np.mean(scores)) if scores else None,
        float(np.mean([line.before for line in own])),
        float(np.mean([line.after for line in own])),
        low,
        high,
    )


def bm25(data: RetrievalData) -> float:
    """nDCG@10 of BM25 on words (stemmed, without English stop words) and on pairs of Chinese or Japanese characters."""
    ranked = bm25_rank(
        [_words(text) for text in data.documents],
        [_words(text) for text in data.queries],
        10,
        **asdict(Bm25Settings(stopwords=True, stemming=True)),
    )
    run = rankings_to_run(data.query_ids, data.document_ids, ranked[1])
    qrels = {query: data.qrels[query] for query in data.query_ids}
    return float(np.mean(list(ndcg_at_k(run, qrels, 10).values())))


def _words(text: str) -> str:
    """Lower-cased words; runs of CJK characters as overlapping pairs."""

    def pairs(match: re.Match[str]) -> str:
        run = match.group()
        return " " + " ".join(run[i : i + 2] for i in range(max(len(run) - 1, 1))) + " "

    return " ".join(re.findall(r"\w+", CJK.sub(pairs, text.lower())))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def main(argv: Sequence[str]) -> None:
    """Prepare, evaluate, train, evaluate, print. Raises ValueError for a user's mistake."""
    parser = argparse.ArgumentParser(description="Contrastive training on external pairs against its own start.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the external data's folder")
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo", help="the demo's run folders")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "real_pairs", help="where the run is left")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--max-length", type=int, default=256, help="longest document in tokens")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--table-lr", type=float, default=1.5e-2)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    if not (arguments.demo / "pretrain" / "checkpoints" / "latest").exists():
        raise ValueError(f"{arguments.demo / 'pretrain'} holds no checkpoint; `make demo` trains it")
    if not (arguments.data / "pairs").is_dir():
        raise ValueError(f"no external data at {arguments.data}; name its folder with --data DIR")
    if (arguments.work / "run").exists():
        raise ValueError(f"{arguments.work / 'run'} is there already; remove it, or give another --work")
    hide_engine_warnings()
    started = time.monotonic()
    sources = prepare_sources(
        arguments.data,
        arguments.demo / "data" / "tokenizer.model",
        arguments.work / "data",
        kinds=("pairs", "sts", "classification"),
    )
    config = training_config(arguments, sources)
    check_config(config, 1)
    before, after = train(config, lambda embed: evaluate_sets(embed, arguments.data))
    lines = compare(arguments.data, before, after)
    rows = [
        {
            "set": line.name,
            "measure": line.kind,
            "n": line.count,
            "BM25": "" if line.bm25 is None else round(line.bm25, 3),
            "before": round(line.before, 3),
            "after": round(line.after, 3),
            "after - before, 95%": f"[{line.low:+.3f}, {line.high:+.3f}]",
        }
        for line in lines
    ]
    print_table("External data, before and after training", rows)
    minutes = (time.monotonic() - started) / 60
    print(f"{arguments.steps} steps of {arguments.batch_size} rows, {minutes:.1f} minutes in all")
    if arguments.output:
        settings = {"steps": arguments.steps, "batch_size": arguments.batch_size, "minutes": round(minutes, 1)}
        write_record(arguments.output, settings, {"sets": [asdict(line) for line in lines]})
    if any(line.low <= 0 for line in lines[-2:]):
        print("the trained model is not clearly better than its start", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
