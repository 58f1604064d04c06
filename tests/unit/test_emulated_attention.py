"""The attention kernel's own source, emulated on the host, against attention by its definition in fp64.

Inputs are new in every run; a failure shows the seed: `generator.manual_seed(seed)` brings them back.
Shapes: `b` batch, `s` rows, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

import itertools
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulated_checks import bits, check_packed, check_padded, check_sequence, check_zeros, cumulative, normal

from megatron_conan.kernels.soft_mask_attention.emulate import emulated_forward
from megatron_conan.kernels.soft_mask_attention.emulate.build import KERNEL
from megatron_conan.kernels.soft_mask_attention.emulate.forward import FORMS, ORDERS, load_forward

BF16, FP16 = torch.bfloat16, torch.float16
HEAD_DIMS = (64, 112, 128)
INSTANCES = list(itertools.product((BF16, FP16), HEAD_DIMS))
ALPHAS = (0.0, 1e-4, 0.03, 0.5, 1.0)
LENGTHS = (1, 17, 63, 64, 65, 129, 200)
PACKED = (17, 0, 129, 1, 64, 0, 65)
TAIL = 11


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator()
    print("seed of the inputs:", generator.seed())
    return generator


@pytest.fixture(scope="module", autouse=True)
def _all_instances() -> None:
    """Builds them, as many at a time as there are cores to expect."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda instance: load_forward(*instance), INSTANCES))


# ---- what it computes

OPENINGS = [*((form, alpha) for form in FORMS for alpha in ALPHAS), ("constant", (0.0, 1.0, 0.03, 0.5))]


@pytest.mark.parametrize(("dtype", "head_dim"), INSTANCES)
@pytest.mark.parametrize(("form", "alpha"), OPENINGS)
def test_padded_batch(generator, dtype, head_dim, form, alpha):
    """All lengths at once. NaN in every row of no sequence: nothing of it may show."""
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    q, k, v = (normal(generator, dtype, len(LENGTHS), max(LENGTHS), n, head_dim) for n in (4, 2, 2))
    for tensor, length in itertools.product((q, k, v), LENGTHS):
        tensor[LENGTHS.index(length), length:] = float("nan")
    check_padded(q, k, v, torch.tensor(alpha), form, lengths)


@pytest.mark.parametrize(("dtype", "head_dim"), INSTANCES)
@pytest.mark.parametrize(
    ("form", "alpha"), [("constant", 0.0), ("row", 0.03), ("column", 0.5), ("constant", (0.0, 1.0, 0.5, 0.03))]
)
def test_packed_batch(generator, dtype, head_dim, form, alpha):
    q, k, v = (normal(generator, dtype, sum(PACKED) + TAIL, n, head_dim) for n in (4, 2, 2))
    for tensor in (q, k, v):
        tensor[sum(PACKED) :] = float("nan")
    check_packed(q, k, v, torch.tensor(alpha), form, PACKED)


@pytest.mark.parametrize("length", LENGTHS)
def test_without_padding(generator, length):
    """Tensors end with the last row: a read beyond is one outside of the buffer."""
    for (dtype, head_dim), form in zip(INSTANCES, itertools.cycle(FORMS), strict=False):
        q, k, v = (normal(generator, dtype, 1, length, n, head_dim) for n in (2, 1, 1))
        check_padded(q, k, v, torch.tensor(0.3), form)
        check_packed(q[0], k[0], v[0], torch.tensor(0.3), form, (length,))


@pytest.mark.parametrize(("num_heads", "num_groups"), [(1, 1), (3, 3), (4, 2), (8, 2), (4, 1), (7, 1)])
def test_heads_share_keys(generator, num_heads, num_groups):
    for (dtype, head_dim), form in zip(INSTANCES, itertools.cycle(FORMS), strict=False):
        q, k, v = (normal(generator, dtype, 2, 70, n, head_dim) for n in (num_heads, num_groups, num_groups))
        check_padded(q, k, v, torch.tensor(0.2), form, torch.tensor([70, 66], dtype=torch.int32))
    alpha = torch.rand(num_heads, generator=generator)
    check_padded(q, k, v, alpha, "constant")


@pytest.mark.parametrize(("dtype", "head_dim"), INSTANCES)
@pytest.mark.parametrize("form", FORMS)
def test_large_scores(generator, dtype, head_dim, form):
    q, k, v = (30 * normal(generator, dtype, 1, 200, n, head_dim) for n in (2, 1, 1))
    for alpha in (0.0, 1e-42, 1e-30, 1e-4, 0.5):
        check_padded(q, k, v, torch.tensor(alpha), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [0, 70, 199])
