"""What the attention kernel costs, counted by its emulation: operations, bytes, barriers, bank conflicts. Nothing is timed.

The cost depends on shapes, the form and whether alpha is 0; never on the numbers. Operations are counted as the source states
them. Shapes: `b` batch, `s` rows, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

import itertools
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_conan.kernels.soft_mask_attention.emulate import LaunchCounters, emulated_launch
from megatron_conan.kernels.soft_mask_attention.emulate.build import KERNEL
from megatron_conan.kernels.soft_mask_attention.emulate.counters import Counters
from megatron_conan.kernels.soft_mask_attention.emulate.forward import FORMS, ORDERS, load_forward

HEAD_DIMS = (64, 112, 128)
LENGTHS = (1, 17, 63, 64, 65, 129, 200, 300)

# ForwardTile of forward.cuh: rows of a block, of each of its four warps, and keys of a tile.
ROWS, WARP_ROWS = 128, 32
KEYS = {64: 64, 112: 64, 128: 48}
LANES, THREADS = 32, 128
LANE_ROWS = 4  # a lane has a quarter of the columns of four of its warp's rows


@pytest.fixture(scope="module", autouse=True)
def _all_instances() -> None:
    """Builds them, as many at a time as there are cores to expect."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda head_dim: load_forward(torch.bfloat16, head_dim), HEAD_DIMS))


def tensors(b: int, s: int, n: int, g: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros(b, s, heads, d, dtype=torch.bfloat16) for heads in (n, g, g))


def count(
    length: int, head_dim: int, alpha: float, form: str, *, n: int = 1, g: int = 1, **arguments: object
) -> LaunchCounters:
    """The counters of one sequence."""
    return emulated_launch(*tensors(1, length, n, g, head_dim), torch.tensor(alpha), form, **arguments).counters


