"""inspect_dataset.py as a command: exit codes, mistakes, a quick start, flat memory, and no way to make it fall over."""

import re
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from inspected_files import TEXTS, copy_files, inspect, make_documents, make_pairs
from sample_texts import DATA_TOOLS, DOCUMENTS, run_script

from megatron_conan.data import dataset_checks, exact_duplicates, file_checks, inspection
from megatron_conan.data.indexed_files import write_index
from megatron_conan.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """The prefix of TEXTS."""
    return make_documents(tmp_path_factory.mktemp("corpus"), tokenizer, TEXTS)


@pytest.mark.full
def test_flipped_bits_never_end_the_tool(corpus, tmp_path_factory, tmp_path, capsys, tokenizer):
    generator = np.random.default_rng(11)
    for source in (corpus, make_pairs(tmp_path_factory.mktemp("pairs"), tokenizer, "classification")):
        prefix = copy_files(source, tmp_path)
        for path in sorted(tmp_path.glob(f"{prefix.name}.*")):
            content = path.read_bytes()
            if path.suffix == ".jsonl":
                continue
            places = range(len(content)) if path.name == "corpus.idx" else generator.integers(len(content), size=25)
            for place in places:
                changed = bytearray(content)
                changed[place] ^= 1 << int(generator.integers(8))
                path.write_bytes(changed)
                code, _ = inspect(capsys, "--prefix", prefix, "--duplicates")
                assert code in (0, 1)
                if path.suffix in (".idx", ".bin"):
                    assert code == 1, f"{path.name}: byte {place}"
            path.write_bytes(content)
        assert inspect(capsys, "--prefix", prefix, "--tokenizer-model", tokenizer.path)[0] == 0


def test_mistakes_of_the_user(corpus, tmp_path, capsys, tokenizer):
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(DOCUMENTS, 500))
    for arguments, told in (
        (["--prefix", tmp_path / "nothing"], "nothing.idx nor .*nothing.bin exists; give the --output-prefix"),
        (["--prefix", f"{corpus}.bin"], f"must be what comes before the ending; give --prefix {corpus}$"),
        (["--prefix", "."], "must end with a file name"),
        (["--prefix", corpus, corpus], "names the same files twice"),
        (["--prefix", corpus, "--ids", len(TEXTS)], f"has {len(TEXTS)} documents, numbered from 0"),
        (["--prefix", corpus, "--documents", -1], "--documents -1 must be 0 or more"),
        (["--prefix", corpus, "--histogram", "x.png"], "x.png must end with .svg"),
        (
            ["--prefix", corpus, "--tokenizer-model", other],
            f"of sha256 {tokenizer.sha256} .size 600.*give that tokenizer",
        ),
        (["--prefix", corpus, "--tokenizer-model", tmp_path / "no.model"], "does not exist; train one"),
    ):
        with pytest.raises(ValueError, match=told):
            inspect(capsys, *arguments)


def test_exit_codes_and_a_quick_start(corpus, tmp_path):
    result = run_script("inspect_dataset", "--prefix", corpus)
    assert (result.returncode, result.stdout.splitlines()[0]) == (0, f"{corpus}: documents")
    assert re.search(r"^reading .*corpus\.bin: [\d,]+ tokens in ", result.stderr)
    shutil.copy(f"{corpus}.idx", tmp_path / "half.idx")
    assert run_script("inspect_dataset", "--prefix", tmp_path / "half").returncode == 1
    result = run_script("inspect_dataset", "--prefix", tmp_path / "nothing")
    assert (result.returncode, result.stderr.count("\n"), result.stderr[:7]) == (2, 1, "error: ")
    script = (
        f"import runpy, sys\nsys.argv = ['', '--prefix', {str(corpus)!r}]\n"
        f"try:\n    runpy.run_path({str(DATA_TOOLS / 'inspect_dataset.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n    assert not {'torch', 'megatron'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_a_reader_that_has_seen_enough_ends_it_quietly(corpus):
    command = [sys.executable, str(DATA_TOOLS / "inspect_dataset.py"), "--prefix", str(corpus)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 141
    assert "error" not in errors
    assert "Traceback" not in errors


def test_memory_does_not_grow_with_the_corpus(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(file_checks, "SCAN_BYTES", 1 << 13)
    for module in (file_checks, dataset_checks, inspection, exact_duplicates):
        monkeypatch.setattr(module, "BLOCK", 1 << 10)
    lengths = np.arange(200_000) % 7
    write_index(tmp_path / "big.idx", lengths, np.dtype(np.uint16))
    np.zeros(lengths.sum(), np.uint16).tofile(tmp_path / "big.bin")
    inspect(capsys, "--prefix", tmp_path / "big")  # what is imported and compiled once
    tracemalloc.start()
    try:
        assert inspect(capsys, "--prefix", tmp_path / "big")[0] == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(lengths) * 4, peak  # no array of one number a document
