"""Hard-negative mining against sentence-transformers, over ranks, and beside training. `python benchmarks/mining.py`.

1. peer: `mine_hard_negatives` (with faiss, and with plain torch) and `conan mine`'s code on the same exported model and the
   same file of rows, each in a process of its own: candidates, CPU-seconds, and by how much memory grew at most once the
   model was loaded.
2. ranks: the search alone, over one and two ranks of one thread each, against faiss's own flat index over everything and the
   matrix product that is its limit; what is not faiss (exchange, merge, settling ties) as a share.
3. share: mining as a share of training time, as a curve over the number of documents.

Texts and weights are the demo's (`make demo` leaves them in runs/demo).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from recording import (
    Row,
    gemm_flops_per_second,
    in_fresh_process,
    least_cpu_seconds,
    memory_growth,
    print_table,
    write_record,
)

from megatron_conan.data.command_line import run_tool
from megatron_conan.parallel import hide_engine_warnings

ROOT = Path(__file__).resolve().parents[1]
NUM_NEGATIVES, WINDOW, MARGIN = 7, 100, 0.95
QUERIES_A_DOCUMENT = 0.25
SECONDS = 3600.0


def make_rows(demo: Path, folder: Path, num_documents: int) -> tuple[Path, Path]:
    """Rows of a query and its positive, and a file of all documents: functions of the demo's Python files."""
    rows_file, corpus_file = folder / f"rows_{num_documents}.jsonl", folder / f"corpus_{num_documents}.jsonl"
    documents: dict[str, None] = {}
    queries: dict[str, str] = {}
    for row in _objects(demo / "data" / "train.jsonl"):
        if len(queries) < num_documents * QUERIES_A_DOCUMENT and row["query"] not in queries:
            queries[row["query"]] = row["positive"]
            documents[row["positive"]] = None
    for file, key in (("search.jsonl", "code"), ("train.jsonl", "positive"), ("weak.jsonl", "positive")):
        for row in _objects(demo / "data" / file):
            if len(documents) == num_documents:
                break
            documents[row[key]] = None
    if len(documents) < num_documents:
        raise ValueError(f"the demo's data hold {len(documents):,} documents only; ask for fewer")
    rows_file.write_text("".join(json.dumps({"query": q, "positive": p}) + "\n" for q, p in queries.items()))
    corpus_file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return rows_file, corpus_file


def peer_mine(model_dir: Path, rows: Path, corpus: Path, use_faiss: bool, batch_size: int) -> dict[str, Any]:
    """sentence-transformers' miner, from files to negatives."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    _threads()
    model = SentenceTransformer(str(model_dir), device="cpu", local_files_only=True)
    model.encode(["first use"])
    mined: dict[str, list[str]] = {}

    def mine() -> None:
        pairs = [(row["query"], row["positive"]) for row in _objects(rows)]
        result = mine_hard_negatives(
            Dataset.from_dict({"anchor": [q for q, _ in pairs], "positive": [p for _, p in pairs]}),
            model,
            corpus=[row["text"] for row in _objects(corpus)],
            range_max=WINDOW,
            relative_margin=1 - MARGIN,
            num_negatives=NUM_NEGATIVES,
            output_format="triplet",
            batch_size=batch_size,
            use_faiss=use_faiss,
            verbose=False,
        )
        for query, negative in zip(result["anchor"], result["negative"], strict=True):
            mined.setdefault(query, []).append(negative)

    growth = memory_growth(lambda: _quietly(mine), keeping=True)
    return {**growth, "negatives": mined}


def our_mine(model_dir: Path, rows: Path, corpus: Path, max_tokens: int | None, scratch: bool) -> dict[str, Any]:
    """`conan mine`'s code, from files to negatives."""
    hide_engine_warnings()
    from megatron_conan.export.text_models import FolderModel, RunModel
    from megatron_conan.mining.offline import MineRequest, mine_files
    from megatron_conan.mining.select import SelectionSettings

    _threads()
    model = RunModel.load(model_dir) if (model_dir / "config.yaml").exists() else FolderModel(model_dir)
    model.prepare(["first use"], "query", None).embed([np.array([0])])
    with tempfile.TemporaryDirectory(dir=rows.parent) as folder:
        request = MineRequest(
            [rows],
            Path(folder) / "mined",
            SelectionSettings(NUM_NEGATIVES, WINDOW, margin=MARGIN),
            corpus=[corpus],
            max_tokens=max_tokens,
            scratch_dir=Path(folder) / "scratch" if scratch else None,
        )
        growth = memory_growth(lambda: _quietly(lambda: mine_files(request, lambda: model)), keeping=True)
        mined = {row["query"]: row["negative"] for row in _objects(Path(folder) / "mined.jsonl")}
    return {**growth, "negatives": mined}