@dataclass
class Cost:
    """What one head of one sequence should cost, by the tiles that its blocks and warps go over."""

    length: int
    head_dim: int
    is_open: bool  # alpha > 0

    @property
    def keys(self) -> int:
        return KEYS[self.head_dim]

    def key_tiles(self, first: int, rows: int) -> range:
        """First keys of the tiles that these rows need: all of them, or with alpha = 0 those that hold a key of theirs."""
        return range(0, self.length if self.is_open else min(self.length, first + rows), self.keys)

    def of_blocks(self) -> list[range]:
        return [self.key_tiles(row, ROWS) for row in range(0, self.length, ROWS)]

    def of_warps(self) -> list[tuple[int, range]]:
        return [(row, self.key_tiles(row, WARP_ROWS)) for row in range(0, self.length, WARP_ROWS)]

    def num_warp_tiles(self) -> int:
        return sum(len(tiles) for _, tiles in self.of_warps())

    def mma(self) -> int:
        """q k^T and s v, both 2 x 32 x keys x head_dim, by products of 2 x 16 x 8 x 16."""
        return self.num_warp_tiles() * 2 * (WARP_ROWS // 16) * (self.keys // 8) * (self.head_dim // 16)

    def exp2(self) -> int:
        """One a score; and one a row and tile, for the change of the maximum, in each of the four lanes of a row."""
        return self.num_warp_tiles() * WARP_ROWS * (self.keys + 4)

    def barriers(self) -> int:
        """Two a tile of keys, one behind a tile of rows."""
        return sum(2 * len(tiles) + 1 for tiles in self.of_blocks())

    def log2(self, form: str) -> int:
        """One a thread for alpha, one a row for lse. Row form: one a lane's row for the tiles on the diagonal, one where the
        upper tiles begin and one a row at the end to undo that. Column form: one a lane's column in all but lower tiles."""
        total = THREADS * len(self.of_blocks()) + self.length
        for row, tiles in self.of_warps():
            num_upper = sum(key >= row + WARP_ROWS for key in tiles)
            num_lower = sum(key + self.keys - 1 <= row for key in tiles)
            num_diagonal = len(tiles) - num_upper - num_lower
            if form == "row":
                total += LANES * LANE_ROWS * (num_diagonal + (num_upper > 0))
                total += min(WARP_ROWS, self.length - row) * (num_upper > 0)
            if form == "column":
                total += LANES * self.keys // 4 * (num_diagonal + num_upper)
        return total

    def key_reads(self) -> Tensor:
        """[s]: as often as there are tiles of rows that need the tile of the key."""
        reads = torch.zeros(self.length, dtype=torch.int32)
        for tiles in self.of_blocks():
            reads[: len(tiles) * self.keys] += 1
        return reads


def operations(counters: LaunchCounters) -> tuple[int, int, int]:
    return counters.total.mma, counters.total.exp2, counters.total.log2


# ---- shared memory


def in_shared_memory(total: Counters) -> dict[str, float]:
    """Wavefronts as multiples of what they would be without conflicts."""
    names = ("load_matrix", "words", "stores", "copies")
    return {name: getattr(total, name).actual / getattr(total, name).minimum for name in names}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("length", [512, 200])
def test_no_bank_conflicts(head_dim, length):
    total = count(length, head_dim, 0.5, "row").total
    for accesses in (total.load_matrix, total.words, total.stores, total.copies):
        assert accesses.actual == accesses.minimum > 0


def changed_kernel(folder: Path, head_dim: int, old: str, new: str) -> Path:
    """A copy of the kernel's folder with a change of forward.cuh."""
    for part in ("csrc", "emulate"):
        shutil.copytree(KERNEL / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    text = (KERNEL / "csrc" / "forward.cuh").read_text()
    assert text.count(old) == 1
    (folder / "csrc" / "forward.cuh").write_text(text.replace(old, new))
    load_forward(torch.bfloat16, head_dim, kernel=folder)
    return folder


def test_conflicts_of_unpadded_rows_are_seen(tmp_path):
    """Rows of 128 bytes all begin in bank 0: eight conflict. Rows of 224 bytes begin in every 8th: two share one."""
    change = ("stride = HEAD_DIM + 8;", "stride = HEAD_DIM;")
    with ThreadPoolExecutor(2) as pool:
        kernels = pool.map(lambda d: changed_kernel(tmp_path / str(d), d, *change), (64, 112))
    for head_dim, ways, kernel in zip((64, 112), (8, 2), kernels, strict=True):
        found = in_shared_memory(count(256, head_dim, 0.5, "row", kernel=kernel).total)
        assert found == {"load_matrix": ways, "words": ways, "stores": 1, "copies": 1}


# ---- operations


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [0.0, 1e-4, 1.0])
def test_operations_and_barriers(head_dim, form, alpha):
    for length in LENGTHS:
        cost, counters = Cost(length, head_dim, alpha > 0), count(length, head_dim, alpha, form)
        assert operations(counters) == (cost.mma(), cost.exp2(), cost.log2(form)), length
        assert counters.total.block_barriers == cost.barriers()
        assert counters.total.blocks == math.ceil(length / ROWS)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_closed_mask_costs_half(head_dim):
    """With alpha = 0. The diagonal's tiles are whole: so it's half and a share that falls as 1 / length."""
    for length, limit in ((512, 0.6), (1024, 0.55), (2048, 0.53)):
        closed, full = (Cost(length, head_dim, is_open).mma() for is_open in (False, True))
        assert 0.5 < closed / full < limit
    closed, full = (count(1024, head_dim, alpha, "row").total for alpha in (0.0, 0.5))
    assert 0.5 < closed.mma / full.mma < 0.55
    assert 0.5 < closed.exp2 / full.exp2 < 0.55
    assert closed.bytes_copied / full.bytes_copied < 0.62  # blocks have four times the rows of a warp, and there is q


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_soft_mask_costs_what_bidirectional_attention_does(head_dim):
    """Row and constant form at any alpha > 0, but for the row form's logarithms: at most 13 a row, at any length."""
    most = LANES * LANE_ROWS * 3 // WARP_ROWS + 1
    for length in (300, 1024):
        plain = operations(count(length, head_dim, 1.0, "constant"))
        assert operations(count(length, head_dim, 0.3, "constant")) == plain
        *row, row_log2 = operations(count(length, head_dim, 0.3, "row"))
        assert row == list(plain[:2])
        whole_warps = math.ceil(length / WARP_ROWS) * WARP_ROWS
        assert 0 < row_log2 - plain[2] <= most * whole_warps


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_column_form_takes_a_logarithm_for_a_quarter_of_the_exponentials(head_dim):
    """Its weights change along a row: in tiles above the diagonal each lane needs one a column, for its four rows."""
    plain, column = (operations(count(1024, head_dim, 1.0, form)) for form in ("constant", "column"))
    assert column[:2] == plain[:2]
    upper_scores = 1024 * 1023 // 2
    assert upper_scores / 4 < column[2] - plain[2] < 1.15 * upper_scores / 4


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_padding_costs_nothing(form, alpha):
    """Rows and sequences of no tokens, and batches: as the sequences alone, but for what finds a tile of rows empty."""
    lengths, b, s = (*LENGTHS, 0, 0), len(LENGTHS) + 2, 300
    alone = [count(length, 64, alpha, form).total for length in LENGTHS]
    arguments = {"lengths": torch.tensor(lengths, dtype=torch.int32)}
    padded = emulated_launch(*tensors(b, s, 1, 1, 64), torch.tensor(alpha), form, **arguments).counters.total
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed = tuple(x[0] for x in tensors(1, sum(lengths) + 50, 1, 1, 64))
    packed = emulated_launch(*packed, torch.tensor(alpha), form, cu_seqlens=cu_seqlens).counters.total
    for got in (padded, packed):
        for name in ("mma", "exp2", "bytes_copied", "bytes_zero_filled"):
            assert getattr(got, name) == sum(getattr(x, name) for x in alone)
        assert got.load_matrix.actual == sum(x.load_matrix.actual for x in alone)
    empty_tiles = b * math.ceil(s / ROWS) - sum(math.ceil(length / ROWS) for length in lengths)
    assert padded.block_barriers == sum(x.block_barriers for x in alone) + empty_tiles
    # With alpha > 0 a row of the row form's last tile may take one more logarithm, though it is padding.
    extra = padded.log2 - sum(x.log2 for x in alone) - THREADS * empty_tiles
    assert 0 <= extra < len(LENGTHS) * WARP_ROWS if form == "row" and alpha > 0 else extra == 0


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_heads_cost_the_same_however_they_share_keys(alpha):
    one = count(300, 64, alpha, "row")
    for g in (1, 2, 4):
        counters = count(300, 64, alpha, "row", n=4, g=g)
        assert operations(counters) == tuple(4 * x for x in operations(one))
        for name in ("bytes_copied", "bytes_zero_filled", "bytes_stored", "block_barriers"):
            assert getattr(counters.total, name) == 4 * getattr(one.total, name)


def test_max_length_changes_blocks_only():
    """Blocks that take several tiles of rows in turn do the same."""
    few, many = (count(300, 64, 0.5, "row", max_length=max_length).total for max_length in (1, 300))
    assert (few.blocks, many.blocks) == (1, 3)
    few.blocks = many.blocks
    assert bytes(few) == bytes(many)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_orders_change_no_counter(head_dim):
    same = {bytes(count(200, head_dim, 0.5, "row", order=order).total) for order in ORDERS}
    assert len(same) == 1


# ---- global memory


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_every_row_is_moved_as_often_as_it_must(head_dim, alpha):
    """q once, keys and values once a tile of rows and query head that needs them, out once; of padding nothing is read."""
    b, s, n, g = len(LENGTHS), 320, 4, 2
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    inputs = tensors(b, s, n, g, head_dim)
    counters = emulated_launch(*inputs, torch.tensor(alpha), "row", lengths=lengths).counters
    assert (counters.out_writes == 1).all()
    for i, length in enumerate(LENGTHS):
        assert (counters.q_reads[i, :length] == 1).all()
        assert (counters.q_reads[i, length:] == 0).all()
        want = n // g * Cost(length, head_dim, alpha > 0).key_reads()
        for reads in (counters.k_reads[i], counters.v_reads[i]):
            assert (reads[:length] == want[:, None, None]).all()
            assert (reads[length:] == 0).all()
    total = counters.total
    assert total.bytes_copied == 16 * sum(int(x.sum()) for x in (counters.q_reads, counters.k_reads, counters.v_reads))
    assert total.bytes_stored == inputs[0].nbytes


def test_lse_is_written_once(tmp_path):
    """Plain stores aren't counted. In this copy a second one would leave 0; at first every element is NaN."""
    change = ("lse[row] = inside ?", "lse[row] = lse[row] == lse[row] ? 0.0f : inside ?")
    kernel = changed_kernel(tmp_path, 64, *change)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    for max_length in (1, 300):
        arguments = {"lengths": lengths, "max_length": max_length}
        inputs = (*tensors(len(LENGTHS), 300, 2, 1, 64), torch.tensor(0.5), "row")
        got, want = (emulated_launch(*inputs, **arguments, kernel=folder).lse for folder in (kernel, KERNEL))
        assert torch.equal(got, want)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sectors_are_used_whole(head_dim):
    """In dense tensors, [s, b, n, d] storage seen as [b, s, n, d], and slices of one qkv tensor; not in rows with odd gaps."""
    b, s, n, g = 2, 200, 4, 2
    lengths = torch.tensor([200, 77], dtype=torch.int32)
    qkv = torch.zeros(s, b, n + 2 * g, head_dim, dtype=torch.bfloat16)
    layouts = {
        "dense": tensors(b, s, n, g, head_dim),
        "sequence first": tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors(b, s, n, g, head_dim)),
        "qkv": qkv.reshape(b, s, n + 2 * g, head_dim).split((n, g, g), dim=2),
        "qkv, sequence first": qkv.transpose(0, 1).split((n, g, g), dim=2),  # [s, b, n, d] -> [b, s, n, d]
    }
    for name, inputs in layouts.items():
        counters = emulated_launch(*inputs, torch.tensor(0.5), "row", lengths=lengths).counters
        total = counters.total
        assert total.sectors_read.actual == total.sectors_read.minimum == total.bytes_copied // 32, name
        assert total.sectors_written.actual == total.sectors_written.minimum == total.bytes_stored // 32, name
        assert (counters.out_writes == 1).all()
        assert (counters.q_reads[0] == 1).all()
        assert (counters.k_reads[0] == n // g * Cost(s, head_dim, True).key_reads()[:, None, None]).all()
    gaps = [torch.zeros(b, s, heads, head_dim + 8, dtype=torch.bfloat16)[..., :head_dim] for heads in (n, g, g)]
    total = emulated_launch(*gaps, torch.tensor(0.5), "row", lengths=lengths).counters.total
    assert total.sectors_read.actual > total.sectors_read.minimum
