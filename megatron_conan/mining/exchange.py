"""Collectives on numpy rows whose number differs from rank to rank.

Shapes: `m` rows of this rank, `w` ranks of the group. All ranks of the group must call; ranks with no rows too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_conan.loss import gather


def gather_counts(
    values: Sequence[int], group: dist.ProcessGroup | None, size: int, device: torch.device
) -> np.ndarray:
    """All-gather a few integers. Returns [w, len(values)] int64; row r is what rank r of the group gave."""
    if size == 1:
        return np.asarray([values], dtype=np.int64)
    local = torch.tensor(values, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(gathered, local, group=group)
    return torch.stack(gathered).cpu().numpy()


def gather_rows(
    local: np.ndarray, counts: Sequence[int], group: dist.ProcessGroup | None, device: torch.device
) -> list[np.ndarray]:
    """All-gather the rows of every rank.

    Args:
        local: [m, ...]; dtype and trailing sizes equal on all ranks.
        counts: rows of every rank, the same list on all ranks; counts[own rank] == m.

    Returns the [counts[r], ...] array of every rank r.
    """
    if len(counts) == 1:
        return [local]
    if max(counts) == 0:
        return [local[:0] for _ in counts]
    tensor = torch.from_numpy(np.ascontiguousarray(local)).to(device)
    return [part.cpu().numpy() for part in gather.gather_rows(tensor, list(counts), group).split(list(counts))]


def return_rows(
    rows: np.ndarray, counts: Sequence[int], own: int, group: dist.ProcessGroup | None, device: torch.device
) -> list[np.ndarray]:
    """Send every rank the answers to its rows: the inverse way of `gather_rows`.

    Args:
        rows: [sum(counts), ...], this rank's answers to the rows of all ranks, in rank order.
        counts: rows of every rank, the same list on all ranks.
        own: this rank's number in the group.

    Returns one [counts[own], ...] array for every rank of the group: that rank's answers to this rank's rows.
    """
    if len(counts) == 1:
        return [rows]
    tensor = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
    received = torch.empty((counts[own] * len(counts), *tensor.shape[1:]), dtype=tensor.dtype, device=device)
    dist.all_to_all_single(received, tensor, [counts[own]] * len(counts), list(counts), group=group)
    # [w * m, ...] -> w x [m, ...]
    return [part.cpu().numpy() for part in received.split(counts[own])] if counts[own] else [rows[:0] for _ in counts]
