"""Which documents a line or row becomes: its text, or, of parallel rows, both texts in both orders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_conan.data.input_files import InputFile
from megatron_conan.data.text_files import (
    BadLine,
    Record,
    checked_text,
    decode_utf8,
    filled_text,
    parse_object,
    text_field,
)

FORMATS = ("text", "bitext")
_LANGUAGES_IN_NAME = re.compile(r"(?:^|[._])([A-Za-z]{2,4}(?:-[A-Z][A-Za-z]+)?)-([A-Za-z]{2,4}(?:-[A-Z][A-Za-z]+)?)$")
"""`tatoeba_deu-eng` -> deu, eng."""


@dataclass(frozen=True)
class DocumentFormat:
    """How records become documents."""

    kind: str = "text"
    """text: the text under a key. bitext: rows of `text1` and `text2`, each two documents, one in either order."""
    text_key: str = "text"
    languages: tuple[str, str] | None = None
    """bitext: languages of `text1` and `text2`, where rows have no `lang1` and `lang2`; else those in the file's name."""
    language_key: str | None = None
    """Key of the text's language, where that is wanted."""

    def check(self, files: Sequence[InputFile]) -> None:
        """Raise ValueError for settings that contradict each other or the files."""
        if self.kind not in FORMATS:
            raise ValueError(f"format={self.kind!r} is unknown; use one of {', '.join(FORMATS)}")
        if self.languages is not None and self.kind != "bitext":
            raise ValueError(f"languages={' '.join(self.languages)} are for parallel rows; they need --format bitext")
        plain = [file for file in files if file.format == ".txt"]
        if self.kind == "bitext" and plain:
            raise ValueError(f"input {plain[0].path}: lines of text are no parallel rows; give .jsonl or .parquet")

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys that are read."""
        if self.kind == "bitext":
            return "text1", "text2", "lang1", "lang2"
        return (self.text_key,) if self.language_key is None else (self.text_key, self.language_key)

    def texts(self, file: InputFile, record: Record) -> list[str] | None:
        """The documents of a record; None for a blank line. Raises BadLine."""
        if isinstance(record, bytes) and file.format == ".txt":
            return [decode_utf8(record)]
        row = parse_object(record)
        if row is None:
            return None
        return self._bitext(file, row) if self.kind == "bitext" else [text_field(row, self.text_key)]

    def language(self, file: InputFile, record: Record) -> str:
        """What the language of a record is called, after `texts` accepted it: as its row says, else by its file's name."""
        row = parse_object(record) if file.format != ".txt" else None
        if row is not None and self.kind == "bitext":
            return "-".join(sorted(self._languages(file, row)))
        named = row.get(self.language_key) if row is not None and self.language_key is not None else None
        return named if isinstance(named, str) and named else file.language

    def _bitext(self, file: InputFile, row: dict[str, Any]) -> list[str]:
        lines = [
            f"[{language}] {filled_text(row, key)}"
            for language, key in zip(self._languages(file, row), ("text1", "text2"), strict=True)
        ]
        return ["\n".join(lines), "\n".join(reversed(lines))]

    def _languages(self, file: InputFile, row: dict[str, Any]) -> tuple[str, str]:
        if row.get("lang1") is not None or row.get("lang2") is not None:
            return checked_text(row.get("lang1"), "lang1"), checked_text(row.get("lang2"), "lang2")
        if self.languages is not None:
            return self.languages
        named = _LANGUAGES_IN_NAME.search(file.language)
        if named is None:
            raise BadLine(
                "no languages",
                "the languages of text1 and text2 are not known; give --languages A B, rows with lang1 and lang2, or a "
                "file name that ends like deu-eng.jsonl",
            )
        return named[1], named[2]
