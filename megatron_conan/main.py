"""From the command line of a stage to a trained run."""

from __future__ import annotations

import argparse
import linecache
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_conan.config import RunConfig, check_config, load_config
from megatron_conan.parallel import hide_engine_warnings
from megatron_conan.parallel.launch_check import check_launch

if TYPE_CHECKING:
    from megatron_conan.train.loop import Hook
    from megatron_conan.train.setup import Setup

ROOT = Path(__file__).resolve().parent.parent

SECONDS_FOR_RANK_0 = 5.0
"""What other ranks wait before they tell a mistake themselves: torchrun ends all ranks as soon as one has ended."""

LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection was closed",
    "remote process exited",
)
"""What gloo and NCCL say when the rank at the other end is gone."""


def main(stage: str, argv: Sequence[str]) -> int:
    """Run a stage: `torchrun launch/STAGE.sh --config FILE [section.key=value ...]`.

    Returns:
        Exit status: 0 for a run that has ended or was stopped on request, 2 after a user's mistake, 1 after anything else. What
        went wrong is told in one message a node, with a traceback if it is an error of the program.
    """
    try:
        check_launch(os.environ)
        file, overrides = parse_arguments(stage, argv)
        config = load_config(file, overrides)
        if config.stage != stage:
            raise ValueError(f"{file} is of stage={config.stage}; start it with launch/{config.stage}.sh")
        run(config)
    except Exception as error:
        if isinstance(error, ImportError) or (isinstance(error, ValueError) and is_told(error)):
            _tell(error)
            return _leave(2)
        _report_failure(error)
        return _leave(1)
    return 0


def parse_arguments(stage: str, argv: Sequence[str]) -> tuple[Path, list[str]]:
    """A stage's config file and the values that win over the file's."""
    parser = argparse.ArgumentParser(
        prog=f"launch/{stage}.sh", description=f"Stage {stage} of the Conan-embedding recipe."
    )
    default = ROOT / "configs" / "conan_1.4b" / f"{stage}.yaml"
    parser.add_argument("--config", type=Path, default=default, help="YAML file of the stage (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the file's")
    arguments = parser.parse_args(argv)
    return arguments.config, arguments.overrides


def _report_failure(error: Exception) -> None:
    """Tell of what went wrong while training."""
    import torch

    rank = os.environ.get("RANK", "0")
    if isinstance(error, (OSError, FloatingPointError)) and is_told(error):
        _tell(error)  # of a checkpoint, of the loss: the same on all ranks
    elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        told = str(error).splitlines()[0] if str(error) else "no memory left"
        print(
            f"error: rank {rank} is out of memory: {told} Lower train.micro_batch_tokens or train.micro_batch_size, or raise "
            "parallel.tensor or parallel.pipeline",
            file=sys.stderr,
        )
    elif is_loss_of_a_rank(error):
        print(
            f"rank {rank} ends: it lost the connection to another rank ({str(error).splitlines()[0]})", file=sys.stderr
        )
    else:
        print(f"rank {rank} fails:\n{''.join(traceback.format_exception(error))}", end="", file=sys.stderr)


def is_told(error: BaseException) -> bool:
    """Whether this package raised the error itself: then its message says what to do. A library's needs its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    frame = trace.tb_frame
    line = linecache.getline(frame.f_code.co_filename, trace.tb_lineno).lstrip()
    return frame.f_globals.get("__name__", "").startswith("megatron_conan.") and line.startswith("raise")


def _leave(status: int) -> int:
    """End a rank with others at once: taking groups down may wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    return status


def is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether a collective failed since another rank is gone, which then has the reason to tell."""
    import torch.distributed as dist

    told = str(error).lower()
    return isinstance(error, (dist.DistError, RuntimeError)) and any(words in told for words in LOST)


def _tell(error: Exception) -> None:
    """One line for all ranks of a node."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # local rank 0 tells the same, and torchrun then ends this process; if it doesn't, the mistake is this rank's own
        time.sleep(SECONDS_FOR_RANK_0)
    print(f"error: {error}", file=sys.stderr, flush=True)


def run(config: RunConfig) -> dict[str, float]:
    """Train what `config` describes, in every process that torchrun started. Returns the last step's metrics.

    Cheap checks come before the heavy imports, so that a mistake is told within a second or two.
    """
    from megatron_conan.data.tokenizer import Tokenizer
    from megatron_conan.train.run_folder import check_run_folder

    _check_files(config)
    check_config(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_run_folder(config)
    tokenizer = Tokenizer(config.tokenizer.model)
    if tokenizer.size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {tokenizer.size} pieces of "
            f"{config.tokenizer.model}; raise it to at least {tokenizer.size}"
        )
    hide_engine_warnings()
    from megatron_conan.parallel.context import build_context, destroy_context, initialize_distributed
    from megatron_conan.train.checkpoint import check_start
    from megatron_conan.train.loop import build_trainer, train
    from megatron_conan.train.setup import Setup

    check_start(config, tokenizer.sha256)
    device = initialize_distributed()
    setup = Setup(config, build_context(config.parallel, device), tokenizer)
    values = train(build_trainer(setup, build_hooks(setup)))
    destroy_context()
    return values


def build_hooks(setup: Setup) -> dict[str, Hook]:
    """What happens between steps, by the config: mining, evaluation."""
    from megatron_conan.evaluation.live import EvaluationHook
    from megatron_conan.train.mining_hook import MiningHook

    hooks: dict[str, Hook] = {}
    if setup.config.mining is not None:
        hooks["mining"] = MiningHook(setup)
    if setup.config.evaluation is not None:
        hooks["evaluation"] = EvaluationHook()
    return hooks


def _check_files(config: RunConfig) -> None:
    """One message for everything that is missing, with the commands that make it.

    Raises:
        ValueError: naming the missing files and the commands.
    """
    tokenizer = config.tokenizer.model
    commands, missing = [], []
    if not tokenizer.exists():
        missing.append(f"the tokenizer {tokenizer}")
        commands.append(
            f"python data_tools/train_tokenizer.py --input F [F ...] --vocab-size {config.model.vocab_size} "
            f"--output-prefix {tokenizer.with_suffix('')}"
        )
    tool = "preprocess.py" if config.stage == "pretrain" else "preprocess_pairs.py"
    task = {"pretrain": "", "sft": "--task sft ", "weak": "--task retrieval ", "finetune": "--task retrieval|sts "}
    for source in config.data.sources:
        if not source.prefix.with_name(source.prefix.name + ".idx").exists():
            missing.append(f"the data {source.prefix}.bin/.idx")
            commands.append(
                f"python data_tools/{tool} {task[config.stage]}--input F [F ...] --tokenizer-model {tokenizer} "
                f"--output-prefix {source.prefix}" + (" --append-eod" if config.stage == "pretrain" else "")
            )
    if config.evaluation is not None and not config.evaluation.data.is_dir():
        missing.append(f"the evaluation set {config.evaluation.data} (corpus.jsonl, queries.jsonl, qrels/test.tsv)")
    if missing:
        lines = "".join(f"\n    {command}" for command in commands)
        hint = "\n(`make demo` makes the data of configs/demo)" if "runs/demo" in str(tokenizer) else ""
        raise ValueError(f"missing: {', '.join(missing)}" + (f"; make it with{lines}" if commands else "") + hint)