def compare_miners(arguments: argparse.Namespace, num_documents: int) -> list[Row]:
    """Every miner on the same rows; ratios to the peer with faiss."""
    from megatron_conan.cli import main as conan

    export = arguments.work / "export"
    if not export.exists():
        code = in_fresh_process(SECONDS, _quietly_call, conan, ["export", str(arguments.run), "--out", str(export)])
        if code != 0:
            raise ValueError(f"`conan export {arguments.run} --out {export}` failed ({code})")
    rows, corpus = make_rows(arguments.demo, arguments.work, num_documents)
    miners: dict[str, tuple[Any, ...]] = {
        "mine_hard_negatives, faiss": (peer_mine, export, rows, corpus, True, 32),
        "mine_hard_negatives, torch": (peer_mine, export, rows, corpus, False, 32),
        "conan mine, run": (our_mine, arguments.run, rows, corpus, arguments.max_tokens, False),
        "conan mine, run, embeddings on disk": (our_mine, arguments.run, rows, corpus, arguments.max_tokens, True),
        "conan mine, exported folder": (our_mine, export, rows, corpus, arguments.max_tokens, False),
    }
    results: dict[str, dict[str, Any] | str] = {}
    for name, (function, *parameters) in miners.items():
        results[name] = in_fresh_process(SECONDS, function, *parameters)
        print(f"{num_documents:,} documents: {name} done", flush=True)
    peer = results["mine_hard_negatives, faiss"]
    assert not isinstance(peer, str), peer
    table: list[Row] = []
    for name, result in results.items():
        row: Row = {"documents": num_documents, "queries": len(peer["negatives"]), "miner": name}
        if isinstance(result, str):  # for example, killed for memory
            columns = ("CPU-s", "/ faiss", "MB", "/ faiss's", "same lists", "same sets")
            table.append({**row, **dict.fromkeys(columns, result)})
            continue
        pairs = [(result["negatives"].get(query, []), found) for query, found in peer["negatives"].items()]
        same = {
            "same lists": np.mean([a == b for a, b in pairs]),
            "same sets": np.mean([set(a) == set(b) for a, b in pairs]),
        }
        row |= {"CPU-s": result["cpu_seconds"], "/ faiss": result["cpu_seconds"] / peer["cpu_seconds"]}
        row |= {"MB": result["mb"], "/ faiss's": result["mb"] / peer["mb"]}
        row |= {name: float(share) for name, share in same.items()}
        table.append(row)
    return table


