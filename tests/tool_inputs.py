"""Input files of the data tools in every form, and what the tools made of them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_conan.data.indexed_files import IndexedFile
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer

FORMS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def small_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer of a few pieces, among them some of several spaces, in a file."""
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghäöü我们", k=rng.randint(1, 6))) for _ in range(500)]
    texts = [(" " * rng.choice((1, 1, 2, 4))).join(rng.choices(words, k=9)) for _ in range(500)]
    path.write_bytes(train_tokenizer(texts, 600))
    return Tokenizer(path)


def json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """The content of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_bytes(path: Path, content: bytes) -> Path:
    """Content in a file that is packed by its ending, as two members or frames."""
    half = len(content) // 2
    if path.suffix == ".gz":
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])
    if path.suffix == ".zst":
        content = b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))
    path.write_bytes(content)
    return path


def write_table(path: Path, table: pyarrow.Table, group: int = 3) -> Path:
    """A parquet file of row groups of `group` rows."""
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]], group: int = 3) -> Path:
    """Rows in a file of the form that its name ends in; of parquet in row groups of `group`."""
    if path.suffix == ".parquet":
        return write_table(path, pyarrow.Table.from_pylist(list(rows)), group)
    return write_bytes(path, json_lines(rows))


def outputs(prefix: Path) -> dict[str, bytes]:
    """All files of a prefix, by what their names end in."""
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*")}


def without_names(files: dict[str, bytes]) -> dict[str, bytes]:
    """The outputs without what tells inputs of other names apart: the summary and the rejected lines."""
    return {suffix: content for suffix, content in files.items() if suffix not in (".json", ".rejected.jsonl")}


def summary_of(prefix: Path) -> dict[str, Any]:
    """P.json."""
    content: dict[str, Any] = json.loads(prefix.with_name(f"{prefix.name}.json").read_text(encoding="utf-8"))
    return content


def rejected_of(prefix: Path) -> list[dict[str, Any]]:
    """The lines of P.rejected.jsonl."""
    path = prefix.with_name(f"{prefix.name}.rejected.jsonl")
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def decoded(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    """The texts of P.bin; EOS is no text."""
    file = IndexedFile(prefix)
    return [tokenizer.decode(file[i].tolist()) for i in range(len(file))]


def content_of(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder at any depth: the bytes of its files, None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
