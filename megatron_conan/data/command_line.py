"""What the scripts of data_tools share: one-line errors, progress with ETA, outputs that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPORT_SECONDS = 10.0
"""Time between two progress lines where stderr is no terminal."""


def run_tool(main: Callable[[Sequence[str]], None]) -> int:
    """Run a script's `main(argv)`; a user's mistake becomes one line on stderr and exit code 2."""
    # so that a terminated run also removes its temporary folder
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


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
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.counted = 0
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
            left = elapsed / self.done * (self.total - self.done) if self.done else 0.0
            share = self.done / self.total if self.total else 1.0
            self._print(f"{share:4.0%}, {self._rate(elapsed)}, {left:.0f} s left", end="" if self._terminal else "\n")

    def finish(self) -> None:
        """Print the closing line."""
        elapsed = time.monotonic() - self._started
        self._print(f"{self.counted:,} {self.unit} in {elapsed:.1f} s, {self._rate(elapsed)}", end="\n")

    def _rate(self, elapsed: float) -> str:
        return f"{self.counted / max(elapsed, 1e-9):,.0f} {self.unit}/s"

    def _print(self, text: str, end: str) -> None:
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{self.label}: {text}", end=end, file=sys.stderr, flush=True)
