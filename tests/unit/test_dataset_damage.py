"""inspect_dataset.py finds every kind of damage, says where it is, and what was expected there."""

import re
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from inspected_files import (
    ROWS,
    TEXTS,
    copy_files,
    damage,
    edit_bytes,
    edit_summary,
    inspect,
    make_documents,
    make_pairs,
)

from megatron_conan.data import file_checks
from megatron_conan.data.indexed_files import HEADER, IndexedFile

COUNT = len(TEXTS)
POINTERS = HEADER.size + 4 * COUNT
BOUNDS = POINTERS + 8 * COUNT


@dataclass
class Whole:
    """Undamaged files of every kind."""

    documents: Path
    pairs: dict[str, Path]
    lengths: list[int] = field(init=False)
    """Of the documents."""

    def __post_init__(self) -> None:
        self.lengths = IndexedFile(self.documents).lengths.tolist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("whole")
    return Whole(make_documents(folder, tokenizer, TEXTS), {task: make_pairs(folder, tokenizer, task) for task in ROWS})


@pytest.fixture(params=[None, 3], ids=["one block", "blocks of 3"])
def blocks(request, monkeypatch):
    """All is found across the borders of blocks too."""
    if request.param:
        monkeypatch.setattr(file_checks, "BLOCK", request.param)
        monkeypatch.setattr(file_checks, "SCAN_BYTES", 2 * request.param)


def begin(lengths, sequence):
    """Byte at which a sequence begins."""
    return 2 * sum(lengths[:sequence])


def int64(value):
    return np.int64(value).tobytes()


def test_whole_files_are_told_so(whole, blocks, capsys, tokenizer):
    for prefix in (whole.documents, *whole.pairs.values()):
        for options in ([], ["--quick"], ["--tokenizer-model", tokenizer.path]):
            code, output = inspect(capsys, "--prefix", prefix, *options)
            assert code == 0
            assert damage(output) == []
            assert "none found" in output


HEADER_DAMAGE = [
    (0, b"X", r"corpus.idx: magic: found b'XMIDIDX\x00\x00', expected b'MMIDIDX\x00\x00'; name a Megatron index"),
    (0, b"TNTIDX\0\0", "expected b'MMIDIDX\\x00\\x00'; it is of Megatron-LM's older format"),
    (9, b"\2", "corpus.idx: version: found 2, expected 1"),
    (17, b"\x63", "corpus.idx: dtype code: found 99, expected one of 1 (uint8), "),
    (17, b"\6", "corpus.idx: dtype code: found 6 (float64, no token ids), expected one of "),
    (
        18,
        int64(COUNT - 1),
        f"corpus.idx: size: 12 bytes too many at the end; {COUNT - 1} sequences and {COUNT + 1} document",
    ),
    (26, int64(2**50), "corpus.idx: size: cut off at "),
]


@pytest.mark.parametrize(("offset", "content", "told"), HEADER_DAMAGE)
def test_damaged_headers(whole, tmp_path, capsys, offset, content, told):
    prefix = copy_files(whole.documents, tmp_path)
    edit_bytes(tmp_path / "corpus.idx", offset, content)
    code, output = inspect(capsys, "--prefix", prefix)
    assert code == 1
    [found] = damage(output)
    assert told in found
    assert "Contents" not in output
    assert "nothing more is checked" in output


@pytest.mark.parametrize(
    ("suffix", "cut", "told"),
    [
        (".idx", lambda size: 20, "corpus.idx: header: cut off at 20 bytes, expected 34"),
        (".idx", lambda size: 0, "corpus.idx: header: cut off at 0 bytes, expected 34"),
        (".idx", lambda size: size - 1, "corpus.idx: size: cut off at "),
        (".idx", lambda size: size + 3, "corpus.idx: size: 3 bytes too many at the end"),
        (".bin", lambda size: size - 1, "corpus.bin: size: cut off: "),
        (".bin", lambda size: size + 2, "corpus.bin: size: too long: "),
        (".bin", lambda size: 0, "corpus.bin: size: cut off: 0 bytes, expected "),
    ],
)
def test_files_of_other_sizes(whole, tmp_path, capsys, suffix, cut, told):
    prefix = copy_files(whole.documents, tmp_path)
    path = tmp_path / f"corpus{suffix}"
    content = path.read_bytes()
    path.write_bytes((content + bytes(10))[: cut(len(content))])
    code, output = inspect(capsys, "--prefix", prefix)
    assert code == 1
    [found] = damage(output)
    assert found.startswith(told)
    assert f"{cut(len(content)):,} bytes" in found or "too many" in found
    assert "Contents" not in output


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_missing_half(whole, tmp_path, capsys, suffix):
    prefix = copy_files(whole.documents, tmp_path)
    (tmp_path / f"corpus{suffix}").unlink()
    code, output = inspect(capsys, "--prefix", prefix)
    assert (code, damage(output)) == (1, [f"corpus{suffix}: missing; write the files anew"])