def test_one_key_dominates(generator, form, place):
    """Its weight against all others' then hangs on the mask; seen in tile 0, 1 or 3, before and after the diagonal."""
    for dtype, head_dim in INSTANCES:
        q, k, v = (normal(generator, dtype, 1, 200, n, head_dim) for n in (2, 1, 1))
        direction = torch.nn.functional.normalize(normal(generator, torch.float32, head_dim), dim=0)
        q += (8 * direction).to(dtype)
        k[0, place, 0] = (1.5 * head_dim**0.5 * direction).to(dtype)
        for alpha in (0.0, 1e-4, 0.03):
            check_padded(q, k, v, torch.tensor(alpha), form)


def test_scale(generator):
    q, k, v = (normal(generator, BF16, 1, 70, 1, 64) for _ in range(3))
    got = emulated_forward(q, k, v, torch.tensor(0.5), "row", scale=0.25)
    assert bits(got) == bits(emulated_forward(2 * q, k, v, torch.tensor(0.5), "row"))  # 64^-0.5 = 0.125


# ---- layouts


def test_layouts_of_the_inputs(generator):
    """The same bits from [s, b, n, d] storage seen as [b, s, n, d], from slices of one qkv tensor, from rows with gaps."""
    b, s, n, g, d = 2, 130, 4, 2, 112
    lengths = torch.tensor([130, 77], dtype=torch.int32)
    qkv = normal(generator, BF16, b, s, n + 2 * g, d)
    dense = tuple(x.contiguous() for x in qkv.split((n, g, g), dim=2))
    alpha = torch.tensor(0.3)
    want = bits(emulated_forward(*dense, alpha, "row", lengths=lengths))
    assert bits(emulated_forward(*qkv.split((n, g, g), dim=2), alpha, "row", lengths=lengths)) == want
    sequence_first = qkv.transpose(0, 1).contiguous()  # [b, s, n + 2 g, d] -> [s, b, n + 2 g, d]
    views = sequence_first.transpose(0, 1).split((n, g, g), dim=2)  # -> [b, s, n, d] and twice [b, s, g, d]
    assert bits(emulated_forward(*views, alpha, "row", lengths=lengths)) == want
    out, _ = emulated_forward(views[0], *dense[1:], alpha, "row", lengths=lengths)
    assert out.stride() == torch.empty(s, b, n, d).transpose(0, 1).stride()
    gaps = [torch.full((*x.shape[:3], d + 8), float("nan"), dtype=BF16) for x in dense]
    for gap, x in zip(gaps, dense, strict=True):
        gap[..., :d] = x
    assert bits(emulated_forward(*(x[..., :d] for x in gaps), alpha, "row", lengths=lengths)) == want
    head_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense]  # [b, n, s, d] seen as [b, s, n, d]
    assert bits(emulated_forward(*head_first, alpha, "row", lengths=lengths)) == want


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_and_values_may_lie_differently(generator, head_dim):
    """k of storage [b, n, s, d], v a slice of wider rows: not one stride in common."""
    q, k, v = (normal(generator, BF16, 2, 200, n, head_dim) for n in (4, 2, 2))
    alpha = torch.tensor(0.3)
    want = bits(emulated_forward(q, k, v, alpha, "row"))
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # [b, s, g, d] -> [b, g, s, d] -> [b, s, g, d]
    wide = torch.full((2, 201, 3, head_dim + 16), float("nan"), dtype=BF16)
    v = wide[:, :200, 1:, 8:-8].copy_(v)
    assert not set(k.stride()[:3]) & set(v.stride()[:3])
    assert bits(emulated_forward(q, k, v, alpha, "row")) == want


def test_places_beyond_32_bits(generator, tmp_path):
    """Rows more than 2^31 bytes apart, in a file that takes no room but for what is written."""
    step = (1 << 30) + 8  # elements of 2 bytes
    far = torch.from_file(str(tmp_path / "sparse"), shared=True, size=step + 64, dtype=BF16)
    far = far.as_strided((1, 2, 1, 64), (step + 64, step, 64, 1))
    near = far.copy_(normal(generator, BF16, 1, 2, 1, 64)).contiguous()
    other, alpha, halves = normal(generator, BF16, 1, 2, 1, 64), torch.tensor(0.3), cumulative((1, 1))
    for places in ((0, 1, 1), (1, 0, 0)):  # q, then k and v
        one, two = ([(x, other)[i] for i in places] for x in (near, far))
        assert bits(emulated_forward(*one, alpha, "row")) == bits(emulated_forward(*two, alpha, "row"))
        one, two = ([x[0] for x in tensors] for tensors in (one, two))  # [1, t, n, d] -> [t, n, d]
        want = bits(emulated_forward(*one, alpha, "row", cu_seqlens=halves))
        assert bits(emulated_forward(*two, alpha, "row", cu_seqlens=halves)) == want


