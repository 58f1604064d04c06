"""The compiled kernels: where the library is, what it was built from, and loading it into torch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
LIBRARY = HERE / "libsoft_mask_attention.so"


def digest(*parts: str | bytes) -> str:
    """SHA-256 of the parts and where they end."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def source_digest(folder: Path, patterns: Sequence[str] = ("*",)) -> str:
    """Of the names and contents of all files that match."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return digest(*(part for path in files for part in (path.name, path.read_bytes())))


def stamp_file(library: Path) -> Path:
    """Beside a library: what it was built from."""
    return library.with_suffix(".json")


def read_stamp(library: Path) -> dict[str, str]:
    """Digests and versions as `build` wrote them; {} for a library that isn't there or wasn't built by it."""
    return read_json(stamp_file(library)) if library.exists() else {}


def read_json(file: Path) -> dict[str, str]:
    """What `write_json` wrote; {} where nothing is, or something broken."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(file: Path, content: dict[str, str]) -> None:
    """All of it or nothing: a build may be interrupted."""
    temporary = file.with_suffix(f".{os.getpid()}.json")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)


def load(library: Path, sources: Path) -> str | None:
    """Loads a library of operators into torch. Returns why that can't be, with the remedy, or None."""
    if not library.exists():
        return "not built: run `make kernels`"
    built = read_stamp(library)
    if built.get("sources") != source_digest(sources):
        return f"{library.name} was built from other sources than are here: run `make kernels`"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (
            f"{library.name} was built with nvcc {built['nvcc']} for torch {built['torch']} and can't be loaded beside "
            f"torch {torch.__version__} ({error}): run `make kernels` here"
        )
    return None


@functools.cache
def _load_once() -> str | None:
    return load(LIBRARY, SOURCES)


@torch.compiler.assume_constant_result
def library_error() -> str | None:
    """Loads the kernels at the first call. Returns None if they are there, else the reason and the remedy."""
    return _load_once()
