#!/usr/bin/env python3
"""Make the demo's data from the Python installation this runs in: documented functions and their code.

    python data_tools/extract_code.py --output runs/demo/data [--size small] [--workers 2]

Reads the standard library and site-packages, holds out files (a quarter of the standard library, 8% of the rest), and
writes training texts of all four stages, a BEIR evaluation set of held-out functions, and the documents of the live search.
The same installation gives the same files, whatever the number of workers. Written into --output:

    lm.jsonl       {text, source}                 docstring and code of each training function; source: raw | prepared
    sft.jsonl      {instruction, input, output}   code -> first sentence, first sentence -> signature
    weak.jsonl     {query, positive}              name and arguments -> docstring
    train.jsonl    {query, positive}              first sentence of the docstring -> code without it
    eval/          corpus.jsonl, queries.jsonl, qrels/test.tsv in BEIR's layout: held-out functions, prepared; the ids of
                   standard library functions start with `stdlib`; `raw` keeps the text as it was
    search.jsonl   {id, title, file, line, text (prepared), code (raw, cut), held_out}   every documented function read
    summary.json   counts

Training rows also carry `raw` (not prepared), `name`, `file` and `package`.
"""

import argparse
import json
import multiprocessing
import os
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from megatron_conan.data.code_functions import (
    STDLIB,
    CodeFunction,
    SourceFile,
    is_skipped,
    read_functions,
    stable_fraction,
)
from megatron_conan.data.code_split import CodeSplit, split_functions
from megatron_conan.data.prepare import prepare_code, prepare_query

RAW_SHARE = 0.15  # of training texts that stay raw, so that the model also ranks code nobody prepared
SFT_SHARE = 0.25  # of training functions that become an instruction row
SIZES = {"full": 60_000, "small": 24_000}  # usable functions after which no further file is read
FILES_PER_JOB = 32
PROGRESS_SECONDS = 5.0
SFT_CODE_CHARACTERS = 600
SNIPPET_CHARACTERS = 600  # of raw code kept for showing a search hit

Row = dict[str, Any]


def list_files(packages: list[str] | None) -> list[SourceFile]:
    """Source files to read: the standard library by path, then the files of all packages mixed by a stable hash.

    The mixed order makes any cut after N functions a sample over all packages.

    Args:
        packages: top-level names to keep (a standard library module or a package of site-packages); None for all.
    """
    roots = sysconfig.get_paths()
    site = dict.fromkeys(os.path.realpath(roots[key]) for key in ("purelib", "platlib"))
    stdlib = [SourceFile(STDLIB, root, file) for root, file in _python_files(os.path.realpath(roots["stdlib"]))]
    others = [
        SourceFile(file.partition("/")[0].removesuffix(".py"), root, file)
        for directory in site
        for root, file in _python_files(directory)
    ]
    if packages:
        wanted = set(packages)
        stdlib = [f for f in stdlib if f.file.partition("/")[0].removesuffix(".py") in wanted or STDLIB in wanted]
        others = [f for f in others if f.package in wanted]
        found = {f.file.partition("/")[0].removesuffix(".py") for f in stdlib} | {f.package for f in (*stdlib, *others)}
        if missing := sorted(wanted - found):
            raise ValueError(f"no Python files of {', '.join(missing)} in this installation; check --package")
    return stdlib + sorted(others, key=lambda f: (stable_fraction("order", f.file), f.file))


def _python_files(root: str) -> Iterator[tuple[str, str]]:
    for directory, folders, files in os.walk(root):
        relative = os.path.relpath(directory, root).replace(os.sep, "/")
        prefix = "" if relative == "." else relative + "/"
        folders[:] = sorted(f for f in folders if f != "__pycache__" and not is_skipped(prefix + f))
        yield from ((root, prefix + f) for f in sorted(files) if f.endswith(".py") and not is_skipped(prefix + f))


def read_all(files: list[SourceFile], workers: int, max_functions: int) -> tuple[list[CodeFunction], int, int]:
    """Read files in order until `max_functions` usable functions are there.

    Returns:
        All functions of the files read; the number of files read; how many of those did not parse.
    """
    functions: list[CodeFunction] = []
    num_usable = num_read = num_unparsable = 0
    start = shown = time.monotonic()
    # spawn: forking a process that has threads (a test run, a notebook) can deadlock
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) if workers > 1 else None
    try:
        results = pool.map(read_functions, files, chunksize=FILES_PER_JOB) if pool else map(read_functions, files)
        for result in results:
            num_read += 1
            if result is None:
                num_unparsable += 1
                continue
            functions.extend(result)
            num_usable += sum(f.usable for f in result)
            if num_usable >= max_functions:
                break
            if time.monotonic() >= shown + PROGRESS_SECONDS:
                shown = time.monotonic()
                _report(num_read, num_usable, shown - start, max(num_usable / max_functions, num_read / len(files)))
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return functions, num_read, num_unparsable


def _report(num_files: int, num_functions: int, seconds: float, done: float) -> None:
    remaining = seconds / done * (1 - done)
    print(
        f"extract: {num_files} files, {num_functions} functions, {seconds:.0f} s, about {remaining:.0f} s left",
        file=sys.stderr,
        flush=True,
    )


