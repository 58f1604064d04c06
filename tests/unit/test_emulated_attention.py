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
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """One sequence in fp64: q [l, n, d], k and v [l, g, d] -> out [l, n, d], lse [n, l]."""
    q, k, v, alpha = q.double(), k.double(), v.double(), alpha.double()
    length, num_heads, head_dim = q.shape
    k, v = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))  # [l, g, d] -> [l, n, d]
    position = torch.arange(1, length + 1, dtype=torch.float64)
    row, column = position[:, None], position[None, :]
    if form == "constant":
        opening = alpha.reshape(-1, 1, 1)  # [1 or n, 1, 1]
    else:
        opening = (alpha * length / (row if form == "row" else column)).clamp(max=1)
    mask = torch.where(column <= row, 1.0, opening).log()
    scores = torch.einsum("ind,jnd->nij", q, k) * head_dim**-0.5 + mask
    return torch.einsum("nij,jnd->ind", scores.softmax(-1), v), scores.logsumexp(-1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's, for [l, n, d]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [l, n, d] -> [1, n, l, d]
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)


def check_sequence(got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: str) -> None:
    """Asserts that out [l, n, d] and lse [n, l] are right.

    The error, at its largest and in the mean square, may be twice that of PyTorch's attention in the same dtype on the same
    inputs: the larger of causal and full attention, as PyTorch would round any other mask. Below the rounding of the result
    itself (half a unit in the last place) nothing is asked for.
    """
    out, lse = got
    want, want_lse = attention(q, k, v, alpha, form)
    ends = ((True, torch.tensor(0.0)), (False, torch.tensor(1.0)))
    stock = [sdpa(q, k, v, causal).double() - attention(q, k, v, end, "constant")[0] for causal, end in ends]
    rounding = torch.finfo(q.dtype).eps / 2 * want.abs()
    for name, norm in (("largest", lambda x: x.abs().max()), ("root mean square", lambda x: x.square().mean().sqrt())):
        error, limit = norm(out.double() - want), max(2 * max(norm(x) for x in stock), norm(rounding))
        assert error <= limit, (
            f"{name} error {error:.2e}, limit {limit:.2e}; {len(q)} rows, {form}, alpha {alpha.tolist()}"
        )
    # In fp32: each of d additions rounds by at most 2^-24 of the sum of the terms' magnitudes; the rest is of exponentials.
    terms = torch.einsum(
        "ihd,jhd->hij", q.double().abs(), k.double().abs().repeat_interleave(q.shape[1] // k.shape[1], 1)
    )
    products = q.shape[-1] ** 0.5 * terms.amax(-1)  # d times the scale
    error, limit = (lse.double() - want_lse).abs(), 2**-18 + 2**-22 * want_lse.abs() + 2**-24 * products
    assert (error <= limit).all(), (
        f"error of lse {(error - limit).max():.2e} beyond its limit; {len(q)} rows, {form}, {alpha}"
    )


def check_padded(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: str, lengths: Tensor | None = None, **how: object
) -> None:
    out, lse = emulated_forward(q, k, v, alpha, form, lengths=lengths, **how)
    for i in range(len(q)):
        end = q.shape[1] if lengths is None else int(lengths[i])
        if end > 0:
            check_sequence((out[i, :end], lse[i, :, :end]), q[i, :end], k[i, :end], v[i, :end], alpha, form)
        check_zeros(out[i, end:], lse[i, :, end:])


def check_packed(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: str, sizes: tuple[int, ...], **how: object
) -> None:
    cu_seqlens = cumulative(sizes)
    out, lse = emulated_forward(q, k, v, alpha, form, cu_seqlens=cu_seqlens, **how)
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        if end > begin:
            part = slice(begin, end)
            check_sequence((out[part], lse[:, part]), q[part], k[part], v[part], alpha, form)
    check_zeros(out[sum(sizes) :], lse[:, sum(sizes) :])


def check_zeros(out: Tensor, lse: Tensor) -> None:
    assert (out.contiguous().view(torch.int16) == 0).all()
    assert (lse == -torch.inf).all()


def cumulative(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


def bits(results: tuple[Tensor, Tensor]) -> tuple[bytes, bytes]:
    return results[0].contiguous().view(torch.int16).numpy().tobytes(), results[1].numpy().tobytes()


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
    for alpha in (0.0, 1e-30, 1e-4, 0.5):
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
