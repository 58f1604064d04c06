"""Files to look at with inspect_dataset.py, made by the real tools, and running it in this process."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_texts import DOCUMENTS, load_tool

from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.tokenizer import Tokenizer

TEXTS = [
    "",
    *DOCUMENTS,
    r"a|b \ c\n, <s> and </s> are text",
    DOCUMENTS[0],
    "",
    "tab\tand\r\nline\u2028end \x1b[31m",
    DOCUMENTS[0],
    DOCUMENTS[5],
    "€ ∑ 😀 <0xE4>",
    " ".join(DOCUMENTS),
]
RETRIEVAL = [
    {
        "query": f"question {i}?",
        "positive": [f"answer {i}", f"other {i}"][: 1 + i % 2],
        "negative": ["no", "never"][: i % 3],
    }
    for i in range(8)
]
STS = [{"text1": f"left {i}", "text2": f"right {i}", "score": i / 2} for i in range(6)]
CLASSES = [{"text": f"text {i}", "label": "abbac"[i % 5]} for i in range(15)]
SFT = [{"instruction": f"Do {i}.", "output": f"Done {i}."} for i in range(4)]
ROWS = {"retrieval": RETRIEVAL, "sts": STS, "classification": CLASSES, "sft": SFT}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_documents(folder: Path, tokenizer: Tokenizer, texts: Sequence[str], name: str = "corpus") -> Path:
    """Documents as preprocess.py writes them, each with EOS; returns the prefix."""
    source = write_rows(folder / f"{name}.jsonl", [{"text": text} for text in texts])
    preprocess_documents([source], tokenizer.path, folder / name, append_eod=True)
    return folder / name


def make_pairs(folder: Path, tokenizer: Tokenizer, task: str) -> Path:
    """The rows of a task as preprocess_pairs.py writes them; returns the prefix."""
    source = write_rows(folder / f"{task}.jsonl", ROWS[task])
    preprocess_pairs(task, [source], tokenizer.path, folder / task)
    return folder / task


def copy_files(prefix: Path, folder: Path) -> Path:
    """The files of a prefix in another folder; returns the new prefix."""
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        shutil.copy(path, folder)
    return folder / prefix.name


def edit_bytes(path: Path, offset: int, content: bytes) -> None:
    """Overwrite some bytes of a file."""
    whole = bytearray(path.read_bytes())
    assert offset + len(content) <= len(whole)
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)


def edit_array(path: Path, place: int, value: float) -> None:
    """Overwrite one value of an .npy file."""
    values = np.load(path)
    assert values[place] != value
    values[place] = value
    np.save(path, values)


def edit_summary(prefix: Path, **changes: Any) -> None:
    """Change P.json."""
    path = prefix.with_name(f"{prefix.name}.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run the tool. Returns (exit code, stdout); a user's mistake is raised."""
    capsys.readouterr()
    try:
        load_tool("inspect_dataset").main(list(map(str, arguments)))
    except SystemExit as error:
        return int(error.code or 0), capsys.readouterr().out
    return 0, capsys.readouterr().out


def damage(output: str) -> list[str]:
    """The findings, without the folder of the files."""
    found = [line.partition("damaged: ")[2].partition(": ") for line in output.splitlines() if "damaged: " in line]
    return [f"{Path(path).name}: {rest}" for path, _, rest in found]


def section(output: str, title: str) -> list[str]:
    """Lines under a title."""
    lines = output.splitlines()
    start = lines.index(title) + 1
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("  ") and lines[i]), len(lines))
    return [line.strip() for line in lines[start:end] if line]


def read_back(shown: str) -> str:
    """The text that `marked_tokens` shows, without special tokens."""
    content = b""
    for token in re.findall(r"(?:\\.|[^|\\])+", shown):
        byte = re.fullmatch(r"<0x(..)>", token)
        if byte:
            content += bytes.fromhex(byte[1])
        elif token != "</s>":
            escapes = re.compile(r"\\(\\|n|r|t|x..|u....)")
            text = escapes.sub(lambda found: found[0].encode().decode("unicode_escape"), token.replace("\\|", "|"))
            content += text.encode()
    return content.decode()
