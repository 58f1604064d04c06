"""`conan mine`: what is wrong with files and settings is told in one line, before a model is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gloo_pool import WorkerPool
from mined_rows import command_here, write_jsonl

from megatron_conan.mining.row_files import read_rows

ROWS = [{"query": f"q {i}", "positive": f"p {i}"} for i in range(9)]


def write_files(folder: Path) -> None:
    """Inputs of all kinds; `model` passes for a SentenceTransformer folder as long as none is loaded."""
    (folder / "model").mkdir()
    (folder / "model" / "modules.json").write_text("[]")
    (folder / "neither").mkdir()
    write_jsonl(folder / "good.jsonl", ROWS)
    write_jsonl(folder / "few.jsonl", ROWS[:3])
    for name, row in {
        "no_query": {"positive": "p"},
        "no_positive": {"query": "q", "positive": []},
        "blank_query": {"query": " ", "pos": "p"},
        "blank_negative": {"query": "q", "pos": "p", "neg": ["n", ""]},
        "number": {"query": "q", "pos": 7},
        "both": {"query": "q", "pos": "p", "positive": "p"},
    }.items():
        write_jsonl(folder / f"{name}.jsonl", [*ROWS[:2], row])
    (folder / "broken.jsonl").write_text('{"query": "q", "pos": "p"}\n\n{"query": \n')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "blank.txt").write_text("\n \n")
    write_jsonl(folder / "key.jsonl", [{"body": "d"}])


GOOD = "model --input good.jsonl --output-prefix out "
CASES = {
    "model --input none.jsonl --output-prefix out": "input none.jsonl does not exist or is not a file",
    "model --input blank.txt --output-prefix out": "input blank.txt: unknown format '.txt'; use .jsonl",
    "model --input empty.jsonl --output-prefix out": "empty.jsonl: no rows",
    "model --input good.jsonl no_query.jsonl --output-prefix out": "no_query.jsonl:3: key 'query' is missing",
    "model --input no_positive.jsonl --output-prefix out": "no_positive.jsonl:3: key 'positive' is missing or empty",
    "model --input blank_query.jsonl --output-prefix out": "blank_query.jsonl:3: key 'query' is empty",
    "model --input blank_negative.jsonl --output-prefix out": "blank_negative.jsonl:3: key 'neg' holds an empty text",
    "model --input number.jsonl --output-prefix out": "number.jsonl:3: key 'pos' holds int, not a string",
    "model --input both.jsonl --output-prefix out": "both.jsonl:3: keys 'positive' and 'pos' mean the same",
    "model --input broken.jsonl --output-prefix out": "broken.jsonl:3: malformed JSON",
    "model --input few.jsonl --output-prefix out": "few.jsonl has 3 documents, too few for 7 negatives",
    GOOD + "--corpus none.txt": "input none.txt does not exist",
    GOOD + "--corpus blank.txt": "blank.txt: no documents",
    GOOD + "--corpus key.jsonl": "key.jsonl:1: key 'text' is missing (found 'body')",
    GOOD + "--num-negatives 0": "pool_size=0 must be at least 1",
    GOOD + "--window 3 --skip-top 3": "window=3 leaves nothing after skip_top=3",
    GOOD + "--window 9 --skip-top 3": "window=9 leaves 6 documents behind skip_top=3, too few for 7 negatives",
    GOOD + "--margin 1.5": "margin=1.5 must be at most 1",
    GOOD + "--margin-kind absolute": "--margin-kind absolute has no default margin",
    "model --input good.jsonl --output-prefix no/out": "--output-prefix no/out: there is no folder no; make it first",
    "model --input good.jsonl --output-prefix ..": "--output-prefix .. must end with a file name",
    "model --input good.jsonl --output-prefix good": "--output-prefix good would overwrite the input",
    "neither --input good.jsonl --output-prefix out": "neither is neither a run folder (config.yaml) nor a Sent",
    "none --input good.jsonl --output-prefix out": "none is neither a run folder",
}  # fmt: skip


def outcomes_here(folder: Path) -> list[tuple[int, str, str]]:
    os.chdir(folder)
    outcomes = command_here(*(arguments.split() for arguments in CASES))
    return [(outcome.code, outcome.stdout, outcome.stderr) for outcome in outcomes]


def test_every_mistake_gets_one_line(workers: WorkerPool, tmp_path: Path) -> None:
    write_files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    (outcomes,) = workers.run(outcomes_here, 1, tmp_path)
    for (code, stdout, stderr), message in zip(outcomes, CASES.values(), strict=True):
        assert (code, stdout) == (2, "")
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        assert message in stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_under_torchrun_a_mistake_is_told_once(tmp_path: Path) -> None:
    write_files(tmp_path)
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, "-m", "megatron_conan.cli", "mine", *(GOOD + "--corpus none.txt").split()], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("error: input none.txt does not exist") == 1, result.stderr


@pytest.mark.parametrize("value", ["nan", "inf", "high"])
def test_a_margin_is_a_number(capsys: pytest.CaptureFixture[str], value: str) -> None:
    from megatron_conan.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["mine", "model", "--input", "a", "--output-prefix", "b", "--margin", value])
    assert caught.value.code == 2
    assert f"invalid _finite value: '{value}'" in capsys.readouterr().err


def test_texts_are_known_by_their_first_appearance(tmp_path: Path) -> None:
    first = write_jsonl(
        tmp_path / "first.jsonl",
        [{"query": "a", "pos": ["b", "c", "b"], "neg": "d"}, {"query": "b", "positive": "a", "negative": None}],
    )
    second = write_jsonl(tmp_path / "second.jsonl", [{"query": "a", "positive": ["e"]}])
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"body": text} for text in ("f", " ", "e", "f")])
    lines = tmp_path / "lines.txt"
    lines.write_text("g\r\n\nd\n")
    rows = read_rows([first, second], [corpus, lines], "body")
    assert rows.texts == list("abcdefg")
    assert rows.row_query.tolist() == [0, 1, 0]
    assert rows.row_positives.values.tolist() == [1, 2, 1, 0, 4]
    assert rows.row_positives.offsets.tolist() == [0, 3, 4, 5]
    assert rows.document_ids.tolist() == [0, 1, 2, 3, 4, 5, 6]  # the query "a" is a document, for the second row
    source = rows.source("rows")
    assert [source.query_ids.tolist(), source.query_of_row.tolist()] == [[0, 1], [0, 1, 0]]
    assert [source.positives.values.tolist(), source.positives.offsets.tolist()] == [[1, 2, 4, 0], [0, 3, 4]]
    assert source.describe(5) == json.dumps("f")
