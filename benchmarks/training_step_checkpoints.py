"""How long training waits for a checkpoint: in the background, at once, by torch.save, and what disk and memory allow."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import Row
from training_step_plain import Form, PlainTraining
from training_step_runs import Files, PlainData, build, plain_counterpart

from megatron_conan.train.checkpoint_files import checkpoint_name
from megatron_conan.train.checkpoint_saving import Checkpointer
from megatron_conan.train.loop import Trainer, one_step

POLL_SECONDS = 0.01
Waits = tuple[float, float]
"""Seconds that training waited, and seconds until the checkpoint was whole."""


class OurSaves:
    """One checkpoint after another of a run."""

    def __init__(self, trainer: Trainer, asynchronous: bool, numbers: itertools.count[int]) -> None:
        config = trainer.setup.config
        settings = config.checkpoint.model_copy(update={"asynchronous": asynchronous, "every": 1, "keep_last": 1})
        self.trainer, self.numbers = trainer, numbers
        self.checkpointer = Checkpointer(config.model_copy(update={"checkpoint": settings}), trainer.setup.context)

    def __call__(self) -> Waits:
        """With no training beside it."""
        began = time.monotonic()
        self.start()
        blocked = time.monotonic() - began
        while not self.checkpointer.is_written():
            time.sleep(POLL_SECONDS)
        return blocked + self.finish(), time.monotonic() - began

    def start(self) -> int:
        """Save; returns the checkpoint's number."""
        number = next(self.numbers)
        self.checkpointer.save(number, self.trainer.chunks, self.trainer.optimizer, {})
        return number

    def finish(self) -> float:
        """Seconds that giving it its name takes."""
        began = time.monotonic()
        self.checkpointer.finish()
        return time.monotonic() - began

    def slowdown(self, step_seconds: float) -> float:
        """Seconds that steps take longer while a checkpoint is written."""
        self.start()
        began, steps = time.monotonic(), 0
        while not self.checkpointer.is_written():
            one_step(self.trainer)
            steps += 1
        lost = time.monotonic() - began - steps * step_seconds
        self.finish()
        return lost


def checkpoint_rows(files: Files, model: str, repetitions: int) -> list[Row]:
    """The lines of table "checkpoints" of a model."""
    trainer = build(files.config("pretrain", model, f"checkpoints_{model}", ["train.steps=100000"]))
    plain = plain_counterpart(trainer, Form())
    one_step(trainer)  # makes Adam's state
    plain.language_step(*PlainData(trainer, 1).batch(1))
    step_seconds = min(_seconds(lambda: one_step(trainer)) for _ in range(3))
    numbers = itertools.count(1)
    background, at_once = OurSaves(trainer, True, numbers), OurSaves(trainer, False, numbers)
    try:
        first = background()
        at_once()
        folder = trainer.setup.config.run_dir / "checkpoints" / checkpoint_name(2)
        size = sum(file.stat().st_size for file in folder.iterdir())
        block, target = torch.ones(size // 4), torch.empty(size // 4)
        file = files.folder / "plain.pt"
        ways: dict[str, Callable[[], Waits]] = {
            "asynchronous": background,
            "synchronous": at_once,
            "torch.save": lambda: _both(lambda: _torch_save(plain, file, durable=False)),
            "torch.save, fsync": lambda: _both(lambda: _torch_save(plain, file, durable=True)),
            "write and fsync": lambda: _both(lambda: _write(block, file)),
            "copy in memory": lambda: _both(lambda: target.copy_(block)),
        }
        target.copy_(block)  # its pages are there now
        found: dict[str, list[Waits]] = {name: [] for name in ways}
        for _ in range(repetitions):
            for name, way in ways.items():
                found[name].append(way())
        lost = statistics.median(background.slowdown(step_seconds) for _ in range(repetitions))
    finally:
        background.checkpointer.close()
        at_once.checkpointer.close()
        shutil.rmtree(trainer.setup.config.run_dir)
    waits = {"asynchronous, the first": [first], **found}
    reference = statistics.median(blocked for blocked, _ in found["synchronous"])
    parameters = sum(p.numel() for p in trainer.chunks[0].parameters())
    where: Row = {"model": model, "parameters, M": parameters / 1e6, "MB": size / 1e6}
    return [
        {
            **where,
            "way": name,
            "waits, s": statistics.median(blocked for blocked, _ in values),
            "least": min(blocked for blocked, _ in values),
            "/ synchronous": statistics.median(blocked for blocked, _ in values) / reference,
            "whole after, s": statistics.median(until for _, until in values),
            "MB/s until whole": size / 1e6 / statistics.median(until for _, until in values),
            "steps take longer, s": lost if name == "asynchronous" else "",
        }
        for name, values in waits.items()
    ]


def _both(call: Callable[[], Any]) -> Waits:
    seconds = _seconds(call)
    return seconds, seconds


def _seconds(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def _torch_save(plain: PlainTraining, file: Path, durable: bool) -> None:
    file.unlink(missing_ok=True)
    with file.open("wb") as stream:
        torch.save({"model": plain.model.state_dict(), "optimizer": plain.optimizer.state_dict()}, stream)
        if durable:
            stream.flush()
            os.fsync(stream.fileno())


def _write(block: torch.Tensor, file: Path) -> None:
    file.unlink(missing_ok=True)
    with file.open("wb") as stream:
        stream.write(memoryview(block.numpy()))
        stream.flush()
        os.fsync(stream.fileno())
