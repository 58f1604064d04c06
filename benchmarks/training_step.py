"""Our training step beside the same model in plain PyTorch; what the loop costs; checkpoints; start-up. Ratios in one run.

- Steps: one process, one thread, fp32 on the CPU (bf16 on a GPU, where there is one; never run on one yet). Both sides hold
  the same weights, see the same batches and make the same AdamW update; that their first losses are equal is checked. The
  plain side (training_step_plain.py) is timed in every form that torch has, and its fastest counts. "Ready": forward, backward
  and update of a batch that lies ready; "whole": with making the batch, on our side all that `one_step` does. CPU-seconds of
  runs that take turns. The limit: the model's FLOPs at the speed of one matrix product of 1,024 x 1,024, texts without padding.
- Loop: what of a step is neither data, nor forward and backward, nor optimizer: by the phases that the run itself counts; as
  the rest of `one_step` beside its parts; and with parts that do nothing.
- Checkpoints: seconds by the clock for which training waits, against torch.save, writing as many bytes, and copying them.
- Start-up: seconds by the clock to the end of the first step, of fresh runs and of such that go on.

    python benchmarks/training_step.py --output training_step.json      # `make demo`'s data; some 15 minutes
    python benchmarks/training_step.py --quick                          # some two minutes
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from recording import Row, gemm_flops_per_second, print_table, write_record
from training_step_checkpoints import checkpoint_rows
from training_step_loop import loop_row
from training_step_plain import forms
from training_step_runs import (
    MODELS,
    Files,
    PlainData,
    build,
    model_flops,
    our_step,
    plain_counterpart,
    ratio_of_medians,
    take_turns,
)
from training_step_start import start_rows

from megatron_conan.data.command_line import run_tool
from megatron_conan.parallel import hide_engine_warnings
from megatron_conan.train.loop import Trainer, one_step

DATA = Path(__file__).resolve().parents[1] / "runs/demo/data"
EQUAL_STEPS = 3
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
"""Of the relative difference between both sides' first losses, by precision."""
TITLES = {
    "steps": "A training step: ours and the fastest plain one",
    "plain": "The plain step, by its form",
    "loop": "Outside data, forward and backward, optimizer",
    "checkpoints": "Seconds that training waits for a checkpoint",
    "start": "Seconds from the start of a process to the end of its first step (median)",
}


def check_equal(ours: Sequence[float], plain: Sequence[float], precision: str) -> float:
    """Largest relative difference of both sides' losses, step by step.

    Raises:
        ValueError: it is too large: the two don't compute the same, and their times compare nothing.
    """
    difference = max(abs(a - b) / abs(a) for a, b in zip(ours, plain, strict=True))
    if not difference < TOLERANCES[precision]:
        raise ValueError(
            f"our losses {list(ours)} and the plain ones {list(plain)} differ by {difference:.1e}, relatively"
        )
    return difference


def step_rows(files: Files, stage: str, model: str, repetitions: int) -> tuple[Row, list[Row]]:
    """Time both sides.

    Returns:
        The line of table "steps", and those of "plain".
    """
    trainer = build(files.config(stage, model, f"{model}_{stage}"))
    num_steps = EQUAL_STEPS + 1 + repetitions
    data = PlainData(trainer, num_steps)
    kind = "language_step" if stage == "pretrain" else "contrastive_step"
    plain = {str(form): plain_counterpart(trainer, form) for form in forms(stage == "pretrain")}
    calls = {name: getattr(training, kind) for name, training in plain.items()}
    ours = [one_step(trainer)["loss"] for _ in range(EQUAL_STEPS)]
    difference = max(
        check_equal(ours, [call(*data.batch(i + 1)) for i in range(EQUAL_STEPS)], trainer.setup.config.train.precision)
        for call in calls.values()
    )
    batch, plain_batch = trainer.parts.data.batch(EQUAL_STEPS + 1), data.batch(EQUAL_STEPS + 1)
    flops, rate = model_flops(trainer, batch), gemm_flops_per_second()
    ready = take_turns(
        {
            "ours": partial(our_step, trainer, batch),
            **{name: partial(call, *plain_batch) for name, call in calls.items()},
        },
        repetitions,
    )
    best = min(calls, key=lambda name: min(ready[name]))
    steps = iter(range(EQUAL_STEPS + 2, num_steps + 1))
    wholes = {"ours": partial(one_step, trainer), "plain": lambda: calls[best](*data.batch(next(steps)))}
    whole = take_turns(wholes, repetitions - 1)
    least = {name: min(values) for name, values in ready.items()}
    where = {"stage": stage, "model": model, "parameters, M": _num_parameters(trainer) / 1e6}
    line: Row = {
        **where,
        "ours, ready": least["ours"],
        "plain, ready": least[best],
        "ours / plain": least["ours"] / least[best],
        "of medians": ratio_of_medians(ready, "ours", best),
        "ours, whole": min(whole["ours"]),
        "plain, whole": min(whole["plain"]),
        "whole: ours / plain": min(whole["ours"]) / min(whole["plain"]),
        "whole: of medians": ratio_of_medians(whole, "ours", "plain"),
        "GFLOP": flops / 1e9,
        "GEMM GFLOP/s": rate / 1e9,
        "ours, of GEMM": flops / least["ours"] / rate,
        "plain, of GEMM": flops / least[best] / rate,
        "plain's form": best,
        "difference of losses": difference,
    }
    by_form: list[Row] = [
        {**where, "form": name, "seconds": least[name], "median": statistics.median(ready[name])}
        | {"ours / it": least["ours"] / least[name]}
        for name in calls
    ]
    return line, by_form


