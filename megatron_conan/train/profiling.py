"""A window of steps under torch.profiler: `profile` in the config."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_conan.config.operation import ProfileConfig
from megatron_conan.train.run_folder import write_atomically

ROWS = 40
"""Lines of the table of operators."""


class ProfilerWindow:
    """Records steps `start` to `start + steps - 1` on the ranks that the config names; elsewhere does nothing.

    The step before warms the profiler up. A run that resumes within the window records the rest of it; one that ends within
    it (or is stopped) what there was; one that fails nothing. What goes wrong here is told, and training goes on.
    """

    def __init__(self, settings: ProfileConfig | None, run_dir: Path, rank: int) -> None:
        """Traces go to RUN/profile/rank_N.step_S.trace.json.gz (for Perfetto or chrome://tracing), with a table beside."""
        self._settings = settings if settings is not None and rank in settings.ranks else None
        self._folder, self._rank = run_dir / "profile", rank
        self._profiler: profile | None = None
        self._steps: list[int] = []  # recorded
        self._is_early = False
        self._mark: record_function | None = None

    def __enter__(self) -> ProfilerWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._settings is None:
            return
        if error is not None:
            self._try(self._stop)
            return
        self._try(self._end)
        if self._is_early:
            self._say(f"the run ended before profile.start={self._settings.start}: nothing was recorded")

    def before_step(self, step: int) -> None:
        """Called before step `step`, from 1."""
        if self._settings is not None:
            self._try(lambda: self._advance(step))

    def _advance(self, step: int) -> None:
        assert self._settings is not None
        start, end = self._settings.start, self._settings.start + self._settings.steps
        self._is_early = step < start
        if step >= end:
            self._end()
            self._settings = None
        elif step >= start - 1:
            if self._profiler is None:
                activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
                self._profiler = profile(activities=activities, record_shapes=True)
                self._profiler.prepare_trace()
            if step >= start:
                if not self._steps:
                    self._profiler.start_trace()
                self._mark_step(step)
                self._steps.append(step)

    def _mark_step(self, step: int | None) -> None:
        """End the step that is marked in the trace, and begin another."""
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
        self._mark = None if step is None else record_function(f"step {step}")
        if self._mark is not None:
            self._mark.__enter__()

    def _stop(self) -> profile | None:
        """Returns what has recorded."""
        profiler, self._profiler = self._profiler, None
        if profiler is None or not self._steps:
            return None
        self._mark_step(None)
        profiler.stop_trace()
        return profiler

    def _end(self) -> None:
        """Stop, and write what was recorded."""
        if (profiler := self._stop()) is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        first, last = self._steps[0], self._steps[-1]
        name = f"rank_{self._rank}.step_{first}"
        temporary, trace = (self._folder / f"{prefix}{name}.trace.json.gz" for prefix in (".", ""))
        try:
            profiler.export_chrome_trace(str(temporary))  # compressed by its name
            temporary.replace(trace)
        finally:
            temporary.unlink(missing_ok=True)
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_atomically(self._folder / f"{name}.txt", profiler.key_averages().table(sort_by=by, row_limit=ROWS) + "\n")
        self._say(f"profile of steps {first} to {last} in {trace}")

    def _try(self, act: Callable[[], object]) -> None:
        """Act; a profile is not worth a run, so what goes wrong ends the profile only."""
        try:
            act()
        except Exception as error:
            self._settings = None
            self._say(f"warning: no profile of this run: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                self._stop()

    def _say(self, what: str) -> None:
        print(f"rank {self._rank}: {what}", file=sys.stderr, flush=True)
