"""Tokenising a corpus and opening pair tables: `python benchmarks/preprocess.py --data DIR`.

Questions: how much CPU time a token costs, against SentencePiece alone (the limit with that library, if every text is encoded
as it is) and against a pipeline of Megatron-LM's shape; how memory grows with the corpus; how long a pair table of 100 million
rows takes to open. Each measurement runs in a process of its own, the variants by turns. DIR/lm holds .jsonl files of documents
(key `text`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import sentencepiece
from recording import Row, in_fresh_process, print_table, write_record

from megatron_conan.data.command_line import run_tool
from megatron_conan.data.indexed_files import write_index
from megatron_conan.data.input_files import find_inputs
from megatron_conan.data.pair_files import PAIR_FORMAT
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.text_files import parse_object, read_all
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer

TEXT_TOKENS = 2
"""Tokens of each text of the generated table; opening doesn't read them."""
SECONDS = 1800.0
TOOL = Path(__file__).resolve().parents[1] / "data_tools" / "preprocess.py"
BLOCK = 1 << 22

_tokenizer: sentencepiece.SentencePieceProcessor | None = None


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def read_documents(data: Path) -> list[str]:
    """All texts."""
    return [row["text"] for file in find_inputs([data]) for row in read_all(file, parse_object)]


def measure_sentencepiece(data: Path, model: Path, output: Path, workers: int) -> dict[str, float]:
    """SentencePiece on texts that are in memory, one thread; its lists of numbers are thrown away."""
    texts, tokenizer = read_documents(data), Tokenizer(model)
    started, cpu = time.perf_counter(), cpu_seconds()
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return {"tokens": tokens, "cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - started}


def _megatron_start(model: Path) -> None:
    global _tokenizer
    _tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))


def _megatron_encode(line: str) -> tuple[list[int], int]:
    assert _tokenizer is not None
    return [*_tokenizer.encode(json.loads(line)["text"]), _tokenizer.eos_id()], len(line)


def measure_megatron(data: Path, model: Path, output: Path, workers: int) -> dict[str, float]:
    """Pool.imap over lines into megatron-core's builder; its import of torch is not counted."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    torch.set_num_threads(1)
    started, cpu = time.perf_counter(), cpu_seconds()
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(Tokenizer(model).size))
    tokens = 0
    for file in find_inputs([data]):
        pool = multiprocessing.get_context("fork").Pool(workers, initializer=_megatron_start, initargs=(model,))
        with file.path.open(encoding="utf-8") as lines:
            for ids, _ in pool.imap(_megatron_encode, lines, 32):
                builder.add_document(ids, [len(ids)])
                tokens += len(ids)
        pool.close()
        pool.join()
    builder.finalize(f"{output}.idx")
    return {"tokens": tokens, "cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - started}


def run_preprocess(data: Path, model: Path, output: Path, workers: int, *options: str) -> dict[str, float]:
    """This project's tool as a user starts it, all of it counted.

    Returns:
        `tokens`, `cpu` and `wall` seconds, and `memory`: the most MB that it and its processes had resident at one time, looked
        at every 20 ms.
    """
    paths = ["--input", str(data), "--tokenizer-model", str(model), "--output-prefix", str(output)]
    command = [sys.executable, str(TOOL), *paths, "--workers", str(workers), "--append-eod", *options]
    started, cpu, memory = time.perf_counter(), cpu_seconds(), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            memory = max(memory, resident_mb(process.pid))
            time.sleep(0.02)
        assert process.stderr is not None
        if process.returncode:
            raise ValueError(process.stderr.read())
    used = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - started, "memory": memory}
    return {"tokens": json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))["tokens"], **used}


def resident_mb(pid: int) -> float:
    """Memory of a process and its descendants now."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total / 1e6


