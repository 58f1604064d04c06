"""A window of steps under torch.profiler: `profile` in the config."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_conan.config.operation import ProfileConfig
from megatron_conan.train.run_folder import write_atomically

ROWS = 40
"""Lines of the table of operators."""


class ProfilerWindow:
    """Records steps `start` to `start + steps - 1` on the ranks that the config names; elsewhere does nothing.

    A window that begins before the first step of this start is left out; one that reaches behind the last step ends there.
    """

    def __init__(self, settings: ProfileConfig | None, run_dir: Path, rank: int) -> None:
        """Traces go to RUN/profile/rank_N.step_S.trace.json.gz (for Perfetto or chrome://tracing), with a table beside."""
        self._settings = settings if settings is not None and rank in settings.ranks else None
        self._folder, self._rank = run_dir / "profile", rank
        self._profiler: profile | None = None

    def __enter__(self) -> ProfilerWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None and error is None:
            self._end()
        elif self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def before_step(self, step: int) -> None:
        """Called before step `step`, from 1."""
        if self._settings is None:
            return
        if step == self._settings.start + self._settings.steps and self._profiler is not None:
            self._end()
        if step == self._settings.start:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def _end(self) -> None:
        assert self._profiler is not None
        assert self._settings is not None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank_{self._rank}.step_{self._settings.start}"
        temporary = self._folder / f".{name}.trace.json.gz"
        profiler.export_chrome_trace(str(temporary))  # compressed by its name
        trace = temporary.replace(self._folder / f"{name}.trace.json.gz")
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_atomically(self._folder / f"{name}.txt", profiler.key_averages().table(sort_by=by, row_limit=ROWS) + "\n")
        print(
            f"rank {self._rank}: profile of steps from {self._settings.start} on in {trace}",
            file=sys.stderr,
            flush=True,
        )
