"""Do mined hard negatives help on real text? `python benchmarks/mined_negatives.py --data DIR`.

For every seed a warm-up trains on the retrieval pairs of an external data folder with in-batch negatives alone. From its end
stage `finetune` runs once a variant, with the same rows, batches and steps: only the hard negatives differ. nDCG@10 on
that folder's held-out sets is compared with the variant without hard negatives and with random ones, in a paired
bootstrap interval over queries (not over seeds), the seeds' scores averaged first. Mined are the positives of the training
pairs: some of the negatives that the files name are test documents, and are left out.

The decoder is the demo's: 2.3 M parameters, little more than a bag of words. Its tokenizer is trained on the pairs and its
weights are random: on text in many languages that beats the demo's tokenizer of English code with the demo's weights, from
which `--demo DIR` starts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from external_data import Source, prepare_sources, retrieval_sets
from real_pairs import BOOTSTRAP_SAMPLES, ROOT, bm25
from recording import Row, print_table, write_record

from megatron_conan.config import check_config, load_config
from megatron_conan.config.tree import RunConfig
from megatron_conan.data.command_line import run_tool
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer
from megatron_conan.evaluation.beir import read_beir
from megatron_conan.evaluation.retrieval import evaluate_retrieval
from megatron_conan.parallel import hide_engine_warnings

LEFT_OUT = ("nli_zh_hn", "agnews_title_desc")
"""Pair files that no held-out set resembles: premise and hypothesis, title and description. Without them the rows that are
asked for come more than once in a short run, which the rules of replacement need."""
WARMUP_SEED = 1000
"""Added to the seed for the warm-up: another order of rows, as the variants would begin with the batches just seen."""
NO_MINING = ("contrastive.num_hard_negatives=0", "mining=null")
BASELINE = "in-batch only"
VARIANTS: dict[str, tuple[str, ...]] = {
    BASELINE: NO_MINING,
    "random": (
        "mining.at=[0]",
        "mining.sample=true",
        "mining.window=100000",
        "mining.margin=null",
        "mining.skip_top=0",
    ),
    "mined once": ("mining.at=[0]",),
    "re-mined": ("mining.every={every}",),
    "re-mined, v2 rule": ("mining.every={every}", "mining.rule=v2"),
    "re-mined, v2 rule on drops": ("mining.every={every}", "mining.rule=v2", "mining.low_score=-1"),
    "re-mined, v1 rule": ("mining.every={every}", "mining.rule=v1", "mining.rule_every=25"),
}
"""What each variant sets. `random` draws as many negatives from all documents: more of them, none of them hard. `on drops` is
the v2 rule without its test that a negative came in below .4, which most of this small model's do."""
REFERENCES = (BASELINE, "random")
"""Variants that the others are compared with."""
QUICK = {"seeds": [0], "warmup_steps": 6, "steps": 8, "every": 3, "batch_size": 16}
Result = dict[str, Any]
"""A finished run: its `config`, `seconds`, `scores` (held-out set -> nDCG@10 of each query) and what its mining did."""


