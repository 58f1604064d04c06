"""Where the embeddings of a mining lie while it runs: in memory, or in memory-mapped files from which it can go on.

Shapes: `m` texts of this rank, `e` embedding dim.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from megatron_conan.mining.exchange import gather_counts
from megatron_conan.parallel.context import ParallelContext

SAVE_SECONDS = 30.0
"""What is encoded reaches the disk at least this often; a rank that dies loses no more."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Scratch:
    """A file for the rows of one encoding, and what these depend on."""

    file: Path
    """Path without suffix; the rank's number is added."""
    key: str
    """Equal keys mean equal embeddings: weights, mask, texts, lengths, layout."""

    def files(self, context: ParallelContext) -> tuple[Path, Path]:
        """This rank's rows, and the note of how many are there."""
        name = f"{self.file.name}.rank_{context.rank:05d}_of_{context.world_size:05d}"
        return self.file.with_name(f"{name}.npy"), self.file.with_name(f"{name}.json")

    def remove(self, context: ParallelContext) -> None:
        """Delete the files once all ranks are done with them, those of an interrupted run in another layout too. All ranks
        must call."""
        context.barrier()
        for file in self.file.parent.glob(f"{glob.escape(self.file.name)}.rank_*"):
            file.unlink(missing_ok=True)


class RowStore:
    """Embeddings of one rank's texts, one row a text; filled in rounds."""

    def __init__(self, num_rows: int, width: int, context: ParallelContext, scratch: Scratch | None = None) -> None:
        """Room for [num_rows, width] fp32; with `scratch` in a file, holding what an earlier run with the same key left."""
        self.rounds_done = 0
        self._files: tuple[Path, Path] | None = None
        if scratch is None or num_rows == 0:
            self.rows = np.empty((num_rows, width), np.float32)
            return
        scratch.file.parent.mkdir(parents=True, exist_ok=True)
        self._files = scratch.files(context)
        self._key, self._saved = scratch.key, time.monotonic()
        rows, state = self._files
        found = _saved_rows(rows, state, scratch.key)
        if found is not None and found[0].shape == (num_rows, width):
            self.rows, self.rounds_done = found
            return
        state.unlink(missing_ok=True)
        self.rows = np.lib.format.open_memmap(rows, mode="w+", dtype=np.float32, shape=(num_rows, width))
        with rows.open("r+b") as file:  # a disk that fills up later would kill the process without a word
            os.posix_fallocate(file.fileno(), 0, rows.stat().st_size)

    def save(self, rounds_done: int, *, last: bool = False) -> None:
        """Note that so many rounds are done, on disk now and then and at the end."""
        self.rounds_done = rounds_done
        if self._files is None or (not last and time.monotonic() - self._saved < SAVE_SECONDS):
            return
        assert isinstance(self.rows, np.memmap)
        self.rows.flush()
        state = self._files[1]
        draft = state.with_name(f".{state.name}.tmp")
        draft.write_text(json.dumps({"key": self._key, "rounds_done": rounds_done}) + "\n", encoding="utf-8")
        draft.replace(state)
        self._saved = time.monotonic()


def _saved_rows(rows: Path, state: Path, key: str) -> tuple[np.ndarray, int] | None:
    """What an earlier run left for this key, and its number of rounds; None if that is nothing, or damaged."""
    try:
        saved = json.loads(state.read_text(encoding="utf-8"))
        np.load(rows, mmap_mode="r")  # refuses a file that is too short, which opening it to write would fill up
        return (np.load(rows, mmap_mode="r+"), int(saved["rounds_done"])) if saved["key"] == key else None
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def check_room(num_bytes: int, what: str, context: ParallelContext, scratch: Scratch | None = None) -> None:
    """Refuse embeddings that don't fit, before anything is encoded. All ranks must call.

    Args:
        num_bytes: what this rank will hold.
        what: "the embeddings of ...", for the message.
        scratch: where they will lie; None for memory.

    Raises:
        ValueError: on all ranks, if those of one machine don't fit into its free memory (or disk).
    """
    free = free_memory()
    if scratch is not None:
        free = _free_disk(scratch.file.parent)
        rows = scratch.files(context)[0]
        num_bytes = max(num_bytes - (rows.stat().st_blocks * 512 if rows.exists() else 0), 0)  # taken already
    described = gather_counts(
        [machine_number(), num_bytes, free], context.world_group, context.world_size, context.device
    )
    for host in dict.fromkeys(described[:, 0].tolist()):
        ranks = described[described[:, 0] == host]
        needed, room = int(ranks[:, 1].sum()), int(ranks[:, 2].min())
        if needed > room:
            gib = f"{what} take {needed / 2**30:,.2f} GiB on a machine with {len(ranks)} ranks"
            if scratch is not None:
                raise ValueError(
                    f"{gib}, but {scratch.file.parent} has {room / 2**30:,.2f} GiB free; name a larger disk "
                    "(mining.scratch_dir, --scratch-dir), use more machines, or mine fewer documents"
                )
            raise ValueError(
                f"{gib}, but {room / 2**30:,.2f} GiB of memory are free; put them on a local disk (mining.scratch_dir, "
                "--scratch-dir), use more machines, or mine fewer documents"
            )


def free_memory() -> int:
    """Bytes of memory this process may still take: what the machine has free, within the limit of its control group."""
    free = int(psutil.virtual_memory().available)
    files = [CGROUP / name for name in ("memory.max", "memory.current", "memory.stat")]
    if all(file.is_file() for file in files):
        limit, used, statistics = (file.read_text(encoding="utf-8").split() for file in files)
        if limit[0] != "max":
            cached = int(statistics[statistics.index("inactive_file") + 1])  # given back when it is needed
            free = min(free, int(limit[0]) - int(used[0]) + cached)
    return free


def machine_number() -> int:
    """A number that the processes of one machine share."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # names may be the same on two machines
    name = boot.read_text(encoding="utf-8") if boot.is_file() else platform.node()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _free_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@torch.no_grad()
def weights_fingerprint(modules: Iterable[torch.nn.Module], state: str) -> str:
    """What tells these weights (and `state`, whatever else embeddings depend on) from others; computed where they are."""
    digest = hashlib.sha256(state.encode())
    for module in modules:
        for name, parameter in module.named_parameters():
            bits = parameter.detach().reshape(-1).view(torch.uint8)
            words = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(torch.int64)
            place = torch.arange(1, 2 * words.numel(), 2, device=words.device)  # odd: every bit of a word counts
            digest.update(f"{name} {int(words.sum())} {int((words * place).sum())};".encode())
    return digest.hexdigest()
