"""The demo behind `make demo`: the whole recipe, small, on this machine's CPU.

Data from the Python installation it runs in -> tokenizer -> pretrain -> sft -> weak -> finetune -> export -> search.
Every stage is started as a user would start it (torchrun, launch/STAGE.sh, configs/demo/STAGE.yaml). What is finished is not
done again: an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_conan.parallel import hide_engine_warnings

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("runs/demo")
DATA = DEMO / "data"
STAGES = ("pretrain", "sft", "weak", "finetune")
PROCESSES = 2

SHORT = {
    "pretrain": ["train.steps=20"],
    "sft": ["train.steps=10"],
    "weak": ["train.steps=60"],
    "finetune": ["train.steps=60", "mining.every=20"],
}
"""Overrides of the short form (DEMO=short): the same recipe on less data, for a few steps."""

PARALLEL = {"pretrain": ["parallel.tensor=2"]}
"""Layouts: pretrain splits every matrix over two processes; the other stages split the batch."""


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train, evaluate and search a small embedder on this machine.")
    parser.add_argument("--size", choices=["full", "short"], default="full")
    size = parser.parse_args().size
    os.chdir(ROOT)
    hide_engine_warnings()
    started = time.monotonic()
    _keep_other_size(size)
    summary = _read_summary(size)
    for name, step in _steps(size, summary):
        if name not in summary["seconds"]:
            _headline(name)
            began = time.monotonic()
            step()
            summary["seconds"][name] = round(time.monotonic() - began, 1)
            _write_summary(summary)
        if name in STAGES:
            _add_row(summary, name)
            _print_table(summary)
    _finish(summary)
    print(f"\nthis call took {time.monotonic() - started:.0f} s")
    return 0


def _steps(size: str, summary: dict[str, Any]) -> list[tuple[str, Callable[[], None]]]:
    """Name and action of every step, in order."""
    steps: list[tuple[str, Callable[[], None]]] = [
        ("data", lambda: _make_data(size)),
        ("bm25", lambda: _score_bm25(summary)),
    ]
    steps += [(stage, lambda stage=stage: _train(stage, size)) for stage in STAGES]  # type: ignore[misc]
    return [*steps, ("export", _export), ("index", _index), ("questions", lambda: _ask(summary))]


def _make_data(size: str) -> None:
    """Extract functions, train the tokenizer, write the binary files that configs/demo names."""
    extract = ["--size", "small" if size == "short" else "full"]
    _run("data_tools/extract_code.py", "--output", str(DATA), "--workers", str(PROCESSES), *extract)
    tokenizer = ["--vocab-size", "8192", "--output-prefix", f"{DATA}/tokenizer"]
    _run("data_tools/train_tokenizer.py", "--input", f"{DATA}/lm.jsonl", *tokenizer)
    model = ["--tokenizer-model", f"{DATA}/tokenizer.model", "--workers", str(PROCESSES)]
    _run(
        "data_tools/preprocess.py",
        "--input",
        f"{DATA}/lm.jsonl",
        *model,
        "--output-prefix",
        f"{DATA}/lm",
        "--append-eod",
    )
    for task, name in (("sft", "sft"), ("retrieval", "weak"), ("retrieval", "train")):
        _run(
            "data_tools/preprocess_pairs.py", "--task", task, "--input", f"{DATA}/{name}.jsonl", *model,
            "--output-prefix", f"{DATA}/{name}",
        )  # fmt: skip


def _score_bm25(summary: dict[str, Any]) -> None:
    """The baselines on the same queries: identifier-split BM25 as it is, and tuned on training rows."""
    from megatron_conan.evaluation.beir import read_beir
    from megatron_conan.evaluation.bm25 import IDENTIFIER_BM25, Bm25Index, tune_bm25
    from megatron_conan.evaluation.metrics import ndcg_at_k

    data = read_beir(DATA / "eval")
    rows = [json.loads(line) for line in (DATA / "train.jsonl").open(encoding="utf-8")]
    rows = [row for row in rows if not row["raw"]][::4][:3000]
    tuned = tune_bm25(
        [row["positive"] for row in rows], [row["query"] for row in rows[:500]], list(range(len(rows[:500])))
    )
    for name, settings in (("split", IDENTIFIER_BM25), ("tuned", tuned)):
        scores, indices = Bm25Index(data.documents, settings).rank(data.queries, 10)
        run = {
            query: {data.document_ids[i]: float(s) for s, i in zip(score, index, strict=True) if i >= 0}
            for query, score, index in zip(data.query_ids, scores, indices, strict=True)
        }
        ndcg = ndcg_at_k(run, {query: data.qrels[query] for query in data.query_ids}, 10)
        summary["bm25"][name] = {"settings": str(settings), "queries": ndcg, **_means(ndcg)}
        means = _means(ndcg)
        print(f"BM25 {name}: nDCG@10 {means['ndcg']:.4f}, stdlib {means['stdlib']:.4f} ({settings})")


def _train(stage: str, size: str) -> None:
    """Start a stage as a user would."""
    torchrun = Path(sys.executable).with_name("torchrun")
    overrides = [*PARALLEL.get(stage, []), *(SHORT[stage] if size == "short" else [])]
    command = [
        "--standalone",
        "--nproc-per-node",
        str(PROCESSES),
        f"launch/{stage}.sh",
        "--config",
        f"configs/demo/{stage}.yaml",
    ]
    print(f"$ torchrun {' '.join([*command, *overrides])}", flush=True)
    _call([str(torchrun), *command, *overrides])


def _export() -> None:
    from megatron_conan.cli import main as conan

    status = conan(["export", str(DEMO / "finetune"), "--out", str(DEMO / "export")])
    if status:
        raise SystemExit(status)


def _index() -> None:
    """Embed every extracted function for `conan search`."""
    from megatron_conan.evaluation.search import build_search_index
    from megatron_conan.export.trained import load_run

    run = load_run(DEMO / "finetune")
    count = build_search_index(DEMO / "export", DATA / "search.jsonl", DEMO / "search", encode=run.embed)
    print(f"indexed {count:,} functions, held out of training or not")


def _ask(summary: dict[str, Any]) -> None:
    """The ten fixed questions over all functions."""
    from megatron_conan.evaluation.search import SearchIndex, hit_at_k

    index = SearchIndex(DEMO)
    report = hit_at_k(index, Path("configs/demo/questions.yaml"))
    summary["questions"] = [
        {
            "question": question,
            "hit": rank is not None,
            "rank": rank,
            "hits": [
                {"title": hit.title, "score": round(hit.score, 3)}
                for hit in index.search(question, k=5, stdlib_only=True)
            ],
        }
        for question, rank in report.ranks.items()
    ]
    summary["hit_at_10"] = report.rate


def _add_row(summary: dict[str, Any], stage: str) -> None:
    """The stage's line of the table, from what its run wrote."""
    rows = summary["stages"]
    folder = DEMO / stage
    for file in sorted((folder / "evaluation").glob("step_*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        name = "random weights" if result["step"] == 0 else stage
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
        last = [line["loss"] for line in lines[-10:]]
        row = {
            "stage": name,
            "loss": None if result["step"] == 0 else sum(last) / len(last),
            "ndcg": result["ndcg"],
            "ndcg_low": result["ndcg_interval"][0],
            "ndcg_high": result["ndcg_interval"][1],
            "recall": result["recall"],
            "stdlib": _means(result["queries"])["stdlib"],
            "bm25": summary["bm25"]["split"]["ndcg"],
            "seconds": None if result["step"] == 0 else summary["seconds"][stage],
        }
        rows[:] = [other for other in rows if other["stage"] != name] + [row]
    _write_summary(summary)


def _print_table(summary: dict[str, Any]) -> None:
    split, tuned = summary["bm25"]["split"], summary["bm25"]["tuned"]
    print(
        f"\n{'stage':<16}{'loss':>8}  {'nDCG@10 [95% interval]':<26}{'stdlib':>8}{'BM25':>8}{'tuned':>8}{'seconds':>9}"
    )
    for row in summary["stages"]:
        loss = "" if row["loss"] is None else f"{row['loss']:.3f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        interval = f"{row['ndcg']:.4f} [{row['ndcg_low']:.4f}, {row['ndcg_high']:.4f}]"
        bm25 = f"{split['ndcg']:>8.4f}{tuned['ndcg']:>8.4f}"
        print(f"{row['stage']:<16}{loss:>8}  {interval:<26}{row['stdlib']:>8.4f}{bm25}{seconds:>9}")
    print(f"BM25 on the stdlib queries: {split['stdlib']:.4f}, tuned {tuned['stdlib']:.4f}\n", flush=True)


def _finish(summary: dict[str, Any]) -> None:
    """report.html, the questions, and how to go on."""
    from megatron_conan.evaluation.report import write_report

    bm25 = {"identifiers split": summary["bm25"]["split"]["ndcg"], "tuned": summary["bm25"]["tuned"]["ndcg"]}
    report = {"stages": summary["stages"], "bm25": bm25, "questions": summary["questions"]}
    write_report({stage: DEMO / stage for stage in STAGES}, report, DEMO / "report.html", title="megatron_conan demo")
    print()
    for row in summary["questions"]:
        mark = f"rank {row['rank']}" if row["hit"] else "not in the first 10"
        print(f"{row['question']}  ({mark})")
        for hit in row["hits"][:3]:
            print(f"    {hit['score']:.3f}  {hit['title']}")
    total = sum(summary["seconds"].values())
    print(
        f"\nhit@10 {summary['hit_at_10']:.0%} of ten questions, ranked among the standard library's functions. The live search "
        f"covers every function, in held-out files or not (nDCG@10 above: held-out files only)\n{total:.0f} s in all: "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items())
        + f"\n\nreport       {DEMO}/report.html\nmodel        {DEMO}/export (loads with stock sentence-transformers)"
        f'\nsearch       .venv/bin/conan search {DEMO} "open a zip file"'
    )


def _means(queries: dict[str, float]) -> dict[str, float]:
    """Mean over all queries, and over those on the standard library."""
    stdlib = [score for query, score in queries.items() if query.startswith("stdlib")]
    return {"ndcg": sum(queries.values()) / len(queries), "stdlib": sum(stdlib) / len(stdlib)}


def _keep_other_size(size: str) -> None:
    """A finished demo of the other size is moved aside, not mixed with this one."""
    file = DEMO / "demo.json"
    if not file.exists():
        return
    other = json.loads(file.read_text(encoding="utf-8"))["size"]
    if other != size:
        aside = DEMO.with_name(f"demo-{other}")
        shutil.rmtree(aside, ignore_errors=True)
        DEMO.rename(aside)
        print(f"the {other} demo was moved to {aside}")


def _read_summary(size: str) -> dict[str, Any]:
    file = DEMO / "demo.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    return {"size": size, "seconds": {}, "stages": [], "bm25": {}, "questions": []}


def _write_summary(summary: dict[str, Any]) -> None:
    from megatron_conan.train.run_folder import write_atomically

    DEMO.mkdir(parents=True, exist_ok=True)
    write_atomically(DEMO / "demo.json", json.dumps(summary, indent=2) + "\n")


def _run(script: str, *arguments: str) -> None:
    print(f"$ python {script} {' '.join(arguments)}", flush=True)
    _call([sys.executable, script, *arguments])


def _call(command: list[str]) -> None:
    """Run a command with one thread a process; its failure ends the demo with its status."""
    status = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    if status:
        raise SystemExit(status)


def _headline(name: str) -> None:
    print(f"\n=== {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