def search_over_ranks(num_documents: int, num_queries: int, width: int, k: int) -> list[Row]:
    """The search alone: random unit vectors, on one rank and on two, one thread each."""
    size = (num_documents, num_queries, width, k)
    flat = in_fresh_process(SECONDS, flat_search, *size)
    table: list[Row] = [{"search": "faiss IndexFlatIP", "ranks": 1, **flat}]
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            processes = torch.multiprocessing.spawn(_search_rank, (ranks, folder, *size), ranks, join=False)
            assert processes is not None
            while not processes.join():
                pass
            parts = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
        cpu, local = (sum(part[name] for part in parts) for name in ("cpu", "local"))
        table.append(
            {
                "search": "ShardedIndex",
                "ranks": ranks,
                "CPU-s": cpu,
                "wall s": max(part["wall"] for part in parts),
                "not faiss": 1 - local / cpu,
                "merge": sum(part["merge"] for part in parts) / cpu,
            }
        )
    limit = 2 * num_documents * num_queries * width / in_fresh_process(SECONDS, _gemm_rate)
    columns = ("search", "ranks", "CPU-s", "wall s", "not faiss", "merge")
    return [
        {
            **{column: row.get(column, "") for column in columns},
            "CPU / flat": row["CPU-s"] / flat["CPU-s"],
            "wall / flat": row["wall s"] / flat["wall s"],
            "CPU / its product": row["CPU-s"] / limit,
        }
        for row in table
    ]


def flat_search(num_documents: int, num_queries: int, width: int, k: int) -> Row:
    """What a user would write: one faiss index over everything, one thread."""
    import faiss

    _threads(1)
    documents, queries = _unit_vectors(num_documents, width, 0), _unit_vectors(num_queries, width, 1)
    index = faiss.IndexFlatIP(width)
    index.add(documents)
    started = time.monotonic()
    seconds = least_cpu_seconds({"search": lambda: index.search(queries, k)}, 1)["search"]
    return {"CPU-s": seconds, "wall s": time.monotonic() - started}


def _search_rank(rank: int, ranks: int, folder: str, num_documents: int, num_queries: int, width: int, k: int) -> None:
    """One rank's share of documents and queries; writes its seconds."""
    hide_engine_warnings()
    from megatron_conan.config.tree import ParallelConfig
    from megatron_conan.mining import shards
    from megatron_conan.mining.encode import EmbeddedTexts
    from megatron_conan.parallel.context import build_context, destroy_context, initialize_distributed

    _threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": "29533"}
    context = build_context(ParallelConfig(), initialize_distributed())
    ids = np.arange(rank, num_documents, ranks)
    documents = EmbeddedTexts(ids, _unit_vectors(num_documents, width, 0)[ids])
    queries = _unit_vectors(num_queries, width, 1)[rank::ranks]
    index = shards.ShardedIndex(documents, context)
    spent = {"local": 0.0, "merge": 0.0}
    index._search.search = _counted(index._search.search, spent, "local")  # type: ignore[method-assign]
    canonical_top = shards.canonical_top
    shards.canonical_top = _counted(canonical_top, spent, "merge")
    dist.barrier()
    wall, cpu = time.monotonic(), time.process_time()
    for _ in index.search_blocks(queries, np.full(len(queries), k)):
        pass
    seconds = {"cpu": time.process_time() - cpu, "wall": time.monotonic() - wall, **spent}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seconds))
    destroy_context()


def share_of_training(arguments: argparse.Namespace, num_documents: int, intervals: Sequence[int]) -> Row:
    """Real training steps with a mining before the first, on a corpus of some size."""
    result = in_fresh_process(SECONDS, _train_with_mining, arguments.demo, arguments.work, num_documents)
    if isinstance(result, str):
        raise ValueError(f"training with {num_documents:,} documents: {result}")
    step, mining = result["step_seconds"], result["mining"]
    row: Row = {"documents": num_documents, "queries": mining["num_queries"], "mining s": mining["seconds"]}
    row |= {"of it documents": mining["document_seconds"] / mining["seconds"], "step s": step}
    row["mining / step"] = mining["seconds"] / step
    shares = {f"share, every {n}": mining["seconds"] / (mining["seconds"] + n * step) for n in intervals}
    return {**row, **shares}


