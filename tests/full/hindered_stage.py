"""A stage as launch/STAGE.sh runs it, in which one rank is hindered in a step.

    torchrun --nproc-per-node N tests/full/hindered_stage.py STAGE HOW RANK@STEP --config FILE

HOW: kill (SIGKILL in the forward pass), stop (SIGSTOP there), sleep (in its data phase), raise (an error of the program there).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from megatron_conan.main import main
from megatron_conan.train import loop

SLEEP_SECONDS = 3600


def hinder(how: str, rank: int, step: int) -> None:
    """Make this process come to grief, if it is that rank."""
    if int(os.environ["RANK"]) != rank:
        return
    real = loop.build_trainer

    def build(*arguments: Any) -> Any:
        trainer = real(*arguments)
        data, forward_backward = trainer.parts.data, trainer.parts.forward_backward
        batch = data.batch

        def slow_batch(number: int) -> Any:
            if how == "sleep" and number == step:
                time.sleep(SLEEP_SECONDS)
            return batch(number)

        def struck(chunks: Any, batch: Any) -> Any:
            if trainer.step + 1 == step:
                if how == "raise":
                    raise KeyError("what nobody thought of")
                if how in ("kill", "stop"):
                    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
            return forward_backward(chunks, batch)

        object.__setattr__(data, "batch", slow_batch)
        object.__setattr__(trainer.parts, "forward_backward", struck)
        return trainer

    loop.build_trainer = build


if __name__ == "__main__":
    stage, how, place, *arguments = sys.argv[1:]
    rank, step = place.split("@")
    hinder(how, int(rank), int(step))
    sys.exit(main(stage, arguments))
