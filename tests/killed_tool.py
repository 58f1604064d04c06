"""A data tool that something happens to at the n-th time it comes to a named point. Nothing else of it is changed.

    python killed_tool.py NOTES POINT@N HOW COMMIT_SECONDS CHUNK_BYTES TOOL ARGUMENTS ...

POINT       where
worker      a worker is about to encode texts, others of its chunk being written
part        a part is written, but not joined
joining     half of a part is joined
flushed     files are on disk, but state.json does not know of them
half        state.json.new is written
committed   state.json is replaced
rows        a chunk of rows is read; corpus: one of documents beside them
compared    all digests are there; numbering: an array of numbers is made; records: a block of digests is sorted out
array       an array of pair data is half written
index       the index is half written
complete    complete.json is there
rename      before a file gets its name, the summary as the last
named       all have their names, P.json too
parting     one of state.json and complete.json is gone, or both
removing    the folder is removed
start       the first task is handed to workers

HOW         what happens
self        this process alone is killed; group: its group, all workers with it
term        SIGTERM comes to this process; int: SIGINT to its group, as from Ctrl-C
wait        it waits until NOTES/go is there
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_conan.data import binarize, numbering, pair_files, process_map, resumable, text_files
from megatron_conan.data.binarize import TokenFiles
from megatron_conan.data.command_line import run_tool
from megatron_conan.data.pair_arrays import PairArrays
from megatron_conan.data.pair_files import PairTable
from megatron_conan.data.resumable import PartialOutput
from megatron_conan.data.word_encoding import WordEncoder

DATA_TOOLS = Path(__file__).parents[1] / "data_tools"
BATCH_CHARACTERS = 500
"""So that a chunk is encoded in several batches."""


class Happening:
    """What happens to this process, once, at a point's n-th time."""

    def __init__(self, notes: Path, point: str, how: str) -> None:
        self.notes, self.how = notes, how
        self.point, _, number = point.partition("@")
        self.left = int(number or 1)

    def comes(self) -> None:
        """The point is reached once more."""
        self.left -= 1
        if self.left:
            return
        (self.notes / "reached").touch()
        if self.how == "wait":
            while not (self.notes / "go").exists():
                time.sleep(0.01)
        elif self.how == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.how == "int":
            os.killpg(0, signal.SIGINT)
        elif self.how == "group":
            os.killpg(0, signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def at(
        self, owner: Any, name: str, *, after: bool = False, only: Callable[..., bool] = lambda *_, **__: True
    ) -> None:
        """The point is before, or after, calls of owner.name that are meant."""
        real = getattr(owner, name)

        def armed(*args: Any, **kwargs: Any) -> Any:
            if not only(*args, **kwargs):
                return real(*args, **kwargs)
            if not after:
                self.comes()
            result = real(*args, **kwargs)
            if after:
                self.comes()
            return result

        setattr(owner, name, armed)

    def halfway(self, owner: Any, name: str, path_of: Callable[..., Path]) -> None:
        """The point is where the file that owner.name writes is half written."""
        real = getattr(owner, name)

        def armed(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            if self.left == 1:
                path = path_of(*args)
                os.truncate(path, path.stat().st_size // 2)
            self.comes()
            return result

        setattr(owner, name, armed)


def half_joined(happening: Happening) -> Callable[..., None]:
    """`TokenFiles.append` that comes to the point when half of the part is in the file."""
    real = TokenFiles.append

    def append(self: TokenFiles, part: Path, lengths: Any) -> None:
        if happening.left == 1:
            content = part.read_bytes()
            self._bin.write(content[: len(content) // 2 + 1])
            self._bin.flush()
        happening.comes()
        real(self, part, lengths)

    return append


def arm(happening: Happening, prefix: Path) -> None:
    """Set up the parent's points."""
    point = happening.point
    if point == "part":
        happening.at(TokenFiles, "append")
    if point == "joining":
        TokenFiles.append = half_joined(happening)  # type: ignore[method-assign]
    if point in ("flushed", "committed"):
        is_state = lambda _, name, *__: name == "state.json"  # noqa: E731
        happening.at(PartialOutput, "_replace_json", after=point == "committed", only=is_state)
    if point == "half":
        happening.at(resumable, "sync", only=lambda path: path.name == "state.json.new")
    if point in ("rows", "corpus"):
        happening.at(PairTable, {"rows": "_absorb_rows", "corpus": "_absorb_documents"}[point])
    if point == "compared":
        for module in (binarize, pair_files):
            happening.at(module, "read_first")
    if point in ("numbering", "records"):
        happening.at(numbering, {"numbering": "_zeros", "records": "_records"}[point])
    if point == "array":
        path_of = lambda self, name, *_: self.folder / f"out.{name}.npy"  # noqa: E731
        for name in ("_save", "_write_blocks"):
            happening.halfway(PairArrays, name, path_of)
    if point == "index":
        happening.halfway(binarize, "write_index", lambda path, *_: path)
    if point in ("complete", "named"):
        happening.at(PartialOutput, {"complete": "finish", "named": "remove"}[point])
    if point == "rename":
        happening.at(Path, "replace", only=lambda _, target: Path(target).parent == prefix.parent)
    if point == "parting":
        happening.at(Path, "unlink", after=True, only=lambda path, **_: path.name in ("state.json", "complete.json"))
    if point == "removing":
        happening.at(resumable.shutil, "rmtree")
    if point == "start":
        happening.at(process_map.ProcessPoolExecutor, "submit", after=True)


def happening_here() -> Happening:
    """What is to happen, and what parent and workers have in common."""
    notes, point, how = sys.argv[1:4]
    binarize.BATCH_CHARACTERS = BATCH_CHARACTERS
    happening = Happening(Path(notes), point, how)
    if happening.point == "worker":
        happening.at(WordEncoder, "encode")
    return happening


def main() -> int:
    """The tool, in the parent."""
    happening = happening_here()
    commit_seconds, chunk_bytes, tool, *arguments = sys.argv[4:]
    resumable.COMMIT_SECONDS = float(commit_seconds)
    text_files.SMALLEST_CHUNK_BYTES = int(chunk_bytes)
    binarize.number_texts = partial(numbering.number_texts, bucket_texts=200)
    numbering.BLOCK_TEXTS = 300
    arm(happening, Path(arguments[arguments.index("--output-prefix") + 1]))
    specification = importlib.util.spec_from_file_location("tool", DATA_TOOLS / f"{tool}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return run_tool(lambda _: module.main(arguments))  # sys.argv stays as it is for the workers


if __name__ == "__mp_main__":
    (happening_here().notes / f"worker-{os.getpid()}").touch()
if __name__ == "__main__":
    raise SystemExit(main())
