"""What a run tells: metrics.jsonl, TensorBoard, and a progress line with the time that is left."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_conan.train.run_folder import write_atomically, writing

PROGRESS_SECONDS = 5.0
"""Least time between two progress lines."""


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands ru_maxrss of a parent on to what it starts
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20  # given in KiB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def phase_seconds(taken: Mapping[str, float]) -> dict[str, float]:
    """Metrics of what `Phases.take` gave: a key a phase but for the rest of the loop, and for what took no millisecond."""
    always = ("data", "forward_backward", "optimizer")
    return {
        f"{phase}_seconds": seconds
        for phase, seconds in taken.items()
        if phase in always or (phase not in ("start", "step") and seconds >= 1e-3)
    }


class MetricsWriter:
    """Writes one line a step. Rank 0 only.

    A resumed run first drops the lines after the checkpoint it resumes from, so that every step stands there once.
    """

    def __init__(self, run_dir: Path, stage: str, steps: int, resumed_step: int) -> None:
        """Open the files of `run_dir`; steps done before are `resumed_step`."""
        from torch.utils.tensorboard import SummaryWriter

        self.stage, self.steps = stage, steps
        self.file = run_dir / "metrics.jsonl"
        if self.file.exists():
            write_atomically(self.file, _lines_up_to(self.file, resumed_step))
        self.stream = self.file.open("a", encoding="utf-8", buffering=1)
        self.tensorboard_dir = run_dir / "tensorboard"
        self.tensorboard = SummaryWriter(str(self.tensorboard_dir), purge_step=resumed_step + 1)
        self.started, self.first_step, self.last_progress = time.monotonic(), resumed_step, 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record a step's values. Raises WriteError where the disk is full."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with writing(self.file):
            self.stream.write(json.dumps({"step": step, "stage": self.stage, **finite}, allow_nan=False) + "\n")
        with writing(self.tensorboard_dir):
            for key, value in values.items():
                if math.isfinite(value):
                    self.tensorboard.add_scalar(key, value, step)
        now = time.monotonic()
        if now - self.last_progress >= PROGRESS_SECONDS or step in (1, self.steps):
            self.last_progress = now
            self._progress(step, values, now - self.started)

    def close(self) -> None:
        """Flush and close."""
        try:
            with writing(self.file):
                self.stream.close()
        finally:
            with writing(self.tensorboard_dir):
                self.tensorboard.close()

    def _progress(self, step: int, values: Mapping[str, float], elapsed: float) -> None:
        remaining = elapsed / max(step - self.first_step, 1) * (self.steps - step)
        parts = [f"{self.stage} {step}/{self.steps}", f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}"]
        for key, label in (("in_batch_accuracy", "accuracy"), ("alpha", "alpha")):
            if key in values:
                parts.append(f"{label} {values[key]:.2f}")
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in values:
            parts.append(f"{values['mfu']:.0%} MFU")
        if "skipped_steps" in values:
            parts.append(f"{values['skipped_steps']:.0f} skipped")
        parts.append(f"{clock(elapsed)} elapsed, {clock(remaining)} left")
        print(" | ".join(parts), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _lines_up_to(file: Path, step: int) -> str:
    """The whole lines of metrics.jsonl up to a step; a line torn by a kill is dropped."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    return "".join(kept)