def test_packed_equals_padded(generator):
    q, k, v = (normal(generator, BF16, sum(PACKED) + TAIL, n, 64) for n in (2, 1, 1))
    alpha, cu_seqlens = torch.tensor(0.3), cumulative(PACKED)
    for form in FORMS:
        out, lse = emulated_forward(q, k, v, alpha, form, cu_seqlens=cu_seqlens)
        for begin, end in itertools.pairwise(cu_seqlens.tolist()):
            if begin < end:
                alone = emulated_forward(*(x[None, begin:end] for x in (q, k, v)), alpha, form)
                assert bits((out[None, begin:end], lse[None, :, begin:end].contiguous())) == bits(alone)


def test_tokens_before_the_first_sequence_and_behind_the_last(generator):
    q, k, v = (normal(generator, BF16, 400, 2, 64) for _ in range(3))
    for tensor in (q, k, v):
        tensor[:150] = tensor[220:] = float("nan")
    out, lse = emulated_forward(
        q, k, v, torch.tensor(0.3), "row", cu_seqlens=torch.tensor([150, 220], dtype=torch.int32)
    )
    part = slice(150, 220)
    check_sequence((out[part], lse[:, part]), q[part], k[part], v[part], torch.tensor(0.3), "row")
    check_zeros(out[:150], lse[:, :150])
    check_zeros(out[220:], lse[:, 220:])


def test_only_empty_sequences(generator):
    q, k, v = (normal(generator, BF16, 5, 2, 64) for _ in range(3))
    check_zeros(*emulated_forward(q, k, v, torch.tensor(0.3), "row", cu_seqlens=cumulative((0, 0))))
    lengths = torch.zeros(1, dtype=torch.int32)
    check_zeros(*emulated_forward(q[None], k[None], v[None], torch.tensor(0.3), "row", lengths=lengths))


def test_lengths_and_boundaries_beyond_the_rows_are_cut_off(generator):
    """Nobody checks them on a GPU, where looking at them costs a synchronisation: nothing beside the tensors is touched."""
    q, k, v = (normal(generator, BF16, 3, 70, n, 64) for n in (2, 1, 1))
    alpha = torch.tensor(0.3)
    wrong, right = (torch.tensor(x, dtype=torch.int32) for x in ((-3, 300, 7), (0, 70, 7)))
    want = bits(emulated_forward(q, k, v, alpha, "row", lengths=right))
    assert bits(emulated_forward(q, k, v, alpha, "row", lengths=wrong, max_length=70)) == want
    for wrong, right in (((-5, 30, 500), (0, 30, 70)), ((80, 500), (70, 70)), ((-9, -4, 60), (0, 0, 60))):
        found, want = (
            bits(
                emulated_forward(
                    q[0], k[0], v[0], alpha, "row", cu_seqlens=torch.tensor(x, dtype=torch.int32), max_length=70
                )
            )
            for x in (wrong, right)
        )
        assert found == want


def test_max_length_sizes_the_grid_only(generator):
    lengths = torch.tensor([300, 140], dtype=torch.int32)
    q, k, v = (normal(generator, BF16, 2, 300, n, 64) for n in (2, 1, 1))
    for alpha in (0.0, 0.3):
        same = {
            bits(emulated_forward(q, k, v, torch.tensor(alpha), "row", lengths=lengths, max_length=max_length))
            for max_length in (1, 129, 300, 1000)
        }
        assert len(same) == 1


# ---- what must not depend on what


@pytest.mark.parametrize(("dtype", "head_dim"), [(BF16, 64), (FP16, 112), (BF16, 128)])
@pytest.mark.parametrize("form", FORMS)
def test_orders_and_repetition_change_no_bit(generator, dtype, head_dim, form):
    q, k, v = (normal(generator, dtype, 2, 200, n, head_dim) for n in (2, 1, 1))
    lengths = torch.tensor([200, 130], dtype=torch.int32)
    runs = [("ascending", 0), *((order, 0) for order in ORDERS), *(("random", seed) for seed in range(1, 5))]
    arguments = {"lengths": lengths, "max_length": 64}  # a block takes two tiles of rows
    same = {
        bits(emulated_forward(q, k, v, torch.tensor(0.3), form, order=order, seed=seed, **arguments))
        for order, seed in runs
    }
    assert len(same) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [1, 64, 100, 129, 199])