def test_negative_and_wrong_lengths(whole, blocks, tmp_path, capsys):
    prefix = copy_files(whole.documents, tmp_path)
    edit_bytes(tmp_path / "corpus.idx", HEADER.size + 4 * 7, np.int32(-5).tobytes())
    code, output = inspect(capsys, "--prefix", prefix)
    assert code == 1
    start = begin(whole.lengths, 7)
    assert [line.partition("; ")[0] for line in damage(output)] == [
        "corpus.idx: sequence 7: length -5, expected 0 or more",
        f"corpus.idx: sequence 8: begins at byte {begin(whole.lengths, 8)}, expected {start - 10}, where sequence 7 ends",
    ]
    edit_bytes(tmp_path / "corpus.idx", HEADER.size + 4 * 7, np.int32(whole.lengths[7] + 1).tobytes())
    assert [line.partition("; ")[0] for line in damage(inspect(capsys, "--prefix", prefix)[1])] == [
        f"corpus.idx: sequence 8: begins at byte {begin(whole.lengths, 8)}, expected {begin(whole.lengths, 8) + 2}, where "
        "sequence 7 ends",
        f"corpus.bin: size: cut off: {2 * sum(whole.lengths):,} bytes, expected {2 * sum(whole.lengths) + 2:,}: "
        f"{sum(whole.lengths) + 1:,} tokens of 2 bytes",
    ]


@pytest.mark.parametrize("sequence", [0, 1, 6, COUNT - 1])
def test_byte_pointers(whole, blocks, tmp_path, capsys, sequence):
    prefix = copy_files(whole.documents, tmp_path)
    right = begin(whole.lengths, sequence)
    edit_bytes(tmp_path / "corpus.idx", POINTERS + 8 * sequence, int64(right + 6))
    code, output = inspect(capsys, "--prefix", prefix)
    assert code == 1
    expected = f"corpus.idx: sequence {sequence}: begins at byte {right + 6}, expected {right}"
    if sequence:
        expected += f", where sequence {sequence - 1} ends"
    if 0 < sequence < COUNT - 1:
        expected += " (and 1 more places)"  # the next one is not where this one ends
    assert damage(output)[0].partition("; ")[0] == expected


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (0, 1, "the first is 1, expected 0"),
        (COUNT, COUNT - 1, f"the last is {COUNT - 1}, expected {COUNT}, the number of sequences"),
        (4, 1, "index 4 is 1, expected at least 3"),
        (4, 5, "index 4 is 5, expected 4: a document is a sequence"),
    ],
)
def test_document_indices(whole, blocks, tmp_path, capsys, place, value, told):
    prefix = copy_files(whole.documents, tmp_path)
    edit_bytes(tmp_path / "corpus.idx", BOUNDS + 8 * place, int64(value))
    code, output = inspect(capsys, "--prefix", prefix)
    assert code == 1
    assert [line.partition("; ")[0] for line in damage(output)] == [f"corpus.idx: document indices: {told}"]


def test_no_document_indices(whole, tmp_path, capsys):
    prefix = copy_files(whole.documents, tmp_path)
    content = (tmp_path / "corpus.idx").read_bytes()
    (tmp_path / "corpus.idx").write_bytes(content[:26] + int64(0) + content[34:BOUNDS])
    assert damage(inspect(capsys, "--prefix", prefix)[1]) == [
        "corpus.idx: document indices: there are none, expected 0; write the files anew"
    ]


@pytest.mark.parametrize("sequence", [0, 1, 3, COUNT - 1])
def test_tokens_outside_the_vocabulary(whole, blocks, tmp_path, capsys, tokenizer, sequence):
    prefix = copy_files(whole.documents, tmp_path)
    position = whole.lengths[sequence] - 1
    edit_bytes(tmp_path / "corpus.bin", begin(whole.lengths, sequence) + 2 * position, np.uint16(600).tobytes())
    code, output = inspect(capsys, "--prefix", prefix, "--tokenizer-model", tokenizer.path, "--ids", sequence)
    assert code == 1
    first, second = damage(output)
    assert first.startswith(f"corpus.bin: sequence {sequence}, position {position}: token id 600, expected 0 to 599; ")
    assert second.startswith("corpus.bin: SHA-256 of the tokens: found ")
    assert "<id 600>" in output or position > 60  # what is damaged so can be looked at
    assert inspect(capsys, "--prefix", prefix, "--quick")[0] == 0


