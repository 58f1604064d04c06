"""Which files a tool reads: what was named (files, folders, globs) and how each is packed."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPRESSIONS = ("", ".gz", ".zst")
TEXT_FORMATS = (".jsonl", ".txt", ".parquet")
ROW_FORMATS = (".jsonl", ".parquet")
REJECTED = ".rejected.jsonl"
"""What a data tool writes beside its outputs ends so: no input, where a folder is one."""


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    path: Path
    format: str
    """.jsonl, .txt or .parquet."""
    compression: str
    """.gz, .zst or nothing."""
    size: int
    """Bytes, when it was found."""
    modified_ns: int
    """Time of its last change then."""

    def identity(self) -> dict[str, Any]:
        """By what a changed file is known: path, size and time of the last change."""
        return {"file": str(self.path.absolute()), "bytes": self.size, "modified_ns": self.modified_ns}

    def check_unchanged(self) -> None:
        """Raise ValueError if it is no longer what was found."""
        status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified_ns):
            raise ValueError(f"{self.path} changed while it was read; wait until it is whole, then run this again")

    @property
    def language(self) -> str:
        """The file's name without its endings: what its text is called where rows don't name a language."""
        return self.path.name.removesuffix(self.compression).removesuffix(self.format)


def find_inputs(names: Sequence[str | Path], formats: Sequence[str] = TEXT_FORMATS) -> list[InputFile]:
    """The files that some names stand for, in order; those of a folder or a pattern are sorted.

    Args:
        names: files; folders, of which all readable files at any depth are taken but hidden ones and lines that were
            rejected (`REJECTED`); patterns such as `crawl/**/*.jsonl.zst`.
        formats: of `TEXT_FORMATS` those that are wanted.

    Raises:
        ValueError: a name stands for nothing, a file is of another format, or comes twice.
    """
    found: dict[Path, InputFile] = {}
    for name in names:
        for path in _paths(Path(name), formats):
            file = _input_file(path, formats)
            resolved = path.resolve()
            if resolved in found:
                raise ValueError(f"input {path} is named twice (as {found[resolved].path} before); name it once")
            found[resolved] = file
    return list(found.values())


def _paths(name: Path, formats: Sequence[str]) -> list[Path]:
    if name.is_file():
        return [name]
    if name.is_dir():
        paths = sorted(
            path
            for path in name.rglob("*")
            if _format_of(path)[0] in formats and path.is_file() and not _passed_over(path, name)
        )
        if not paths:
            raise ValueError(f"input folder {name} holds no {_shown(formats)} file")
        return paths
    # Path.glob takes no absolute pattern
    paths = [Path(path) for path in sorted(glob.glob(str(name), recursive=True)) if Path(path).is_file()]  # noqa: PTH207
    if not paths:
        is_pattern = glob.has_magic(str(name))
        raise ValueError(f"input {name} {'matches no file' if is_pattern else 'does not exist or is not a file'}")
    return paths


def _passed_over(path: Path, folder: Path) -> bool:
    return path.name.endswith(REJECTED) or any(part.startswith(".") for part in path.relative_to(folder).parts)


def _input_file(path: Path, formats: Sequence[str]) -> InputFile:
    kind, compression = _format_of(path)
    if kind not in formats:
        raise ValueError(f"input {path}: unknown format {''.join(path.suffixes[-2:])!r}; use {_shown(formats)}")
    status = path.stat()
    return InputFile(path, kind, compression, status.st_size, status.st_mtime_ns)


def _format_of(path: Path) -> tuple[str, str]:
    """(format, compression) by the endings of a name; parquet is compressed within."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = Path(path.name.removesuffix(compression)).suffix
    return ("", "") if compression and kind == ".parquet" else (kind, compression)


def _shown(formats: Sequence[str]) -> str:
    text = [kind for kind in formats if kind != ".parquet"]
    other = " or .parquet" if ".parquet" in formats else ""
    return f"{', '.join(text)} (also .gz, .zst){other}" if text else ".parquet"