def test_closed_mask_hides_all_keys_above_the_diagonal(generator, form, first):
    q, k, v = (normal(generator, BF16, 1, 200, n, 64) for n in (2, 1, 1))
    other_k, other_v = k.clone(), v.clone()
    for tensor in (other_k, other_v):
        tensor[:, first:] = 100 * normal(generator, BF16, *tensor[:, first:].shape)
    results = [emulated_forward(q, *kv, torch.tensor(0.0), form) for kv in ((k, v), (other_k, other_v))]
    rows = [bits((out[:, :first], lse[..., :first].contiguous())) for out, lse in results]
    assert rows[0] == rows[1]
    assert not torch.equal(results[0][0][:, first:], results[1][0][:, first:])


@pytest.mark.parametrize("form", FORMS)
def test_an_opening_that_is_no_number_shows(generator, form):
    """In every row with a key above the diagonal, instead of an opening of 0 or 1 that looks right."""
    q, k, v = (normal(generator, BF16, 1, 200, n, 64) for n in (2, 1, 1))
    out, _ = emulated_forward(q, k, v, torch.tensor(float("nan")), form)
    assert out[0, :-1].isnan().all()
    assert out[0, -1].isfinite().all()


# ---- that the emulation would see it

SYNCHRONISATION = re.compile(r"\b((?:block|warp)_barrier\(\)|copy_wait<\d+>\(\)|copy_commit\(\));(.*)")


def mutant(folder: Path, left_out: tuple[int, int]) -> Path:
    """A copy of the kernel's folder without these characters of forward.cuh."""
    for part in ("csrc", "emulate"):
        shutil.copytree(KERNEL / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    text = (KERNEL / "csrc" / "forward.cuh").read_text()
    (folder / "csrc" / "forward.cuh").write_text(text[: left_out[0]] + text[left_out[1] :])
    load_forward(BF16, 64, kernel=folder)
    return folder


def test_no_synchronisation_can_be_left_out(generator, tmp_path):
    """Without any one barrier, wait or commit, the emulation fails or the result is wrong."""
    text = (KERNEL / "csrc" / "forward.cuh").read_text()
    found = list(SYNCHRONISATION.finditer(text))
    assert len(found) >= 6
    with ThreadPoolExecutor(2) as pool:
        mutants = list(pool.map(lambda i: mutant(tmp_path / str(i), found[i].span(1)), range(len(found))))
    q, k, v = (normal(generator, BF16, 2, 300, 1, 64) for _ in range(3))
    lengths = torch.tensor([300, 140], dtype=torch.int32)

    def run(kernel: Path, max_length: int) -> tuple[bytes, bytes] | str:
        try:
            return bits(
                emulated_forward(
                    q, k, v, torch.tensor(0.3), "row", lengths=lengths, max_length=max_length, kernel=kernel
                )
            )
        except RuntimeError as error:
            return str(error)

    want = run(KERNEL, 300)
    assert not isinstance(want, str)
    unseen = []
    for match, kernel in zip(found, mutants, strict=True):
        # also with blocks that take several tiles of rows in turn
        if all(run(kernel, max_length) == want for max_length in (300, 1)):
            unseen.append(f"{match[1]}{match[2]}")
    assert not unseen


STUB = """
#include "device.cuh"
#include "instances.h"
namespace soft_mask {
// One row: max_length says which fault to make.
__global__ void kernel(ForwardParams p) {
  auto* out = static_cast<uint16_t*>(p.out);
  if (thread_index() != 0) return;
  for (int i = p.max_length == 1 ? 1 : 0; i < INSTANCE_HEAD_DIM; ++i) out[i] = 0;
  if (p.max_length != 2) p.lse[0] = 0.0f;
  if (p.max_length == 3) out[INSTANCE_HEAD_DIM] = 0;
  if (p.max_length == 4) p.lse[-1] = 0.0f;
}
template <>
int launch_forward_instance_of<Element::INSTANCE_ELEMENT, INSTANCE_HEAD_DIM>(const ForwardParams& p, void* stream) {
  return launch(kernel, dim3(1), 32, 0, stream, p);
}
}  // namespace soft_mask
"""


def test_the_driver_sees_what_is_unwritten_and_what_is_written_beside(tmp_path):
    for part in ("csrc", "emulate"):
        shutil.copytree(KERNEL / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "csrc" / "forward.cu").write_text(STUB)
    row = torch.zeros(1, 1, 1, 64, dtype=BF16)

    def run(fault: int) -> None:
        emulated_forward(row, row, row, torch.tensor(0.5), "row", max_length=fault, kernel=tmp_path)

    run(0)
    faults = ["elements of out .* unwritten", "elements of lse .* unwritten", "beside out", "beside lse"]
    for fault, message in enumerate(faults, 1):
        with pytest.raises(RuntimeError, match=message):
            run(fault)
