"""Stage finetune as launch/finetune.sh runs it, in a process that kills itself at a named point.

    torchrun --nproc-per-node 2 tests/full/finetune_killed.py POINT@STEP|never --config FILE

Nothing of the product is changed but that one of its functions ends the process when the point is reached, and that all
that is encoded is noted at once. Every rank tells the texts it embeds in minings in embedded_N.jsonl beside FILE.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_conan.main import main
from megatron_conan.mining import encode, rows
from megatron_conan.mining.rows import RowStore
from megatron_conan.mining.shards import ShardedIndex
from megatron_conan.mining.table import NegativesTable
from megatron_conan.train import checkpoint_files, checkpoint_saving, mining_hook

LATER_SOURCE = "other"
"""The source that is mined after another one."""


def kill_before(owner: Any, name: str, point: str, reached: Callable[..., bool]) -> None:
    """The first call of owner.name for which `reached` holds ends this process instead."""
    real = getattr(owner, name)

    def armed(*args: Any, **kwargs: Any) -> Any:
        if reached(*args, **kwargs):
            print(f"rank {os.environ['RANK']} dies at {point}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, armed)


class Minings:
    """Which mining this process is in, and what it embeds there."""

    def __init__(self, log: Path) -> None:
        self.step, self.source = -1, ""
        remine, embed = mining_hook.remine, encode._embed_batches

        def followed(store: Any, *args: Any, step: int, **kwargs: Any) -> Any:
            self.step, self.source = step, store.name
            result = remine(store, *args, step=step, **kwargs)
            self.step, self.source = -1, ""
            return result

        def logged(function: Any, batches: list[np.ndarray], width: int) -> Any:
            texts = np.concatenate(batches).tolist()
            line = {"process": os.getpid(), "step": self.step, "source": self.source, "texts": texts}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            return embed(function, batches, width)

        mining_hook.remine, encode._embed_batches = followed, logged


def arm(point: str, rank: int, minings: Minings) -> None:
    """Make this process die at a point such as encoding@20."""
    what, _, number = point.partition("@")
    step, name = int(number), f"step_{int(number):08d}"
    if what == "encoding" and rank == 1:  # the third round lies in the file, but it isn't noted that it does

        def third_round(store: RowStore, rounds_done: int, **_: bool) -> bool:
            mined = (minings.step, minings.source) == (step, LATER_SOURCE)
            return mined and rounds_done == 3 and store._files is not None

        kill_before(RowStore, "save", point, third_round)
    if what == "search":  # all ranks
        kill_before(ShardedIndex, "_search_shard", point, lambda *_: minings.step == step)
    if what == "record" and rank == 0:  # mined, but not yet in mining.jsonl
        kill_before(mining_hook, "write_atomically", point, lambda _, text: f'"step": {step}' in text)
    if what == "swap" and rank == 1:

        def swap(_: NegativesTable, rows: np.ndarray, *__: np.ndarray, **now: int) -> bool:
            return now["step"] >= step and len(rows) > 0

        kill_before(NegativesTable, "apply_updates", point, swap)
    if what == "arrays" and rank == 0:  # two arrays of six are written
        kill_before(
            np, "save", point, lambda file, *_: Path(file).name == "pointer.npy" and Path(file).parts[-3] == name
        )
    if what == "rename" and rank == 0:  # the older folder has given way, the later one isn't in its place

        def second_rename(folder: Path, _: Path) -> bool:
            return folder.parent.name == name and folder.suffix == ".tmp" and any(folder.parent.glob(".*.old"))

        kill_before(Path, "rename", point, second_rename)
    if what == "shards" and rank == 0:  # all shards are written, under the temporary name
        kill_before(checkpoint_saving, "commit", point, lambda folder, *_: folder.name == name)
    if what == "latest" and rank == 0:  # the checkpoint has its name, but `latest` names the one before

        def moves(file: Path, text: str) -> bool:
            return (file.name, text) == ("latest", f"{name}\n")

        kill_before(checkpoint_files, "write_atomically", point, moves)


if __name__ == "__main__":
    point, *arguments = sys.argv[1:]
    rank = int(os.environ["RANK"])
    rows.SAVE_SECONDS = 0.0
    minings = Minings(Path(arguments[arguments.index("--config") + 1]).with_name(f"embedded_{rank}.jsonl"))
    if point != "never":
        arm(point, rank, minings)
    sys.exit(main("finetune", arguments))