def compare_speed(data: Path, model: Path, work: Path, workers: Sequence[int], repetitions: int) -> list[Row]:
    """CPU-seconds and wall time of each variant's fastest run, the variants by turns."""
    variants: list[tuple[str, Any, int]] = [("SentencePiece alone", measure_sentencepiece, 1)]
    variants += [(f"Megatron-shaped, {count} workers", measure_megatron, count) for count in workers]
    variants += [(f"preprocess.py, {count} workers", None, count) for count in workers]
    best: dict[str, dict[str, float]] = {}
    for _ in range(repetitions):
        for name, measure, count in variants:
            arguments = (data, model, work / "speed", count)
            found = in_fresh_process(SECONDS, measure, *arguments) if measure else run_preprocess(*arguments)
            if not isinstance(found, dict):
                raise ValueError(f"{name}: {found}")
            if name not in best or found["cpu"] < best[name]["cpu"]:
                best[name] = {**found, "wall": min(found["wall"], best.get(name, found)["wall"])}
    limit = best["SentencePiece alone"]
    rows = []
    for name, _, count in variants:
        found, peer = best[name], best.get(f"Megatron-shaped, {count} workers", limit)
        per_token = found["cpu"] / found["tokens"]
        rows.append(
            {
                "variant": name,
                "tokens": int(found["tokens"]),
                "CPU ns a token": per_token * 1e9,
                "tokens a CPU-second / SentencePiece's": limit["cpu"] / limit["tokens"] / per_token,
                "tokens a CPU-second / Megatron-shaped": peer["cpu"] / peer["tokens"] / per_token,
                "wall s": found["wall"],
                "tokens a second / Megatron-shaped": peer["wall"] / peer["tokens"] / (found["wall"] / found["tokens"]),
            }
        )
    return rows


def compare_memory(data: Path, model: Path, work: Path, factor: int) -> list[Row]:
    """Peak memory for a corpus, and for one `factor` times as large whose words differ from copy to copy."""
    texts = read_documents(data)
    sizes = {"corpus": 1, f"{factor} x the corpus": factor}
    rows, first = [], {}
    for name, copies in sizes.items():
        path = work / f"memory-{copies}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for copy in range(copies):
                for text in texts:
                    file.write(json.dumps({"text": rotated(text, copy)}, ensure_ascii=False) + "\n")
        for dedup, workers in ((False, 1), (False, 2), (True, 2)):
            found = run_preprocess(path, model, work / "memory", workers, *["--dedup"] * dedup)
            ratio = found["memory"] / first.setdefault((dedup, workers), found["memory"])
            rows.append(
                {
                    "documents": name,
                    "workers": workers,
                    "dedup": "yes" if dedup else "no",
                    "tokens": int(found["tokens"]),
                    "peak MB of all processes": found["memory"],
                    "/ that of the corpus": ratio,
                }
            )
        path.unlink()
    return rows