def _train_with_mining(demo: Path, work: Path, num_documents: int) -> dict[str, Any]:
    hide_engine_warnings()
    from megatron_conan.config import load_config
    from megatron_conan.data.pair_files import preprocess_pairs
    from megatron_conan.main import run

    rows, corpus = make_rows(demo, work, num_documents)
    folder = Path(tempfile.mkdtemp(dir=work))
    tokenizer = demo / "data" / "tokenizer.model"
    with contextlib.redirect_stderr(io.StringIO()):
        preprocess_pairs("retrieval", [rows], tokenizer, folder / "pairs", corpus=[corpus])
        config = load_config(
            ROOT / "configs" / "demo" / "finetune.yaml",
            [
                f"run_dir={folder / 'run'}",
                f"tokenizer.model={tokenizer}",
                f"data.sources=[{{prefix: {folder / 'pairs'}}}]",
                f"checkpoint.init_from={demo / 'weak'}",
                "train.steps=12",
                "train.log_every=1",
                "evaluation=null",
                "mining.every=12",
            ],
        )
        run(config)
    steps = [row["step_seconds"] for row in _objects(folder / "run" / "metrics.jsonl")]
    mining = next(_objects(folder / "run" / "negatives" / "mining.jsonl"))
    return {"step_seconds": float(np.median(steps[2:])), "mining": mining}


def _counted(call: Any, spent: dict[str, float], name: str) -> Any:
    """The call, adding its CPU-seconds to `spent`."""

    def counted(*values: Any) -> Any:
        started = time.process_time()
        result = call(*values)
        spent[name] += time.process_time() - started
        return result

    return counted


def _unit_vectors(count: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _gemm_rate() -> float:
    _threads(1)
    return gemm_flops_per_second()


def _threads(number: int | None = None) -> None:
    """Let torch and faiss use the same number of threads; all cores if not given."""
    import faiss

    number = number or os.cpu_count() or 1
    torch.set_num_threads(number)
    faiss.omp_set_num_threads(number)


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _quietly(call: Any) -> Any:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return call()


def _quietly_call(function: Any, argument: Any) -> Any:
    return _quietly(lambda: function(argument))


def main(argv: Sequence[str]) -> None:
    """Measure and print. Raises ValueError for a user's mistake."""
    parser = argparse.ArgumentParser(description="Mining of hard negatives: speed and memory.")
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo", help="the demo's folder")
    parser.add_argument("--run", type=Path, help="trained run (default: finetune in the demo's folder)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "mining_benchmark", help="for what is made")
    parser.add_argument("--documents", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--curve", type=int, nargs="+", default=[5_000, 20_000, 80_000])
    parser.add_argument("--max-tokens", type=int, help="of one encoding batch of `conan mine` (default: its own)")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    arguments.run = arguments.run or arguments.demo / "finetune"
    if not (arguments.run / "checkpoints" / "latest").exists() or not (arguments.demo / "data").is_dir():
        raise ValueError(
            f"{arguments.run} holds no checkpoint, or {arguments.demo / 'data'} no data; `make demo` makes them"
        )
    if arguments.quick:
        arguments.documents, arguments.curve = [5_000], [5_000]
    arguments.work.mkdir(parents=True, exist_ok=True)
    tables = {"peer": [row for size in arguments.documents for row in compare_miners(arguments, size)]}
    print_table("Against sentence-transformers' miner", tables["peer"])
    size = (5_000, 2_000) if arguments.quick else (100_000, 20_000)
    tables["ranks"] = search_over_ranks(*size, 256, WINDOW + 2)
    print_table(
        f"Search alone, {size[0]:,} documents, {size[1]:,} queries, 256 dimensions, k={WINDOW + 2}", tables["ranks"]
    )
    tables["share"] = [share_of_training(arguments, size, (120, 350, 1000)) for size in arguments.curve]
    print_table("Mining as a share of training time", tables["share"])
    if arguments.output:
        settings = {"documents": arguments.documents, "curve": arguments.curve, "max_tokens": arguments.max_tokens}
        write_record(arguments.output, settings, tables)


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