def test_the_first_findings_are_told_and_all_are_counted(whole, blocks, tmp_path, capsys):
    prefix = copy_files(whole.documents, tmp_path)
    edit_bytes(tmp_path / "corpus.bin", begin(whole.lengths, 1), np.full(31, 60000, np.uint16).tobytes())
    output = inspect(capsys, "--prefix", prefix)[1]
    places = re.findall(r"sequence (\d+), position (\d+): token id 60000", output)
    ends = list(accumulate(whole.lengths))
    expected = []
    for token in range(whole.lengths[0], whole.lengths[0] + 20):
        sequence = next(i for i, end in enumerate(ends) if token < end)
        expected.append((str(sequence), str(token - ends[sequence] + whole.lengths[sequence])))
    assert places == expected
    assert "... and 12 more" in output  # 11 tokens, and the SHA-256


def test_changed_tokens_within_the_vocabulary_are_found_by_their_digest(whole, tmp_path, capsys):
    prefix = copy_files(whole.documents, tmp_path)
    edit_bytes(tmp_path / "corpus.bin", 4, np.uint16(599).tobytes())
    code, output = inspect(capsys, "--prefix", prefix)
    assert code == 1
    [found] = damage(output)
    assert re.match(r"corpus\.bin: SHA-256 of the tokens: found [0-9a-f]{64}, expected [0-9a-f]{64} as in ", found)
    code, output = inspect(capsys, "--prefix", prefix, "--quick")
    assert code == 0
    assert "tokens not read (--quick)" in output


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"documents": 3}, f"documents: found 3, expected {COUNT} as in the files"),
        ({"tokens": "many"}, "tokens: found 'many', expected "),
        ({"dtype": "int32"}, "dtype: found 'int32', expected 'uint16'"),
        ({"longest_document": 1}, "longest_document: found 1, expected "),
        ({"tokenizer_size": 601}, "tokenizer_size: found 601, expected 600"),
        ({"inputs": [{"file": "a", "documents": COUNT, "tokens": 1}]}, "inputs: their tokens add up to 1, expected "),
        ({"format": "megatron_conan documents 0"}, "format: found 'megatron_conan documents 0', expected one of "),
    ],
)
def test_summaries_that_say_something_else(whole, tmp_path, capsys, tokenizer, changes, told):
    prefix = copy_files(whole.documents, tmp_path)
    edit_summary(prefix, **changes)
    code, output = inspect(capsys, "--prefix", prefix, "--tokenizer-model", tokenizer.path)
    assert code == 1
    [found] = damage(output)
    assert found.startswith(f"corpus.json: {told}")
    assert "document 0, 1 tokens:" in output  # the tokens can be shown all the same


def test_a_summary_that_is_no_json(whole, tmp_path, capsys):
    for source, name in ((whole.documents, "corpus"), (whole.pairs["sts"], "sts")):
        prefix = copy_files(source, tmp_path)
        (tmp_path / f"{name}.json").write_text('{"format": ')
        code, output = inspect(capsys, "--prefix", prefix)
        assert code == 1
        [found] = damage(output)
        assert found.startswith(f"{name}.json: no JSON (Expecting value")
        assert ("Contents" in output) is (name == "corpus")


def test_a_vocabulary_that_the_tokens_type_does_not_fit(whole, tmp_path, capsys):
    prefix = copy_files(whole.documents, tmp_path)
    edit_summary(prefix, tokenizer_size=150_000)
    told = damage(inspect(capsys, "--prefix", prefix)[1])
    assert told == [
        "corpus.idx: dtype code: uint16 cannot hold ids up to 149,999 of the vocabulary; write the files anew as int32"
    ]
    edit_summary(prefix, tokenizer_size=65_500)  # would fit, but is not what the tools write
    told = damage(inspect(capsys, "--prefix", prefix)[1])
    assert told == [
        "corpus.idx: dtype code: found uint16, expected int32 for a vocabulary of 65,500; write the files anew"
    ]
