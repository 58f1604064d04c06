"""Outputs made over hours: what is done is kept beside them, so that a killed run goes on, and they appear whole or not at all.

Beside the outputs of prefix P stands the folder `.P.partial` while they are made:

    job.json        what is made of what; a run with another job is refused
    state.json      how far it is: sizes of the files below, and what the passes remember; replaced as a whole
    complete.json   there once all files are whole; from then on they are only given their names
    out.*, ...      files that grow, cut back to the sizes in state.json by a run that goes on
    lock            held by the process at work
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_conan.data.durable import sync

COMMIT_SECONDS = 10.0
"""Time between two commits: at most so much work is lost."""


class PartialOutput:
    """The folder `.P.partial` of one job, held by this process.

    Args:
        prefix: P.
        job: what is made of what, as JSON; equal for runs that may go on with each other's work.
        restart: begin anew, whatever is there.

    Raises:
        ValueError: another process is at it, or another job was begun there.
    """

    def __init__(self, prefix: Path, job: Mapping[str, Any], *, restart: bool = False) -> None:
        if prefix.name in ("", "..") or prefix.is_dir():
            raise ValueError(f"--output-prefix {prefix} must end with a file name, e.g. {prefix / 'corpus'}")
        self.prefix, self.folder = prefix, prefix.with_name(f".{prefix.name}.partial")
        self._made = [parent for parent in prefix.parents if not parent.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output-prefix {prefix}: {self.folder} can't be made: {error.strerror}") from None
        self._files: dict[str, BinaryIO] = {}
        self._lock = self._locked()
        self._last_commit = time.monotonic()
        try:
            state = self._open(json.loads(json.dumps(job)), restart=restart)
        except BaseException:
            self._lock.close()
            raise

        self.has_commits = bool(state)
        """Whether there is work that a next run can go on with."""
        self.passes: dict[str, Any] = state.get("passes", {})
        """How far each pass is, as JSON; saved by `commit`."""
        self._sizes: dict[str, int] = state.get("sizes", {})

    def _locked(self) -> BinaryIO:
        lock = (self.folder / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ValueError(
                f"another process is writing {self.prefix}; wait for it, or write to another prefix"
            ) from None
        return lock

    def _open(self, job: dict[str, Any], *, restart: bool) -> dict[str, Any]:
        """The committed state, after this job is known to be the one that was begun; `{}` at the beginning."""
        begun = _read_json(self.folder / "job.json")
        state = _read_json(self.folder / "state.json")
        if restart or begun is None or (state is None and not self.is_complete):
            self._empty()
            try:
                self._replace_json("job.json", job)
            except OSError:
                self.remove()
                raise
            return {}
        if begun != job:
            different = ", ".join(key for key in sorted(begun.keys() | job.keys()) if begun.get(key) != job.get(key))
            raise ValueError(
                f"{self.folder} holds an unfinished run with other {different}; finish it as it was begun, or add --restart "
                "to drop it"
            )
        return state or {}

    @property
    def is_complete(self) -> bool:
        """Whether all files are whole, and only their names are missing."""
        return (self.folder / "complete.json").exists()

    def file(self, name: str) -> BinaryIO:
        """A file of the folder to append to, cut back to what was committed. Raises ValueError if there is less of it."""
        if name not in self._files:
            path, size = self.folder / name, self._sizes.get(name, 0)
            stream = path.open("ab")
            if stream.tell() < size:
                stream.close()
                raise ValueError(f"{path} has lost its end; add --restart to begin anew")
            os.truncate(path, size)
            stream.seek(size)
            self._files[name] = stream
        return self._files[name]

    def commit(self) -> None:
        """Make what is written and `passes` what a next run goes on with, if the last commit is `COMMIT_SECONDS` ago."""
        if time.monotonic() - self._last_commit < COMMIT_SECONDS:
            return
        for name, stream in self._files.items():
            stream.flush()
            os.fsync(stream.fileno())
            self._sizes[name] = stream.tell()
        self._replace_json("state.json", {"passes": self.passes, "sizes": self._sizes})
        self.has_commits = True
        self._last_commit = time.monotonic()

    def forget(self) -> None:
        """Nothing here is worth going on with."""
        (self.folder / "state.json").unlink(missing_ok=True)
        self.has_commits = False

    def close_files(self) -> None:
        """Close what `file` opened, so that it can be read as a whole."""
        for name, stream in self._files.items():
            self._sizes[name] = stream.tell()
            stream.close()
        self._files = {}

    def publish(self, suffixes: Sequence[str], summary: Mapping[str, Any], stale: Sequence[str] = ()) -> None:
        """Give `out<suffix>` the name `P<suffix>` for each suffix, then write the summary, P.json.

        Without P.json readers refuse the rest: an older one is removed first and the new one comes last.

        Args:
            suffixes: of the files, all of which are whole.
            summary: content of P.json.
            stale: suffixes of files that an older output may have and this one hasn't.
        """
        self.close_files()
        for suffix in suffixes:
            sync(self.folder / f"out{suffix}")
        self._replace_json(
            "complete.json", {"suffixes": list(suffixes), "stale": list(stale), "summary": dict(summary)}
        )
        self.finish()

    def finish(self) -> dict[str, Any]:
        """Name the files of a complete folder, as far as that isn't done, and remove it. Returns the summary."""
        complete = json.loads((self.folder / "complete.json").read_text(encoding="utf-8"))
        self._target(".json").unlink(missing_ok=True)
        for suffix in complete["stale"]:
            self._target(suffix).unlink(missing_ok=True)
        for suffix in complete["suffixes"]:
            with contextlib.suppress(FileNotFoundError):  # named by the run that was killed
                (self.folder / f"out{suffix}").replace(self._target(suffix))
        self._replace_json("summary.json", complete["summary"], indent=2)
        (self.folder / "summary.json").replace(self._target(".json"))
        sync(self.prefix.parent)
        self.remove()
        summary: dict[str, Any] = complete["summary"]
        return summary

    def remove(self) -> None:
        """Remove the folder, and what was made above it if nothing else is there."""
        self._drop_files()
        for name in ("state.json", "complete.json"):  # complete.json last: up to then a next run only comes here again
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        with contextlib.suppress(OSError):
            for parent in self._made:
                parent.rmdir()

    def close(self) -> None:
        """Leave the folder to a next run."""
        self._drop_files()
        self._lock.close()

    def _drop_files(self) -> None:
        """Close what `file` opened, even on a full disk: what is behind the last commit is cut off anyway."""
        for stream in self._files.values():
            with contextlib.suppress(OSError):
                stream.close()
        self._files = {}

    def _target(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def _empty(self) -> None:
        # the state first: what is removed only in part must not look like something to go on with
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name not in ("complete.json", "state.json")):
            if path.name != "lock":
                path.unlink()

    def _replace_json(self, name: str, content: Mapping[str, Any], indent: int | None = None) -> None:
        new = self.folder / f"{name}.new"
        new.write_text(
            json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8", errors="backslashreplace"
        )
        sync(new)
        new.replace(self.folder / name)
        sync(self.folder)


@contextlib.contextmanager
def partial_output(prefix: Path, job: Mapping[str, Any], *, restart: bool = False) -> Iterator[PartialOutput]:
    """A `PartialOutput` that is left in place if it ends by an error with work to go on with, and else removed.

    An error says where work is kept, as a note of the exception.
    """
    partial = PartialOutput(prefix, job, restart=restart)
    if partial.has_commits:
        print(f"going on with the unfinished {prefix}", file=sys.stderr, flush=True)
    try:
        yield partial
    except BaseException as error:
        if partial.has_commits or partial.is_complete:
            partial.close()
            error.add_note(
                f"What was done is kept in {partial.folder}: the same command goes on with it, --restart drops it."
            )
        else:
            partial.remove()
        raise


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
