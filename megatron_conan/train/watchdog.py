"""Tells which rank the others wait for, and ends a run that hangs.

A thread in every rank notes in the process group's store where its rank is; that of one rank, the judge, reads all notes and
says in the store what is to be done. Rank 0 is the judge; when it falls silent the next rank takes its place. Nothing is asked
of the training itself but to say which phase it is in (`Phases`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from megatron_conan.config.operation import WatchdogConfig
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.phases import Phases, place

BEAT_SECONDS = 1.0
"""Time between two notes of a rank."""
SILENT_SECONDS = 8.0
"""A rank that has not noted anything for this long is gone, or stopped."""
TURN_SECONDS = 2.0
"""Each rank gives the ranks between the judge and itself so much longer to take a silent judge's place."""
MIN_LOOKS = 10
"""A rank is called slow after no fewer looks at all ranks."""
EXIT_STATUS = 1


@dataclass(frozen=True)
class Note:
    """Where a rank is."""

    rank: int
    host: str
    step: int
    phase: str
    progress: int
    """Grows with everything the rank gets done."""
    beat: int
    """Grows with every note."""
    tick: int = 0
    """The moment of the note: beats since 1970, the same on all ranks; 0 if it came too late to be compared."""
    idle: float = 0.0
    """Seconds since `progress` grew."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host})"

    @property
    def at(self) -> tuple[int, int]:
        return self.step, place(self.phase)


@dataclass(frozen=True)
class Word:
    """What the judge says."""

    judge: int = 0
    beat: int = 0
    """Grows with every word of that judge."""
    silent: str = ""
    """Names of ranks that don't note anything any more."""
    reports: int = 0
    """Times that somebody was to print stacks."""
    behind: tuple[int, ...] = ()
    """Who was, the last time."""
    leave: str = ""
    """Why all ranks must end."""


@dataclass
class _Seen:
    """A rank's last note, and when by this process's clock it changed."""

    note: Note
    progress_at: float
    beat_at: float


