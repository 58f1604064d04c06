"""Passes over all chunks of some files on several processes: ordered, committed now and then, gone on with after a kill."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, TypeVar

from megatron_conan.data.command_line import Progress
from megatron_conan.data.input_files import REJECTED, InputFile
from megatron_conan.data.process_map import process_map
from megatron_conan.data.resumable import PartialOutput
from megatron_conan.data.text_files import Chunk, Fault, chunk_bytes, cut_into_chunks, fault_error, place_of

ON_ERROR = ("fail", "skip")


@dataclass(frozen=True)
class Report:
    """What a pass must know of a chunk that a worker has read."""

    key: tuple[int, int]
    work: int
    lines: int
    faults: list[Fault]


class Reported(Protocol):
    """A worker's result."""

    @property
    def report(self) -> Report:
        """Of the chunk."""

    @property
    def count(self) -> int:
        """What the progress line counts."""


Task = TypeVar("Task")
Result = TypeVar("Result", bound=Reported)


class Inputs:
    """The files of a job, and what becomes of bad lines."""

    def __init__(self, files: Sequence[InputFile], on_error: str = "fail") -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error={on_error!r} is unknown; use {' or '.join(ON_ERROR)}")
        self.files, self.stop_at_fault = list(files), on_error == "fail"
        self.size = chunk_bytes(files)

    def identity(self) -> dict[str, Any]:
        """What the files and their chunks are known by, as JSON."""
        return {"files": [file.identity() for file in self.files], "chunk_bytes": self.size}


class ChunkPass:
    """One pass over the chunks of some files; goes on where `partial` says it was.

    Args:
        partial: holds the files that the pass appends to, and its state.
        name: of the pass within the job.
        inputs: what is read.
        keep_faults: this is the pass that counts rejected lines and copies them to out.rejected.jsonl.
    """

    def __init__(self, partial: PartialOutput, name: str, inputs: Inputs, *, keep_faults: bool) -> None:
        self.partial, self.name, self.inputs, self.keep_faults = partial, name, inputs, keep_faults
        saved = partial.passes.get(name, {})
        self.is_done: bool = saved.get("done", False)
        self.after: tuple[int, int] | None = tuple(saved["after"]) if saved.get("after") else None
        self.lines: int = saved.get("lines", 0)
        """Lines of the file at hand before the next chunk."""
        self.work: int = saved.get("work", 0)
        self.num_chunks: int = saved.get("chunks", 0)
        """Chunks done."""
        self.rejected: dict[str, int] = saved.get("rejected", {})
        self.counts: dict[str, int] = saved.get("counts", {})
        self.by_file: dict[str, dict[str, int]] = saved.get("by_file", {})
        """Counts of each file, by its number."""

    def add(self, counts: Mapping[str, int], key: tuple[int, int] | None = None) -> None:
        """Add to the counts of the job, or, with a chunk's key, to those of its file."""
        target = self.counts if key is None else self.by_file.setdefault(str(key[0]), {})
        for name, number in counts.items():
            target[name] = target.get(name, 0) + number

    def chunks(self) -> Iterator[tuple[int, Chunk]]:
        """(place among all chunks, chunk) of what is not done."""
        return zip(
            count(self.num_chunks), cut_into_chunks(self.inputs.files, self.inputs.size, self.after), strict=False
        )

    def run(
        self,
        label: str,
        unit: str,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        absorb: Callable[[Result], None],
        num_workers: int,
    ) -> None:
        """Work off the rest of the pass; nothing is done if it was over.

        Args:
            label: for the progress line.
            unit: what `Result.count` counts.
            function: runs in the workers, once for each of `tasks`.
            tasks: one for each of `chunks`, in their order.
            absorb: takes the results in order; appends to files of `partial` only.
            num_workers: processes.

        Raises:
            ValueError: a bad line, with file and line, unless such lines are skipped.
        """
        if self.is_done:
            return
        total = sum(file.size for file in self.inputs.files)
        progress = Progress(label, total, unit, done=self.work, is_bytes=True)
        for result in process_map(function, tasks, num_workers):
            report = result.report
            if self.after is None or report.key[0] != self.after[0]:
                self.lines = 0
            self._take_faults(report)
            absorb(result)
            self.after, self.num_chunks = report.key, self.num_chunks + 1
            self.lines += report.lines
            self.work += report.work
            self._save()
            progress.advance(report.work, result.count)
        progress.finish()
        self.is_done = True
        self._save()

    def inputs_counts(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """For the summary: some counts of each file, which is named from the innermost folder that holds them all."""
        paths = [file.path.absolute() for file in self.inputs.files]
        folder = os.path.commonpath([path.parent for path in paths]) if paths else ""
        return [
            {
                "file": path.relative_to(folder).as_posix(),
                **dict.fromkeys(names, 0),
                **self.by_file.get(str(number), {}),
            }
            for number, path in enumerate(paths)
        ]

    def _take_faults(self, report: Report) -> None:
        file = self.inputs.files[report.key[0]]
        for fault in report.faults:
            if self.inputs.stop_at_fault:
                raise fault_error(file, self.lines, fault)
            if self.keep_faults:
                self.rejected[fault.kind] = self.rejected.get(fault.kind, 0) + 1
                line = _rejected_line(file, self.lines + fault.line, fault)
                self.partial.file(f"out{REJECTED}").write(line)

    def _save(self) -> None:
        self.partial.passes[self.name] = {
            "done": self.is_done,
            "after": self.after,
            "lines": self.lines,
            "work": self.work,
            "chunks": self.num_chunks,
            "rejected": self.rejected,
            "counts": self.counts,
            "by_file": self.by_file,
        }
        self.partial.commit()


def _rejected_line(file: InputFile, number: int, fault: Fault) -> bytes:
    """A line of P.rejected.jsonl: where it was, why it was rejected, and all of it."""
    content: dict[str, Any] = {"place": place_of(file, number), "reason": fault.reason}
    if isinstance(fault.content, dict):
        content["row"] = fault.content
    else:
        try:
            content["line"] = fault.content.decode("utf-8")
        except UnicodeDecodeError:
            content["line_base64"] = base64.b64encode(fault.content).decode("ascii")
    return (json.dumps(content, default=repr) + "\n").encode("ascii")
