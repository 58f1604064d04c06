"""What a run tells: metrics.jsonl, TensorBoard, and a progress line with the time that is left."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_conan.config.tree import MiningConfig
from megatron_conan.train.run_folder import writing
from megatron_conan.train.time_left import TimeLeft

PROGRESS_SECONDS = 5.0
"""Least time between two progress lines."""
EVERY_STEP = ("data", "forward_backward", "optimizer")
"""Phases of every step; the others come now and then."""


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands ru_maxrss of a parent on to what it starts
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):  # not in every sandbox
                return int(line.split()[1]) / 2**20  # given in KiB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def phase_seconds(taken: Mapping[str, float]) -> dict[str, float]:
    """Metrics of what `Phases.take` gave: a key a phase but for the rest of the loop, and for what took no millisecond."""
    return {
        f"{phase}_seconds": seconds
        for phase, seconds in taken.items()
        if phase in EVERY_STEP or (phase not in ("start", "step", "agree") and seconds >= 1e-3)
    }


def rare_seconds(values: Mapping[str, float]) -> dict[str, float]:
    """Of a step's metrics the seconds of phases that come now and then: mining, evaluation, checkpoint."""
    always = {f"{phase}_seconds" for phase in (*EVERY_STEP, "step")}
    return {key: value for key, value in values.items() if key.endswith("_seconds") and key not in always}


class Curves:
    """The metrics for TensorBoard, as long as there is room for them: no run ends for want of a curve."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """What `folder` shows from `first_step` on is hidden: a resumed run draws it again."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Draw what is finite."""
        if self._writer is None:
            return
        try:
            for key, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(key, value, step)
        except OSError as error:
            print(
                f"warning: no curves in {self._folder} from step {step} on: {error}; metrics.jsonl has the numbers",
                file=sys.stderr,
                flush=True,
            )
            self.close()

    def close(self) -> None:
        """Flush and close."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()


class MetricsWriter:
    """Writes one line a step, or every so many. Rank 0 only.

    A resumed run first drops the lines after the checkpoint it resumes from, so that every step stands there once.
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        steps: int,
        resumed_step: int,
        *,
        log_every: int = 1,
        mining: MiningConfig | None = None,
    ) -> None:
        """Open the files of `run_dir`.

        Args:
            run_dir: the run's folder.
            stage: what is trained.
            steps: of the whole run.
            resumed_step: steps done before.
            log_every: steps between lines; the first and the last step have one always.
            mining: when it is mined, for the time that is left.
        """
        self.stage, self.steps, self.log_every = stage, steps, log_every
        self.file = run_dir / "metrics.jsonl"
        if self.file.exists():
            cut_back(self.file, resumed_step)
        self.stream = self.file.open("a", encoding="utf-8", buffering=1)
        self.curves = Curves(run_dir / "tensorboard", resumed_step + 1)
        self.unwritten: dict[str, float] = {}
        self.time_left = TimeLeft(steps, [done for done in range(steps) if mining is not None and mining.is_due(done)])
        self.started = self.last_step = time.monotonic()
        self.last_progress = 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record a step's values, called after every step. Raises WriteError where the disk is full.

        A line's seconds of rare phases are those since the line before, so that none is lost between lines.
        """
        now, rare = time.monotonic(), rare_seconds(values)
        self.time_left.note(step, now - self.last_step, rare)
        self.last_step = now
        for key, seconds in rare.items():
            self.unwritten[key] = self.unwritten.get(key, 0.0) + seconds
        if step % self.log_every and step not in (1, self.steps):
            return
        values = {**values, **self.unwritten}
        self.unwritten = {}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with writing(self.file):
            self.stream.write(json.dumps({"step": step, "stage": self.stage, **finite}, allow_nan=False) + "\n")
        self.curves.add(step, values)
        if now - self.last_progress >= PROGRESS_SECONDS or step in (1, self.steps):
            self.last_progress = now
            self._progress(step, values, now - self.started)

    def close(self) -> None:
        """Flush and close."""
        try:
            with writing(self.file):
                self.stream.close()
        finally:
            self.curves.close()

    def _progress(self, step: int, values: Mapping[str, float], elapsed: float) -> None:
        parts = [f"{self.stage} {step}/{self.steps}", f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}"]
        for key, label in (("in_batch_accuracy", "accuracy"), ("alpha", "alpha")):
            if key in values:
                parts.append(f"{label} {values[key]:.2f}")
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in values:
            parts.append(f"{values['mfu']:.0%} MFU")
        if "skipped_steps" in values:
            parts.append(f"{values['skipped_steps']:.0f} skipped")
        parts.append(f"{clock(elapsed)} elapsed, {clock(self.time_left.seconds())} left")
        print(" | ".join(parts), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def cut_back(file: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl behind a step, and what is torn there; looks at the file from its end only."""
    end = size = file.stat().st_size
    if size:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while end:
                begin = content.rfind(b"\n", 0, end - 1) + 1
                if content[end - 1 : end] == b"\n" and _is_up_to(content[begin:end], step):
                    break
                end = begin
    if end < size:
        os.truncate(file, end)


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line is whole, and of this step or one before."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
