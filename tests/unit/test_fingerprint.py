"""Data that changed under a run: every file and every kind of change is seen and named; large files take no time."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from pair_stores import random_rows, write_store
from sample_texts import DOCUMENTS

from megatron_conan.config import RunConfig, parse_config
from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.fingerprint import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    check_same_data,
    data_fingerprints,
    file_fingerprint,
)
from megatron_conan.data.tokenizer import Tokenizer

SFT_ROWS = [{"instruction": f"say {i}", "output": f"{i}"} for i in range(9)]


def run_config(stage: str, *prefixes: Path) -> RunConfig:
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_query_groups": 1, "ffn_hidden_size": 8}
    tree: dict[str, Any] = {
        "stage": stage,
        "run_dir": "runs/x",
        "model": {**model, "vocab_size": 512, "max_seq_length": 32},
        "tokenizer": {"model": "t.model"},
        "data": {"sources": [{"prefix": str(prefix)} for prefix in prefixes]},
        "train": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
        "optimizer": {"lr": 1e-3},
    }
    return parse_config(tree, origin="test")


def write_source(folder: Path, task: str, tokenizer: Tokenizer) -> Path:
    """The prefix of a source, in a folder that holds nothing else but its text."""
    folder.mkdir()
    if task == "documents":
        (folder / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
        preprocess_documents([folder / "d.jsonl"], tokenizer.path, folder / "d", append_eod=True)
    else:
        write_store(folder, "d", tokenizer, task, SFT_ROWS if task == "sft" else random_rows(task, 3))
    return folder / "d"


@pytest.mark.parametrize("task", ["documents", "retrieval", "sts", "sft", "classification"])
def test_every_file_of_a_source_counts(task: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Exactly the files that preprocessing wrote; one byte of any of them, one more, or none of it left is refused."""
    prefix = write_source(tmp_path / "data", task, tokenizer)
    config = run_config({"documents": "pretrain", "sft": "sft"}.get(task, "finetune"), prefix)
    saved = json.loads(json.dumps(data_fingerprints(config)))
    written = {file.name for file in prefix.parent.iterdir()} - {"d.jsonl"}
    assert set(saved["data.sources.0"]) == written
    check_same_data(saved, data_fingerprints(config))
    for name in sorted(written):
        file = prefix.with_name(name)
        content = file.read_bytes()
        size = len(content)
        changes = {
            "has other content of the same size": content[:-1] + bytes([content[-1] ^ 1]),
            f"had {size:,} bytes, now {size + 1:,}": content + b"\0",
            "is gone": None,
        }
        for said, changed in changes.items():
            file.unlink() if changed is None else file.write_bytes(changed)
            with pytest.raises(ValueError, match="Bring the old files back, or give another run_dir") as error:
                check_same_data(saved, data_fingerprints(config))
            assert f"data.sources.0: {name} {said}." in str(error.value)
        file.write_bytes(content)
    check_same_data(saved, data_fingerprints(config))


def test_data_that_moved_is_the_same_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Neither folder nor times count; files of others beside it neither."""
    prefix = write_source(tmp_path / "data", "retrieval", tokenizer)
    saved = data_fingerprints(run_config("finetune", prefix))
    shutil.copytree(prefix.parent, tmp_path / "moved")
    for file in (tmp_path / "moved").iterdir():
        os.utime(file, (1, 1))
    (tmp_path / "moved" / "d.mined.jsonl").write_text("{}\n")
    check_same_data(saved, data_fingerprints(run_config("finetune", tmp_path / "moved" / "d")))


def test_all_changes_are_told_at_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A source changed, another one exchanged: both are named. A source that came is a difference, too."""
    prefixes = [write_source(tmp_path / name, task, tokenizer) for name, task in (("a", "retrieval"), ("b", "sts"))]
    config = run_config("finetune", *prefixes)
    saved = data_fingerprints(config)
    (tmp_path / "a" / "d.bin").write_bytes(b"")
    (tmp_path / "b" / "d.score.npy").unlink()
    with pytest.raises(ValueError, match=r"data\.sources\.0: d\.bin had .*; data\.sources\.1: d\.score\.npy is gone"):
        check_same_data(saved, data_fingerprints(config))
    with pytest.raises(ValueError, match=r"data\.sources\.1: d\.bin was not there then"):
        check_same_data({"data.sources.0": saved["data.sources.0"]}, saved)


def test_a_corpus_written_anew_is_seen_between_the_blocks_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """P.json tells all tokens apart, wherever in P.bin they lie."""
    prefix = write_source(tmp_path / "data", "documents", tokenizer)
    saved = data_fingerprints(run_config("pretrain", prefix))
    texts = [json.loads(line)["text"] for line in (tmp_path / "data" / "d.jsonl").read_text().splitlines()]
    middle = len(texts) // 2
    texts[middle], texts[middle + 1] = texts[middle + 1], texts[middle]
    (tmp_path / "data" / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess_documents([tmp_path / "data" / "d.jsonl"], tokenizer.path, prefix, append_eod=True)
    with pytest.raises(ValueError, match=r"d\.json has other content"):
        check_same_data(saved, data_fingerprints(run_config("pretrain", prefix)))


def test_terabytes_take_no_time(tmp_path: Path) -> None:
    """Reading all of it would take minutes. The first and the last byte count, and the blocks between."""
    file = tmp_path / "huge.bin"
    size = (1 << 40) + 12345
    with file.open("wb") as stream:
        stream.truncate(size)  # takes no room
    before = file_fingerprint(file)
    assert before["bytes"] == size
    starts = [i * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1) for i in range(NUM_BLOCKS)]
    inside = random.Random(1).choices(starts, k=3)
    for place in (0, *(start + BLOCK_BYTES // 2 for start in inside), size - 1):
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"\1")
        after = file_fingerprint(file)
        assert after["sha256"] != before["sha256"], place
        before = after


@pytest.mark.parametrize("size", [0, 1, NUM_BLOCKS * BLOCK_BYTES, NUM_BLOCKS * BLOCK_BYTES + 1])
def test_files_of_up_to_all_blocks_count_whole(size: int, tmp_path: Path) -> None:
    """Of one byte more, both ends."""
    content = random.Random(2).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    before = file_fingerprint(tmp_path / "file")
    for place in {place for place in (0, 1, size // 3, size // 2, size - 1) if 0 <= place < size}:
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "file").write_bytes(changed)
        assert file_fingerprint(tmp_path / "file")["sha256"] != before["sha256"], place
