"""What the scripts of data_tools share: one-line errors, progress with ETA, outputs that appear whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

INPUT_HELP = ".jsonl or .txt (one document a line), both also .gz or .zst, or .parquet; files, folders or 'patterns'"
REPORT_SECONDS = 10.0
"""Time between two progress lines where stderr is no terminal."""


def run_tool(main: Callable[[Sequence[str]], None]) -> int:
    """Run a script's `main(argv)`; a user's mistake becomes one line on stderr and exit code 2."""
    # so that a terminated run also removes its temporary folder
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        kept = " ".join(_notes(error)) or "Nothing was written."
        print(f"error: interrupted. {kept}", file=sys.stderr)
        return 130
    return 0


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """What the tools that read a corpus have in common."""
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="at a bad line: fail (default), or skip it, count it, and copy it to PREFIX.rejected.jsonl",
    )
    parser.add_argument(
        "--restart", action="store_true", help="drop what an interrupted run has done, instead of going on with it"
    )


def rejected_text(prefix: Path, summary: Mapping[str, Any]) -> str:
    """A line that tells of rejected lines; nothing if there are none."""
    rejected = summary["rejected"]
    if not rejected:
        return ""
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in rejected.items())
    return f"rejected {sum(rejected.values()):,} lines ({kinds}), see {prefix}.rejected.jsonl\n"


def _one_line(error: Exception) -> str:
    notes = _notes(error)
    text = " ".join(str(error).split())
    return " ".join([f"{text.removesuffix('.')}.", *notes]) if notes else text


def _notes(error: BaseException) -> list[str]:
    """What was noted with an error, e.g. where unfinished work is kept."""
    return list(getattr(error, "__notes__", []))


@contextlib.contextmanager
def staging_folder(prefix: Path) -> Iterator[Path]:
    """A temporary folder beside the outputs of `prefix`, gone at the end whatever happens."""
    if prefix.name in ("", ".."):
        raise ValueError(f"--output-prefix {prefix} must end with a file name, e.g. {prefix / 'corpus'}")
    missing = [parent for parent in prefix.parents if not parent.exists()]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.", suffix=".tmp", dir=prefix.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # after a failure the folders made here are empty again: rmdir takes back those, and refuses all others
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()


def publish(folder: Path, prefix: Path, suffixes: Sequence[str]) -> None:
    """Move `folder/out<suffix>` to `prefix<suffix>` for each suffix.

    Of several, the last is the summary, without which readers refuse the rest: an older one is removed first and the
    new one comes last, so an interruption leaves no mixture that looks whole.
    """
    targets = [prefix.with_name(prefix.name + suffix) for suffix in suffixes]
    if len(targets) > 1:
        targets[-1].unlink(missing_ok=True)
    for suffix, target in zip(suffixes, targets, strict=True):
        (folder / f"out{suffix}").replace(target)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file for people and programs."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Progress:
    """Progress of a known amount of work on stderr: share, rate and time left, then a closing line.

    Args:
        label: what is going on.
        total: amount of work, in the unit of `advance`.
        unit: what is counted beside the work itself, e.g. "tokens".
        done: work that was done before, by a run that this one goes on from.
        is_bytes: work is bytes, and is shown.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, is_bytes: bool = False) -> None:
        self.label, self.total, self.unit, self.is_bytes = label, total, unit, is_bytes
        self.done = self._done_before = done
        self.counted = 0
        self._started = self._reported = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def advance(self, work: int, count: int) -> None:
        """Add finished work and what it counted."""
        self.done += work
        self.counted += count
        now = time.monotonic()
        if now - self._reported >= (0.2 if self._terminal else REPORT_SECONDS):
            self._reported = now
            elapsed = now - self._started
            done = self.done - self._done_before
            left = elapsed / done * max(self.total - self.done, 0) if done else 0.0
            share = min(self.done / self.total, 1.0) if self.total else 1.0
            shown = f" of {_bytes(self.total)}" if self.is_bytes else ""
            end = "" if self._terminal else "\n"
            self._print(f"{share:4.0%}{shown}, {self._rate(elapsed)}, {time_left(left)} left", end=end)

    def finish(self) -> None:
        """Print the closing line."""
        elapsed = time.monotonic() - self._started
        self._print(f"{self.counted:,} {self.unit} in {elapsed:.1f} s, {self._rate(elapsed)}", end="\n")

    def _rate(self, elapsed: float) -> str:
        elapsed = max(elapsed, 1e-9)
        shown = f", {_bytes((self.done - self._done_before) / elapsed)}/s" if self.is_bytes else ""
        return f"{self.counted / elapsed:,.0f} {self.unit}/s{shown}"

    def _print(self, text: str, end: str) -> None:
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{self.label}: {text}", end=end, file=sys.stderr, flush=True)


def time_left(seconds: float) -> str:
    """Seconds as 42 s, 7:05 min or 3:20 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return (
        f"{round(seconds) // 60}:{round(seconds) % 60:02d} min"
        if minutes < 60
        else f"{minutes // 60}:{minutes % 60:02d} h"
    )


def _bytes(size: float) -> str:
    """A number of bytes, with about three digits."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:,.0f} {units[0]}" if size >= 99.5 else f"{size:.3g} {units[0]}"