class Watchdog:
    """Watches a run within its context."""

    def __init__(
        self,
        phases: Phases,
        settings: WatchdogConfig,
        context: ParallelContext,
        signalled_at: Callable[[], float | None] = lambda: None,
    ) -> None:
        """All ranks must make one.

        Args:
            phases: where this rank is.
            settings: when to tell, and when to end the run.
            context: this rank's place.
            signalled_at: time.monotonic() of the first signal that asked this rank to stop.
        """
        self._phases, self._settings, self._context = phases, settings, context
        self._signalled_at = signalled_at
        self._pause = min(BEAT_SECONDS, min(settings.report_seconds, settings.abort_seconds) / 20)
        self._threads = [
            threading.Thread(target=run, name=f"watchdog{run.__name__}", daemon=True)
            for run in (self._run, self._guard)
        ]
        self._end = threading.Event()
        self._main = threading.get_ident()
        self._store: dist.Store = dist.HashStore()
        if context.world_size > 1:  # a connection of its own: the main thread may be waiting in the other
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
            # A call that gives up leaves the connection in disorder; `_guard` ends this rank before one does.
            self._store.set_timeout(timedelta(seconds=min(2 * settings.abort_seconds + 60, 7 * 86400)))
        self._beat = self._tick = self._progress = 0
        self._answers = 0
        self._heard_at = self._moved_at = time.monotonic()
        self._word = Word()
        self._obeyed = 0
        self._seen: dict[int, _Seen] = {}
        self._slow = SlowRanks(settings.report_seconds, self._heard_at)
        self._told_at = 0.0

    def __enter__(self) -> Watchdog:
        self._note_own()  # so that every rank has been heard of
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(SILENT_SECONDS)  # in a call to a store that hangs it stays for ever
        if kind is None and not self._threads[0].is_alive():
            with contextlib.suppress(RuntimeError, OSError):
                self._note_own("ended")

    def _run(self) -> None:
        while not self._end.wait(self._until_tick()):
            # what is suppressed: the store is gone, with its host, or at the end of the run
            with contextlib.suppress(RuntimeError, OSError):
                self._note_own()
                if self._end.wait(self._pause / 2):  # all ranks have noted this moment by then
                    break
                self._look()
                self._answers += 1

    def _guard(self) -> None:
        """End this rank if the store is gone: the other thread's calls may never return then, whatever their timeout."""
        answers, still, told = 0, 0.0, False
        while not self._end.wait(self._pause):
            # pauses are added up, so that the time for which this process is stopped doesn't count
            still = 0.0 if self._answers != answers else still + self._pause
            answers = self._answers
            what = f"the process group's store has not answered for {still:.0f} s: its host is gone, or hangs"
            if still > self._settings.abort_seconds:
                _leave(f"rank {self._context.rank} ends: {what}")
            late = still > self._settings.report_seconds
            if late and not told and self._context.rank == self._context.world_size - 1:  # the farthest from that host
                print(f"warning: {what}", file=sys.stderr, flush=True)
            told = late

    def _until_tick(self) -> float:
        """Seconds. Ranks note at the same moments by the wall clock: at different ones, none could be called behind."""
        now = time.time()
        return (self._tick_at(now) + 1) * self._pause - now

    def _tick_at(self, now: float) -> int:
        return math.floor(now / self._pause + 0.1)  # a wait may end a little early

    def _note_own(self, phase: str | None = None) -> None:
        self._beat += 1
        phases, now = self._phases, time.monotonic()
        if phases.progress != self._progress:
            self._progress, self._moved_at = phases.progress, now
        rank, where = self._context.rank, (phases.step, phase or phases.phase, self._progress, self._beat)
        wall = time.time()
        tick = self._tick_at(wall)
        self._tick = tick if wall < (tick + 0.3) * self._pause else 0
        note = Note(rank, socket.gethostname(), *where, self._tick, round(now - self._moved_at, 3))
        self._store.set(str(rank), json.dumps(asdict(note)))

    def _look(self) -> None:
        now = time.monotonic()
        if self._store.check(["word"]):
            said = json.loads(self._store.get("word"))
            word = Word(**{**said, "behind": tuple(said["behind"])})
            if word != self._word:  # whoever said it is the judge: so one remains where two took the place at once
                self._word, self._heard_at = word, now
        rank, judge = self._context.rank, self._word.judge
        turns = (rank - judge - 1) % self._context.world_size
        is_silent = now - self._heard_at > SILENT_SECONDS + TURN_SECONDS * turns
        if judge == rank or is_silent:
            if judge != rank:
                self._take_place(judge, now)
            self._read_all(now)
            self._word = self._judge(now)
            self._store.set("word", json.dumps(asdict(self._word)))
        self._obey(now)

    def _take_place(self, former: int, now: float) -> None:
        """Become the judge, with all notes still to be read."""
        self._seen.clear()
        self._slow = SlowRanks(self._settings.report_seconds, now)
        self._read_all(now)
        if former in self._seen:
            seen = self._seen[former]
            seen.beat_at, seen.progress_at = self._heard_at, self._heard_at - seen.note.idle

    def _read_all(self, now: float) -> None:
        ranks = [str(rank) for rank in range(self._context.world_size)]
        if not self._store.check(ranks):  # at the start
            ranks = [rank for rank in ranks if self._store.check([rank])]
        for rank, text in zip(ranks, self._store.multi_get(ranks), strict=True):
            note = Note(**json.loads(text))
            seen = self._seen.setdefault(int(rank), _Seen(note, now - note.idle, now))
            if note.progress != seen.note.progress:
                seen.progress_at = now
            if note.beat != seen.note.beat:
                seen.beat_at = now
            seen.note = note

    def _judge(self, now: float) -> Word:
        """Tell of slow ranks, and of a run that stands still, once, and end it in the end."""
        notes = [seen.note for seen in self._seen.values()]
        silent = [seen.note for seen in self._seen.values() if self._is_silent(seen, now)]
        word = replace(
            self._word, judge=self._context.rank, beat=self._beat, silent=_names([note.name for note in silent])
        )
        stands_since = max(seen.progress_at for seen in self._seen.values())
        still = now - stands_since
        if still >= self._settings.abort_seconds:
            return replace(word, leave=f"no progress for {still:.0f} s (watchdog.abort_seconds)")
        if slow := self._slow.look([note for note in notes if note.tick == self._tick > 0], stands_since, now):
            print(f"warning: {slow}", file=sys.stderr, flush=True)
        if still >= self._settings.report_seconds and self._told_at < stands_since:
            self._told_at = now
            text, behind = report(notes, [note.rank for note in silent], still)
            print(f"warning: {text}", file=sys.stderr, flush=True)
            return replace(word, reports=word.reports + 1, behind=tuple(behind))
        return word

    def _is_silent(self, seen: _Seen, now: float) -> bool:
        return now - seen.beat_at > SILENT_SECONDS and seen.note.phase != "ended"

    def _obey(self, now: float) -> None:
        """Do what the judge asks for."""
        word, rank = self._word, self._context.rank
        if word.reports != self._obeyed and rank in word.behind:
            frame = sys._current_frames().get(self._main)
            where = "".join(traceback.format_stack(frame)) if frame is not None else "(it has ended)\n"
            print(f"rank {rank} is here:\n{where}", end="", file=sys.stderr, flush=True)
        self._obeyed = word.reports
        if word.leave:
            _leave(f"rank {rank} ends: {word.leave}")
        signalled = self._signalled_at()
        # torchrun sends a signal to the ranks that are left when one has died, and they may wait for it forever
        if signalled is not None and now - signalled > SILENT_SECONDS and word.silent:
            _leave(f"rank {rank} ends: {word.silent} is gone")