def rotated(text: str, by: int) -> str:
    """A text with the letters a to z moved on, so that copies of a corpus share no words."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return text.translate(str.maketrans(letters, letters[by:] + letters[:by]))


def write_table(prefix: Path, num_rows: int, tokenizer: Tokenizer) -> None:
    """Generated pair data: each row a query of its own and one of num_rows / 5 documents, two negatives."""
    num_documents = max(num_rows // 5, 1)
    num_texts = num_rows + num_documents
    write_index(
        prefix.with_name(prefix.name + ".idx"), np.broadcast_to(np.int32(TEXT_TOKENS), num_texts), np.dtype(np.uint16)
    )
    with prefix.with_name(prefix.name + ".bin").open("wb") as file:
        for start in range(0, num_texts, BLOCK):
            file.write(np.full(TEXT_TOKENS * min(BLOCK, num_texts - start), 300, np.uint16).data)

    def save(name: str, size: int, values: Any) -> None:
        path = prefix.with_name(f"{prefix.name}.{name}.npy")
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(size,))
        for start in range(0, size, BLOCK):
            array[start : start + BLOCK] = values(np.arange(start, min(start + BLOCK, size)))

    save("query", num_rows, lambda rows: rows)
    save("query_order", num_rows, lambda rows: rows)
    save("positives", num_rows, lambda rows: num_rows + rows % num_documents)
    save("positives_offsets", num_rows + 1, lambda rows: rows)
    save("negatives", 2 * num_rows, lambda rows: num_rows + (rows * 7919 + 1) % num_documents)
    save("negatives_offsets", num_rows + 1, lambda rows: 2 * rows)
    save("corpus", num_documents, lambda rows: num_rows + rows)
    summary = {"format": PAIR_FORMAT, "task": "retrieval", "rows": num_rows, "texts": num_texts}
    summary |= {"tokenizer_sha256": tokenizer.sha256, "tokenizer_size": tokenizer.size}
    prefix.with_name(prefix.name + ".json").write_text(json.dumps(summary), encoding="utf-8")


def measure_opening(prefix: Path, model: Path) -> dict[str, float]:
    """Seconds and MB that opening takes, and seconds of reading 1,000 rows with all their texts after that."""
    tokenizer = Tokenizer(model)
    before, started = resident_mb(os.getpid()), time.perf_counter()
    store = PairStore(prefix, tokenizer)
    seconds, grown = time.perf_counter() - started, resident_mb(os.getpid()) - before
    started = time.perf_counter()
    for row in np.random.default_rng(0).integers(0, store.num_rows, 1000):
        for text in (store.query(row), *store.positives(row), *store.negatives(row)):
            store.tokens(int(text))
    return {"seconds": seconds, "mb": grown, "reading": time.perf_counter() - started}


def compare_tables(model: Path, work: Path, sizes: Sequence[int]) -> list[Row]:
    """Opening generated tables of several sizes."""
    rows = []
    for size in sizes:
        folder = work / f"table-{size}"
        folder.mkdir()
        write_table(folder / "table", size, Tokenizer(model))
        found = in_fresh_process(SECONDS, measure_opening, folder / "table", model)
        if not isinstance(found, dict):
            raise ValueError(f"table of {size} rows: {found}")
        on_disk = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        rows.append(
            {
                "rows": size,
                "GB on disk": on_disk,
                "ms to open": found["seconds"] * 1e3,
                "MB to open": found["mb"],
                "us to read a row": found["reading"] * 1e3,
            }
        )
        shutil.rmtree(folder)
    return rows


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="external data; its lm/ is read")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes (default: 1 2)")
    parser.add_argument("--vocab-size", type=int, default=32000, help="of the tokenizer (default: 32000)")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each variant (default: 5)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 100_000_000], help="of the pair tables")
    parser.add_argument("--quick", action="store_true", help="one run each, 2 x the corpus, small tables")
    parser.add_argument("--work", type=Path, help="folder for files, some 10 GB (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="also write the tables as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    arguments = parse_arguments(argv)
    data = arguments.data / "lm"
    if not data.is_dir():
        raise ValueError(f"no external data at {data}; name the folder that holds lm/ with --data DIR")
    if arguments.quick:
        arguments.repetitions, arguments.rows = 1, [10_000, 1_000_000]
    tables: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        model = work / "tokenizer.model"
        model.write_bytes(train_tokenizer(read_documents(data), arguments.vocab_size))
        tables["speed"] = compare_speed(data, model, work, arguments.workers, arguments.repetitions)
        print_table("Tokenising", tables["speed"])
        tables["memory"] = compare_memory(data, model, work, 2 if arguments.quick else 10)
        print_table("Memory", tables["memory"])
        tables["tables"] = compare_tables(model, work, arguments.rows)
        print_table("Opening pair tables", tables["tables"])
    if arguments.output is not None:
        settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("work", "output")}
        write_record(arguments.output, settings, tables)


if __name__ == "__main__":
    sys.exit(run_tool(main))