def measure(arguments: argparse.Namespace, files: Files) -> dict[str, list[Row]]:
    """All tables that are asked for."""
    tables: dict[str, list[Row]] = {name: [] for name in TITLES if name == "plain" or name in arguments.only}
    files.write_distinct_pairs(max(MODELS[model].pairs for model in arguments.models) * 4)
    for model in arguments.models:
        for stage in ("pretrain", "finetune"):
            if "steps" in arguments.only:
                _tell(f"steps of {model}, {stage}")
                line, by_form = step_rows(files, stage, model, arguments.repetitions)
                tables["steps"].append(line)
                tables["plain"] += by_form
                gc.collect()
            if "loop" in arguments.only:
                _tell(f"loop of {model}, {stage}")
                tables["loop"].append(loop_row(files, stage, model, arguments.repetitions))
                gc.collect()
    for model in arguments.checkpoint_models if "checkpoints" in arguments.only else ():
        _tell(f"checkpoints of {model}")
        tables["checkpoints"] += checkpoint_rows(files, model, arguments.repetitions)
        gc.collect()
    if "start" in arguments.only:
        _tell("start-up")
        tables["start"] = start_rows(files, arguments.models[0], 1 if arguments.quick else arguments.repetitions)
    return tables


def main(argv: Sequence[str]) -> None:
    """Measure, print and write. Raises ValueError for a user's mistake."""
    arguments = _parse(argv)
    torch.set_num_threads(1)
    hide_engine_warnings()
    for prefix in (arguments.lm, arguments.pairs):
        if not prefix.with_name(f"{prefix.name}.json").is_file():
            raise ValueError(f"no data at {prefix}; run `make demo`, or name other data with --lm and --pairs PREFIX")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        files = Files(
            arguments.lm.resolve(), arguments.pairs.resolve(), arguments.tokenizer_model.resolve(), Path(folder)
        )
        tables = measure(arguments, files)
    for name, rows in tables.items():
        if rows:
            print_table(TITLES[name], rows)
    if arguments.output is not None:
        write_record(arguments.output, vars(arguments), tables)


def _num_parameters(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.chunks[0].parameters())


def _tell(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare our training step with plain PyTorch's; loop, checkpoints, start-up."
    )
    add = parser.add_argument
    add("--lm", type=Path, default=DATA / "lm", metavar="PREFIX", help="language-model corpus (default: the demo's)")
    add("--pairs", type=Path, default=DATA / "weak", metavar="PREFIX", help="pair data (default: the demo's)")
    add("--tokenizer-model", type=Path, default=DATA / "tokenizer.model", help="their tokenizer (default: the demo's)")
    add("--models", choices=MODELS, nargs="+", help="of steps and loop; the first starts up (default: demo deep small)")
    add("--checkpoint-models", choices=MODELS, nargs="+", help="default: demo small large")
    add("--only", choices=[name for name in TITLES if name != "plain"], nargs="+", help="tables (default: all)")
    add("--repetitions", type=int, help="runs of each call (default: 7)")
    add(
        "--folder", type=Path, help="where runs and checkpoints are written (default: the system's for temporary files)"
    )
    add("--quick", action="store_true", help="the demo's model and three runs of each, in some two minutes")
    add("--output", type=Path, metavar="FILE", help="JSON file for the record")
    arguments = parser.parse_args(argv)
    arguments.models = arguments.models or (["demo"] if arguments.quick else ["demo", "deep", "small"])
    arguments.checkpoint_models = arguments.checkpoint_models or (
        ["demo"] if arguments.quick else ["demo", "small", "large"]
    )
    arguments.only = arguments.only or [name for name in TITLES if name != "plain"]
    arguments.repetitions = max(arguments.repetitions or (3 if arguments.quick else 7), 2)
    return arguments


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
