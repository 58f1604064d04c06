"""Tools end cleanly: one-line errors, no temporary folder after a signal, outputs whole or not at all."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_conan.data.command_line import publish, staging_folder
from megatron_conan.data.durable import save_array

SCRIPT = """
import os, signal, sys
from pathlib import Path
from megatron_conan.data.command_line import run_tool, staging_folder

def main(argv):
    with staging_folder(Path(argv[0]) / "new" / "out") as folder:
        (folder / "part").write_text("half")
        if argv[1] == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if argv[1] == "interrupt":
            raise KeyboardInterrupt
        raise ValueError("first line\\nsecond line")

sys.exit(run_tool(main))
"""


@pytest.mark.parametrize(
    ("how", "code", "stderr"),
    [
        ("terminate", 143, ""),
        ("interrupt", 130, "error: interrupted. Nothing was written.\n"),
        ("fail", 2, "error: first line second line\n"),
    ],
)
def test_nothing_is_left_however_a_tool_ends(tmp_path, how, code, stderr):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), how]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (code, stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(RuntimeError, match="broken"), staging_folder(tmp_path / "kept" / "more" / "out"):
        raise RuntimeError("broken")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert list((tmp_path / "kept").iterdir()) == []


def test_an_interrupted_publication_leaves_no_summary(tmp_path):
    prefix = tmp_path / "out"
    for suffix in (".bin", ".json"):
        prefix.with_suffix(suffix).write_text("old")
    with staging_folder(prefix) as folder:
        (folder / "out.bin").write_text("new")  # the summary is missing, as if the process died before writing it
        with pytest.raises(FileNotFoundError):
            publish(folder, prefix, [".bin", ".json"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.bin": "new"}


def test_a_prefix_needs_a_name():
    with pytest.raises(ValueError, match="must end with a file name"), staging_folder(Path("..")):
        pass


@pytest.mark.parametrize("shape", [(0,), (5,), (3, 4)])
def test_arrays_are_those_of_numpy_and_tell_of_a_full_disk(tmp_path, shape):
    array = np.arange(np.prod(shape), dtype=np.float16).reshape(shape)
    save_array(tmp_path / "array.npy", array)
    found = np.load(tmp_path / "array.npy")
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)
    if array.size:
        with pytest.raises(OSError, match="No space left"):
            save_array(Path("/dev/full"), array)