def make_tokenizer(data: Path, target: Path, vocab_size: int = 8192) -> Path:
    """Train a tokenizer on the queries and positives of the pair files."""
    if not target.is_file():
        rows = [json.loads(line) for path in sorted((data / "pairs").glob("*.jsonl")) for line in _lines(path)]
        texts = dict.fromkeys(row[key] for row in rows for key in ("query", "pos"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(train_tokenizer(texts, vocab_size))
    return target


def prepare_pairs(data: Path, tokenizer: Path, output: Path) -> list[Source]:
    """The retrieval pairs without the files' negatives, so that the documents to mine are their positives."""
    sources = []
    for name, source in prepare_sources(data, tokenizer, output / "as_given", kinds=("pairs",)).items():
        if name in LEFT_OUT:
            continue
        given = source.prefix.parent / "rows" / f"{name}.jsonl"
        pairs = [{**json.loads(line), "negative": []} for line in _lines(given)]
        rows = output / "rows" / f"{name}.jsonl"
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
        summary = preprocess_pairs("retrieval", [rows], tokenizer, output / name)
        sources.append(Source("retrieval", output / name, summary["rows"]))
    return sources


def run_config(arguments: argparse.Namespace, sources: Sequence[Source], run: Path, words: Sequence[str]) -> RunConfig:
    """The demo's stage `finetune` on the sources, drawn by the square root of their rows."""
    config = load_config(
        ROOT / "configs" / "demo" / "finetune.yaml",
        [
            f"run_dir={run}",
            f"tokenizer.model={arguments.tokenizer}",
            f"data.sources={[{'prefix': str(source.prefix)} for source in sources]}",
            "data.source_temperature=2",
            "data.max_query_length=128",
            f"data.max_document_length={arguments.max_length}",
            f"model.max_seq_length={max(arguments.max_length, 128)}",
            "train.micro_batch_size=null",
            "train.micro_batch_tokens=16384",
            f"contrastive.temperature={arguments.temperature}",
            f"contrastive.num_hard_negatives={arguments.negatives}",
            f"optimizer.decoupled_lr={arguments.table_lr}",
            "mining.every=null",
            "mining.rule=none",
            "mining.pool_size=32",
            "mining.window=100",
            f"mining.skip_top={arguments.skip_top}",
            f"mining.margin={arguments.margin}",
            "evaluation=null",
            *words,
        ],
    )
    check_config(config, 1)
    return config


def finished(config: RunConfig, data: Path, train: bool) -> Result:
    """The result of a run: the one it left earlier, or train (or only load its start) and score it now.

    Raises:
        ValueError: an earlier result was made with other settings.
    """
    file = config.run_dir.with_suffix(".json")
    described = json.loads(config.model_dump_json(exclude={"run_dir"}))
    if file.is_file():
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        if result["config"] != described:
            raise ValueError(f"{file} was made with other settings; remove it, or give another --work")
        return result
    shutil.rmtree(config.run_dir, ignore_errors=True)  # of a run that was interrupted
    name = f"{config.run_dir.parent.name} {config.run_dir.name}"
    print(f"{name}: {config.train.steps if train else 0} steps", file=sys.stderr, flush=True)
    result = {"config": described, **train_and_score(config, data, train), **mining_figures(config.run_dir)}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(result), encoding="utf-8")
    draft.replace(file)
    print(f"{name}: nDCG@10 {mean_scores([result])[0]:.4f}, {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    return result


def train_and_score(config: RunConfig, data: Path, train: bool) -> Result:
    """Train, or only load the start; then `scores` on the held-out sets, and the `seconds` of training."""
    from megatron_conan.evaluation.live import live_embedder
    from megatron_conan.main import build_hooks
    from megatron_conan.parallel.context import build_context, destroy_context, initialize_distributed
    from megatron_conan.train import loop
    from megatron_conan.train.setup import Setup

    device = initialize_distributed()
    try:
        setup = Setup(config, build_context(config.parallel, device), Tokenizer(config.tokenizer.model))
        trainer = loop.build_trainer(setup, build_hooks(setup))
        started = time.monotonic()
        if train:
            loop.train(trainer)
        seconds = time.monotonic() - started
        trainer.soft_mask.set(1.0)
        embed = live_embedder(trainer, max_tokens=16384)
        scores = {folder.name: evaluate_retrieval(embed, folder).ndcg.tolist() for folder in retrieval_sets(data)}
        return {"seconds": seconds, "scores": scores}
    finally:
        destroy_context()


def mining_figures(run: Path) -> dict[str, float | None]:
    """What a run's records say: seconds of mining, mean share changed by a re-mining, replaced negatives, similarities."""
    minings = [json.loads(line) for line in _lines(run / "negatives" / "mining.jsonl")]
    steps = [json.loads(line) for line in _lines(run / "metrics.jsonl")]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    last = steps[-len(steps) // 4 :]
    return {
        "mining_seconds": sum(line["seconds"] for line in minings),
        "minings": len({line["step"] for line in minings}),
        "changed_share": mean([line["changed_share"] for line in minings]),
        "replaced": sum(line.get("negatives_replaced") or 0 for line in steps),
        "negatives_a_query": mean([line.get("negatives_per_query") for line in steps]),
        "in_batch_accuracy": mean([line.get("in_batch_accuracy") for line in last]),
        "hard_negative_similarity": mean([line.get("hard_negative_similarity") for line in last]),
    }


def mean_scores(results: Sequence[Result]) -> list[float]:
    """Mean over the held-out sets of nDCG@10, of each run."""
    return [float(np.mean([np.mean(scores) for scores in result["scores"].values()])) for result in results]


def difference_interval(results: Sequence[Result], baseline: Sequence[Result]) -> tuple[float, float]:
    """95% bootstrap interval of the mean difference: queries are drawn within each set, their scores averaged over seeds."""
    rng = np.random.default_rng(0)
    means = []
    for name in results[0]["scores"]:
        ours, theirs = (np.mean([run["scores"][name] for run in runs], axis=0) for runs in (results, baseline))
        drawn = rng.integers(0, len(ours), (BOOTSTRAP_SAMPLES, len(ours)))
        means.append((ours - theirs)[drawn].mean(axis=1))
    low, high = np.quantile(np.mean(means, axis=0), (0.025, 0.975))
    return float(low), float(high)


def quality_rows(runs: dict[str, list[Result]], seeds: Sequence[int], bm25_scores: dict[str, float]) -> list[Row]:
    """One line a variant: every seed's mean over the sets, mean, standard deviation (over seeds), differences."""
    rows: list[Row] = []
    for name, results in runs.items():
        scores = mean_scores(results)
        row: Row = {"run": name, **{f"seed {seed}": f"{score:.4f}" for seed, score in zip(seeds, scores, strict=True)}}
        row |= {"mean": f"{np.mean(scores):.4f}", "sd": f"{np.std(scores, ddof=1):.4f}" if len(scores) > 1 else ""}
        for reference in REFERENCES:
            if name in VARIANTS and name not in (BASELINE, reference) and reference in runs:
                differences = np.subtract(scores, mean_scores(runs[reference]))
                low, high = difference_interval(results, runs[reference])
                row[f"minus {reference}"] = f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
                row[f"sd of minus {reference}"] = f"{differences.std(ddof=1):.4f}" if len(scores) > 1 else ""
        rows.append(row)
    rows.append({"run": "BM25", "mean": f"{np.mean(list(bm25_scores.values())):.4f}"})
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


def set_rows(runs: dict[str, list[Result]], bm25_scores: dict[str, float]) -> list[Row]:
    """One line a held-out set: queries, BM25, and every variant's mean over seeds."""
    return [
        {
            "set": name,
            "queries": len(runs[BASELINE][0]["scores"][name]),
            "BM25": f"{score:.3f}",
            **{run: f"{np.mean([np.mean(r['scores'][name]) for r in results]):.3f}" for run, results in runs.items()},
        }
        for name, score in bm25_scores.items()
    ]


def score_rows(runs: dict[str, list[Result]], seeds: Sequence[int]) -> list[Row]:
    """One line a run: the mean of every held-out set."""
    return [
        {"run": name, "seed": seed, **{key: float(np.mean(scores)) for key, scores in result["scores"].items()}}
        for name, results in runs.items()
        for seed, result in zip(seeds, results, strict=True)
    ]


def mining_rows(runs: dict[str, list[Result]]) -> list[Row]:
    """One line a variant, means over seeds: seconds, and what mining did."""

    def mean(results: list[Result], key: str, digits: int) -> str:
        values = [result[key] for result in results if result[key] is not None]
        return f"{np.mean(values):.{digits}f}" if values else ""

    return [
        {
            "run": name,
            "seconds": mean(results, "seconds", 0),
            "mining, s": mean(results, "mining_seconds", 1),
            "share": f"{sum(r['mining_seconds'] for r in results) / sum(r['seconds'] for r in results):.1%}",
            "minings": mean(results, "minings", 0),
            "changed by a re-mining": mean(results, "changed_share", 2),
            "replaced": mean(results, "replaced", 0),
            "negatives a query": mean(results, "negatives_a_query", 0),
            "accuracy, last quarter": mean(results, "in_batch_accuracy", 3),
            "hard negatives' similarity": mean(results, "hard_negative_similarity", 3),
        }
        for name, results in runs.items()
        if name in VARIANTS
    ]


def run_seed(arguments: argparse.Namespace, sources: Sequence[Source], seed: int) -> dict[str, Result]:
    """All runs of a seed that are not finished yet: start, warm-up, and the variants from its end; results by name."""
    folder = arguments.work / f"seed_{seed}"

    def run(name: str, init_from: str | Path, steps: int, words: Sequence[str], shuffle_seed: int = seed) -> Result:
        settings = [f"checkpoint.init_from={init_from}", f"train.steps={max(steps, 1)}", f"train.seed={shuffle_seed}"]
        settings.append(f"train.global_batch_size={arguments.batch_size}")
        target = folder / name.replace(" ", "_").replace(",", "")
        return finished(run_config(arguments, sources, target, [*settings, *words]), arguments.data, train=steps > 0)

    init = "null" if arguments.demo is None else arguments.demo / "weak"
    first = WARMUP_SEED + seed
    results = {
        "start": run("start", init, 0, NO_MINING, first),
        "warm-up": run("warm-up", init, arguments.warmup_steps, NO_MINING, first),
    }
    for name in arguments.variants:
        words = [word.format(every=arguments.every) for word in VARIANTS[name]]
        results[name] = run(name, folder / "warm-up", arguments.steps, words)
    return results


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, with a message for what is missing (ValueError)."""
    parser = argparse.ArgumentParser(
        description="Mined hard negatives against in-batch negatives alone, on external pairs."
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the external data's folder")
    parser.add_argument("--demo", type=Path, help="start from the demo's weights and tokenizer in this folder")
    parser.add_argument(
        "--work", type=Path, help="where runs and results are left; finished runs there are not run again"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="which")
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=50, help="steps between two minings")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--negatives", type=int, default=3, help="hard negatives a row")
    parser.add_argument("--skip-top", type=int, default=0)
    parser.add_argument("--margin", type=float, default=0.95)
    parser.add_argument("--max-length", type=int, default=128, help="longest document in tokens")
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--table-lr", type=float, default=7e-3)
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps, to see that it runs")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(QUICK)
    if arguments.work is None:
        arguments.work = ROOT / "runs" / ("mined_negatives_quick" if arguments.quick else "mined_negatives")
    if BASELINE not in arguments.variants:
        arguments.variants.insert(0, BASELINE)
    if not (arguments.data / "pairs").is_dir() or not retrieval_sets(arguments.data):
        raise ValueError(f"no external data at {arguments.data}; name its folder with --data DIR")
    if arguments.demo is not None and not (arguments.demo / "weak" / "checkpoints" / "latest").exists():
        raise ValueError(f"{arguments.demo / 'weak'} holds no checkpoint; `make demo` trains it")
    return arguments


def main(argv: Sequence[str]) -> None:
    """Prepare, run what is not finished, print. Raises ValueError for a user's mistake."""
    arguments = parse_arguments(argv)
    hide_engine_warnings()
    if arguments.demo is None:
        arguments.tokenizer = make_tokenizer(arguments.data, arguments.work / "tokenizer.model")
    else:
        arguments.tokenizer = arguments.demo / "data" / "tokenizer.model"
    sources = prepare_pairs(arguments.data, arguments.tokenizer, arguments.work / "data")
    by_seed = [run_seed(arguments, sources, seed) for seed in arguments.seeds]
    runs = {name: [results[name] for results in by_seed] for name in by_seed[0]}
    bm25_scores = {folder.name: bm25(read_beir(folder)) for folder in retrieval_sets(arguments.data)}
    tables = {
        f"nDCG@10, mean of {len(bm25_scores)} held-out sets": quality_rows(runs, arguments.seeds, bm25_scores),
        "nDCG@10 by set, mean over seeds": set_rows(runs, bm25_scores),
        "Runs, mean over seeds": mining_rows(runs),
    }
    for title, rows in tables.items():
        print_table(title, rows)
    num_pairs = sum(source.rows for source in sources)
    epochs = arguments.steps * arguments.batch_size / num_pairs
    print(
        f"\n{num_pairs:,} pairs; {arguments.steps} steps of {arguments.batch_size} rows ({epochs:.1f} epochs) a variant"
    )
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
        settings |= {"start": "demo" if arguments.demo else "random", "pairs": num_pairs, "epochs": round(epochs, 2)}
        write_record(arguments.output, settings, {**tables, "nDCG@10 of every run": score_rows(runs, arguments.seeds)})


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()] if path.is_file() else []


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