class SlowRanks:
    """Finds ranks that the others wait for again and again, by where all are at the same moments."""

    def __init__(self, seconds: float, now: float) -> None:
        """Args: length of the windows of time that are judged, and the first one's beginning by time.monotonic()."""
        self._seconds, self._since = seconds, now
        self._looks = 0
        self._behind: dict[str, Counter[str]] = {}
        """Looks at which a rank was behind, by its phase."""
        self._told: set[str] = set()

    def look(self, notes: Sequence[Note], moved_at: float, now: float) -> str:
        """Count who is behind.

        Args:
            notes: of one moment, one a rank.
            moved_at: when any rank got something done last.
            now: time.monotonic().

        Returns:
            At the end of a window, what to say of ranks that have become slow in it; else nothing.
        """
        if len(notes) > 1:
            self._looks += 1
            behind = earliest(notes)
            for note in behind if 2 * len(behind) <= len(notes) else ():
                self._behind.setdefault(note.name, Counter())[note.phase] += 1
        seconds = now - self._since
        if seconds < self._seconds:
            return ""
        looks, behind_in, moved = self._looks, self._behind, moved_at > self._since
        self._looks, self._since, self._behind = 0, now, {}
        if looks < MIN_LOOKS or not moved:
            return ""
        slow = {name for name, phases in behind_in.items() if 2 * phases.total() > looks}
        new = [name for name in behind_in if name in slow - self._told]
        self._told = slow
        if not new:
            return ""
        phases = sum((behind_in[name] for name in new), Counter[str]())
        is_slow, them = ("is slow", "it") if len(new) == 1 else ("are slow", "them")
        return (
            f"{_names(new)} {is_slow}: the others waited for {them} in {phases.total() / len(new) / looks:.0%} "
            f"of the last {seconds:.0f} s, mostly in phase {phases.most_common(1)[0][0]}"
        )


def earliest(notes: Sequence[Note]) -> list[Note]:
    """Those that the others wait for: at the earliest place of the earliest step. All, if all are at one place."""
    first = min(note.at for note in notes)
    return [note for note in notes if note.at == first]


def report(notes: Sequence[Note], silent: Sequence[int], still: float) -> tuple[str, list[int]]:
    """What to say of a run that stands still, and the ranks that the others wait for.

    Args:
        notes: of all ranks that have ever noted anything.
        silent: ranks that don't note anything any more.
        still: seconds without progress.
    """
    notes = sorted(notes, key=lambda note: note.rank)
    heard = [note for note in notes if note.rank not in silent]
    parts = []
    if silent:
        gone = [note.name for note in notes if note.rank in silent]
        parts.append(f"{_names(gone)} gives no sign of life (its process is gone, or stopped)")
    groups: dict[tuple[int, str], list[Note]] = {}
    for note in sorted(heard, key=lambda note: note.at):
        groups.setdefault((note.step, note.phase), []).append(note)
    for (step, phase), members in groups.items():
        parts.append(f"in phase {phase} of step {step}: {_names([note.name for note in members])}")
    behind = [note.rank for note in earliest(heard)] if heard else []
    return f"no progress for {still:.0f} s: {'; '.join(parts)}", behind


def _names(names: Sequence[str]) -> str:
    """As many as fit into a line."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _leave(message: str) -> None:
    """End this process, whatever its main thread is waiting in."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    os._exit(EXIT_STATUS)