def training_rows(function: CodeFunction) -> dict[str, Row]:
    """Rows of one training function by file name; which of them stay raw depends on its name alone."""
    provenance = {"name": function.name, "file": function.file, "package": function.package}
    raw = {key: stable_fraction("raw", key, function.name) < RAW_SHARE for key in ("lm", "sft", "weak", "train")}

    def query(key: str, text: str) -> str:
        return text if raw[key] else prepare_query(text)

    code = {key: function.code if raw[key] else function.prepared_code for key in raw}
    rows = {
        "lm": {
            "text": f"{query('lm', function.docstring)}\n{code['lm']}",
            "source": "raw" if raw["lm"] else "prepared",
        },
        "train": {"query": query("train", function.query), "positive": code["train"]},
        "weak": {"query": query("weak", function.signature), "positive": query("weak", function.docstring)},
    }
    choice = stable_fraction("sft", function.name)
    if choice < SFT_SHARE / 2:
        rows["sft"] = {
            "instruction": query("sft", "Describe what this Python code does."),
            "input": code["sft"][:SFT_CODE_CHARACTERS],
            "output": query("sft", function.query),
        }
    elif choice < SFT_SHARE:
        rows["sft"] = {
            "instruction": query("sft", "Write the signature of a Python function for this purpose."),
            "input": query("sft", function.query),
            "output": query("sft", function.signature),
        }
    return {key: {**row, "raw": raw[key], **provenance} for key, row in rows.items()}


def evaluation_id(function: CodeFunction) -> str:
    """Identifier of a held-out function: starts with `stdlib` exactly for the standard library."""
    scope = STDLIB if function.package == STDLIB else "other"
    return f"{scope}:{function.file}:{function.line}"


def search_row(function: CodeFunction) -> Row:
    """The live search's document of one function, held out or not: qualified name and code, but no documentation."""
    return {
        "id": f"{function.package}:{function.file}:{function.line}",
        "title": function.name,
        "file": function.file,
        "line": function.line,
        "text": prepare_code(f"{function.name}\n{function.code}"),
        "code": function.code[:SNIPPET_CHARACTERS],
        "held_out": function.held_out,
    }


def write_all(output: Path, functions: list[CodeFunction], split: CodeSplit) -> dict[str, int]:
    """Write every data file; returns the number of rows of each."""
    rows = [training_rows(function) for function in split.training]
    counts = {}
    for key in ("lm", "sft", "weak", "train"):
        counts[f"{key}.jsonl"] = write_jsonl(output / f"{key}.jsonl", (row[key] for row in rows if key in row))
    ids = {id(f): evaluation_id(f) for f in split.held_out}
    documents = (
        {"_id": ids[id(f)], "title": "", "text": f.prepared_code, "raw": f.code, "name": f.name, "file": f.file}
        for f in split.held_out
    )
    queries = (
        {"_id": ids[id(f)], "text": f.prepared_query, "raw": f.query, "name": f.name, "file": f.file}
        for f in split.test_queries
    )
    counts["eval/corpus.jsonl"] = write_jsonl(output / "eval" / "corpus.jsonl", documents)
    counts["eval/queries.jsonl"] = write_jsonl(output / "eval" / "queries.jsonl", queries)
    judgements = "".join(f"{ids[id(f)]}\t{ids[id(f)]}\t1\n" for f in split.test_queries)
    write_text(output / "eval" / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore\n", judgements])
    counts["search.jsonl"] = write_jsonl(output / "search.jsonl", (search_row(f) for f in functions if f.prepared_code))
    return counts


def write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON lines and return their number."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, lines)
    return len(lines)


def write_text(path: Path, lines: Iterable[str]) -> None:
    """Write a file whole: to a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.writelines(lines)
    temporary.replace(path)


def extract(
    output: Path, *, packages: list[str] | None, workers: int, max_functions: int, num_queries: int
) -> dict[str, Any]:
    """Do the whole extraction; returns the summary that is also written to `output/summary.json`."""
    start = time.monotonic()
    files = list_files(packages)
    functions, num_read, num_unparsable = read_all(files, workers, max_functions)
    usable = [f for f in functions if f.usable]
    split = split_functions(usable, num_queries)
    if not split.training or not split.held_out:
        raise ValueError(
            f"{len(usable)} usable functions gave {len(split.training)} for training and {len(split.held_out)} held-out"
            " ones; both must be there: name more packages with --package or leave it out"
        )
    counts = write_all(output, functions, split)
    by_package: dict[str, int] = {}
    for function in split.training:
        by_package[function.package] = by_package.get(function.package, 0) + 1
    summary = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "max_functions": max_functions,
        "files": {"found": len(files), "read": num_read, "unparsable": num_unparsable},
        "functions": {
            "documented": len(functions),
            "usable": len(usable),
            "duplicates": split.num_duplicates,
            "near_duplicates_of_held_out": split.num_near_duplicates,
            "training": len(split.training),
            "held_out": len(split.held_out),
        },
        "rows": counts,
        "test_queries": {
            "stdlib": sum(f.package == STDLIB for f in split.test_queries),
            "others": sum(f.package != STDLIB for f in split.test_queries),
        },
        "training_by_package": dict(sorted(by_package.items(), key=lambda item: (-item[1], item[0]))),
        "raw_share": RAW_SHARE,
    }
    write_text(output / "summary.json", [json.dumps(summary, indent=2) + "\n"])
    print(f"extract: {time.monotonic() - start:.0f} s in all", file=sys.stderr)
    return summary


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--package", nargs="+", action="extend", help="only these modules or packages (default: all)")
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="small reads fewer files")
    parser.add_argument("--max-functions", type=int, help="read no further file after this many (default: by --size)")
    parser.add_argument("--num-queries", type=int, default=500, help="test queries of the stdlib, and of the rest")
    parser.add_argument("--workers", type=int, default=2, help="processes that parse files")
    options = parser.parse_args(arguments)
    try:
        summary = extract(
            options.output,
            packages=options.package,
            workers=options.workers,
            max_functions=options.max_functions or SIZES[options.size],
            num_queries=options.num_queries,
        )
    except ValueError as error:
        sys.exit(f"extract_code.py: {error}")
    print(json.dumps({key: summary[key] for key in ("files", "functions", "rows", "test_queries")}, indent=2))


if __name__ == "__main__":
    main()
