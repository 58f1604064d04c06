"""A stage as launch/STAGE.sh runs it, in processes to which something happens at a named point (fault_points.py).

    torchrun --nproc-per-node 2 tests/full/faulty_stage.py STAGE POINT@STEP|never --config FILE

Every rank tells what it draws in each step in drawn_N.jsonl beside FILE: numbers of the samples, and a digest of its tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from fault_points import Fault

from megatron_conan.main import main
from megatron_conan.train import language, loop


class Drawn:
    """The sampler's log: one line a step."""

    def __init__(self, file: Path) -> None:
        self.file, self.start = file, time.time_ns()
        self.samples: list[int] = []
        for name in ("lm_batch", "sft_batch"):
            self._follow(name)

    def _follow(self, name: str) -> None:
        real = getattr(language, name)

        def followed(dataset: Any, rows: np.ndarray) -> Any:
            self.samples += rows.tolist()
            return real(dataset, rows)

        setattr(language, name, followed)

    def note(self, step: int, batch: Any) -> None:
        """What `data.batch(step)` gave: LMBatches, or a PairStep."""
        line: dict[str, Any] = {"start": self.start, "step": step}
        digest = hashlib.sha256()
        if isinstance(batch, list):
            line["samples"], self.samples = self.samples, []
            tokens = [part.tokens for part in batch]
        else:
            line["samples"] = [[part.store.name, part.rows.tolist()] for part in batch.batches]
            line["documents"] = [part.document_ids.tolist() for part in batch.batches]  # negatives among them
            tokens = [part.tokens for part in batch.micro_batches]
        for part in tokens:
            digest.update(part.numpy().tobytes())
        line["tokens"] = digest.hexdigest()
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    stage, point, *arguments = sys.argv[1:]
    folder = Path(arguments[arguments.index("--config") + 1]).parent
    fault = Fault(point, folder)
    drawn = Drawn(folder / f"drawn_{os.environ['RANK']}.jsonl")
    train = loop.train

    def followed(trainer: Any) -> Any:
        draw = trainer.parts.data.batch

        def batch(step: int) -> Any:
            fault.begin(trainer, step)
            found = draw(step)
            drawn.note(step, found)
            return found

        trainer.parts.data.batch = batch
        fault.arm(trainer)
        return train(trainer)

    loop.train = followed
    sys.exit(main(stage, arguments))
