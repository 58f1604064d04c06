"""Seconds from the start of a process to the end of its first step, by what it does. Run as a script it is such a process."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recording import Row
    from training_step_runs import Files

PARTS = {
    "process group": [("parallel.context", "initialize_distributed"), ("parallel.context", "build_context")],
    "data": [("train.loop", "_data_fingerprints")],
    "model, optimizer": [("train.loop", name) for name in ("build_model", "wrap_for_training", "build_optimizer")],
    "checkpoint": [("train.loop", "whole_checkpoint"), ("train.loop", "load_checkpoint")],
}
"""Functions of megatron_conan whose seconds are counted; "data" also has the stage's."""
IMPORTED = ("parallel.context", "train.mining_hook", "evaluation.live", "train.loop")
"""Modules that a start imports, in its own time: here before, so that they have a column."""
COLUMNS = ("launch", "imports", *PARTS, "first step", "rest", "total")
SECONDS = 300


class FirstStep(SystemExit):
    """The first step is done."""


def start_rows(files: Files, model: str, repetitions: int) -> list[Row]:
    """The lines of table "start"."""
    lines: list[Row] = []
    with_torch = min(_run([sys.executable, "-P", "-c", "import torch"]) for _ in range(max(repetitions, 2)))
    for processes in (1, 2):
        found: dict[str, list[Row]] = {"fresh": [], "goes on": []}
        run_dir = files.folder / f"start_{processes}"
        words = [*files.overrides("pretrain", model, run_dir), "checkpoint.asynchronous=true", "checkpoint.every=500"]
        for _ in range(repetitions):
            shutil.rmtree(run_dir, ignore_errors=True)
            found["fresh"].append(_start(processes, words, run_dir))
            _start(processes, [*words, "train.steps=1"], run_dir, to_end=True)
            found["goes on"].append(_start(processes, words, run_dir))
        for name, values in found.items():
            medians = {column: statistics.median(value[column] for value in values) for column in COLUMNS}
            lines.append({"processes": processes, "run": name, **medians, "import torch": with_torch})
    return lines


def _start(processes: int, words: list[str], run_dir: Path, to_end: bool = False) -> Row:
    """Seconds by column; run it to its end instead, if so asked."""
    report = run_dir.with_suffix(".json")
    report.unlink(missing_ok=True)
    config = Path(__file__).resolve().parents[1] / "configs/demo/pretrain.yaml"
    command = [sys.executable, "-P"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [__file__, "end" if to_end else str(report), repr(time.monotonic()), "--config", str(config), *words]
    _run(command)
    return {} if to_end else json.loads(report.read_text(encoding="utf-8"))


def _run(command: list[str]) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {result.returncode}: {result.stderr[-2000:]}")
    return time.monotonic() - began


class Stopwatch:
    """Seconds of functions, by column; one within another isn't counted twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(COLUMNS, 0.0)
        self._inside = False

    def timed(self, column: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its seconds counted."""

        def call(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return function(*arguments, **named)
            self._inside, began = True, time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                self._inside = False
                self.seconds[column] += time.monotonic() - began

        return call


def child(report: str, started: float, argv: list[str]) -> int:
    """Run a stage as its launch script does, until the end of the first step (`report` "end": to its end)."""
    entered = time.monotonic()
    from megatron_conan.main import main
    from megatron_conan.parallel import hide_engine_warnings

    if report == "end":
        return main("pretrain", argv)
    hide_engine_warnings()
    for name in IMPORTED:
        importlib.import_module(f"megatron_conan.{name}")
    from megatron_conan.train import loop

    watch = Stopwatch()
    watch.seconds["launch"], watch.seconds["imports"] = entered - started, time.monotonic() - entered
    for column, functions in PARTS.items():
        for module_name, name in functions:
            module = sys.modules[f"megatron_conan.{module_name}"]
            setattr(module, name, watch.timed(column, getattr(module, name)))
    loop.STAGES = {name: replace(stage, build=watch.timed("data", stage.build)) for name, stage in loop.STAGES.items()}
    first = watch.timed("first step", loop.one_step)

    def step_and_end(*arguments: Any) -> None:
        first(*arguments)
        seconds = watch.seconds
        seconds["total"] = time.monotonic() - started
        seconds["rest"] = seconds["total"] - sum(value for column, value in seconds.items() if column != "total")
        if os.environ.get("RANK", "0") == "0":
            Path(report).write_text(json.dumps(seconds), encoding="utf-8")
        raise FirstStep(0)

    loop.one_step = step_and_end
    return main("pretrain", argv)


if __name__ == "__main__":
    raise SystemExit(child(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
