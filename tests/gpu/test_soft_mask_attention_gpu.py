"""Soft-mask attention on a GPU: the compiled kernel and its operator against the definition in fp64.

The tests with `small` in their names are for compute-sanitizer: few blocks, no torch.compile.
Shapes: `b` batch, `s` rows, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_checks import (
    BF16,
    FP16,
    NORMS,
    Inputs,
    bits,
    check_forward,
    check_gradients,
    exact,
    normal,
    packed,
    padded,
)
from torch import Tensor

from megatron_conan.kernels.soft_mask_attention import reference, soft_mask_attention
from megatron_conan.kernels.soft_mask_attention.op import soft_mask_attention as operator
from megatron_conan.kernels.soft_mask_attention.two_pass import two_pass

pytestmark = pytest.mark.gpu

HEAD_DIMS = (64, 112, 128)
INSTANCES = list(itertools.product((BF16, FP16), HEAD_DIMS))
FORMS = ("row", "column", "constant")
ALPHAS = (0.0, 1e-4, 0.03, 0.5, 1.0)
PER_HEAD = (0.0, 1.0, 0.03, 0.5)
OPENINGS: list[tuple[str, Any]] = [*itertools.product(FORMS, ALPHAS), ("constant", PER_HEAD)]
DIFFERENTIABLE = [(form, alpha) for form, alpha in OPENINGS if alpha in (0.0, 0.03, 0.5, 1.0, PER_HEAD)]
LENGTHS = [1, 17, 63, 64, 65, 127, 129, 255, 511]
LONG_LENGTHS = [1, 777, 1023, 2049]
FORWARD = torch.ops.megatron_conan.soft_mask_attention.default


# ---- what it computes


@pytest.mark.parametrize(("dtype", "head_dim"), INSTANCES)
@pytest.mark.parametrize(("form", "alpha"), OPENINGS)
def test_padded_batch_is_the_definition(device, dtype, head_dim, form, alpha):
    check_forward(padded(device, dtype, LENGTHS, head_dim=head_dim, form=form, alpha=alpha))


@pytest.mark.parametrize(("dtype", "head_dim"), INSTANCES)
@pytest.mark.parametrize(("form", "alpha"), OPENINGS)
def test_packed_batch_is_the_definition(device, dtype, head_dim, form, alpha):
    check_forward(packed(device, dtype, [17, 0, 129, 1, 64, 0, 511], head_dim=head_dim, form=form, alpha=alpha))


@pytest.mark.parametrize(("dtype", "head_dim"), INSTANCES)
@pytest.mark.parametrize(("form", "alpha"), [("row", 0.0), ("row", 0.3), ("column", 0.3), ("constant", 1.0)])
def test_long_odd_lengths(device, dtype, head_dim, form, alpha):
    check_forward(padded(device, dtype, LONG_LENGTHS, heads=(2, 1), head_dim=head_dim, form=form, alpha=alpha))
    check_forward(packed(device, dtype, LONG_LENGTHS, heads=(2, 1), head_dim=head_dim, form=form, alpha=alpha))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 2), (4, 1), (7, 1), (32, 8)], ids=str)
def test_heads_share_keys(device, heads):
    for (dtype, head_dim), form in zip(INSTANCES, itertools.cycle(FORMS), strict=False):
        check_forward(padded(device, dtype, [130, 66], heads=heads, head_dim=head_dim, form=form))


@pytest.mark.parametrize(("dtype", "head_dim"), INSTANCES)
@pytest.mark.parametrize("form", FORMS)
def test_large_scores(device, dtype, head_dim, form):
    for alpha in (0.0, 1e-4, 0.5):
        check_forward(padded(device, dtype, [200], (2, 1), head_dim, form, alpha, factor=30.0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [0, 70, 199])
def test_one_key_dominates(device, form, place):
    """Its weight against all others' then hangs on the mask."""
    for dtype, head_dim in INSTANCES:
        inputs = padded(device, dtype, [200], (2, 1), head_dim, form)
        direction = torch.nn.functional.normalize(normal(device, torch.float32, head_dim, seed=5), dim=0)
        inputs.q += (8 * direction).to(dtype)
        inputs.k[0, place, 0] = (1.5 * head_dim**0.5 * direction).to(dtype)
        for alpha in (0.0, 1e-4, 0.03):
            check_forward(replace(inputs, alpha=torch.tensor(alpha, device=device)))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_32k_rows(device, head_dim, alpha):
    """64 rows against the definition; all against two_pass. Both round to bf16 a mean of up to 32k values: 2^-8 of it each."""
    q, k, v = (normal(device, BF16, 1, 32768, n, head_dim, seed=seed) for seed, n in enumerate((2, 1, 1)))
    inputs = Inputs(q, k, v, torch.tensor(alpha, device=device), "row")
    out, _ = inputs.run()
    rows = torch.linspace(0, 32767, 64, device=device).long()
    scores = torch.einsum("ind,jd->nij", q[0, rows].double(), k[0, :, 0].double()) * head_dim**-0.5
    place = torch.arange(32768, device=device)
    weight = (alpha * 32768 / (rows.double() + 1)).clamp(max=1.0)
    mask = torch.where(place[None] > rows[:, None], weight[:, None], 1.0).log()
    want = torch.einsum("nij,jd->ind", (scores + mask).softmax(-1), v[0, :, 0].double())
    other = two_pass(q, k, v, inputs.alpha, "row")
    for _, norm in NORMS:
        assert norm(out[0, rows].double() - want) <= 2**-7 * norm(want)
        assert norm(out.double() - other.double()) <= 2**-6 * norm(other.double())


# ---- what must not depend on what


@pytest.mark.parametrize(("dtype", "head_dim"), INSTANCES)
def test_ten_runs_give_the_same_bits(device, dtype, head_dim):
    for form in FORMS:
        inputs = padded(device, dtype, LENGTHS + LONG_LENGTHS, (8, 2), head_dim, form)
        first = bits(*inputs.run())
        for _ in range(9):
            assert bits(*inputs.run()) == first


def test_packed_equals_padded_bit_by_bit(device):
    inputs = packed(device, BF16, [17, 129, 1, 64])
    out, lse = inputs.run()
    for part, _ in inputs.parts():
        one_out, one_lse = inputs.sequence(part).run()
        assert bits(out[part], lse[:, part]) == bits(one_out[0], one_lse[0])


def test_layouts_of_the_inputs(device):
    """The same bits from slices of one qkv tensor, and from [s, b, n, d] storage seen as [b, s, n, d]."""
    qkv = normal(device, BF16, 2, 130, 8, 112)
    alpha = torch.tensor(0.3, device=device)
    want = bits(*Inputs(*(x.contiguous() for x in qkv.split((4, 2, 2), dim=2)), alpha, "row").run())
    assert bits(*Inputs(*qkv.split((4, 2, 2), dim=2), alpha, "row").run()) == want
    turned = qkv.transpose(0, 1).contiguous().transpose(0, 1)  # stored as [s, b, n, d]
    assert bits(*Inputs(*turned.split((4, 2, 2), dim=2), alpha, "row").run()) == want


def test_max_length_may_be_larger(device):
    inputs = packed(device, BF16, [17, 129, 300])
    want = bits(*inputs.run())
    inputs.sequences["max_length"] = 4096
    assert bits(*inputs.run()) == want


@pytest.mark.parametrize(("dtype", "head_dim"), INSTANCES)
@pytest.mark.parametrize("form", FORMS)
def test_kernel_is_its_emulation(device, dtype, head_dim, form):
    """Both run one source. They differ in how a product's terms are added up and in the last bits of exponentials, which
    turns the rounding of a few probabilities: far less than what rounding costs both of them against the definition."""
    if shutil.which("g++") is None:
        pytest.skip("emulating the kernel needs g++")
    from megatron_conan.kernels.soft_mask_attention.emulate import emulated_forward

    for make in (padded, packed):
        inputs = make(device, dtype, [1, 64, 130], (2, 1), head_dim, form)
        out, lse = (x.cpu() for x in inputs.run())
        sequences = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in inputs.sequences.items()}
        tensors = (x.cpu() for x in (inputs.q, inputs.k, inputs.v, inputs.alpha))
        emulated, emulated_lse = emulated_forward(*tensors, form, **sequences)
        assert torch.equal(lse.isinf(), emulated_lse.isinf())
        finite = lse.isfinite()
        torch.testing.assert_close(lse[finite], emulated_lse[finite], rtol=2**-20, atol=2**-17)
        for part, _ in inputs.parts():
            one = inputs.sequence(part)
            want = exact(one.q, one.k, one.v, one.alpha, form)[0][0].cpu()
            rounding = (emulated[part].double() - want).square().mean().sqrt()
            difference = (out[part].double() - emulated[part].double()).square().mean().sqrt()
            assert difference <= rounding / 4


# ---- gradients


@pytest.mark.parametrize(("dtype", "head_dim"), INSTANCES)
@pytest.mark.parametrize(("form", "alpha"), DIFFERENTIABLE)
def test_gradients_are_those_of_the_definition(device, dtype, head_dim, form, alpha):
    """alpha's too, one a head in one of the cases. NaN in the padding."""
    check_gradients(padded(device, dtype, [1, 17, 129, 255], head_dim=head_dim, form=form, alpha=alpha))
    check_gradients(packed(device, dtype, [17, 1, 129], head_dim=head_dim, form=form, alpha=alpha))


def test_deterministic_gradients(device):
    inputs = padded(device, BF16, LENGTHS, (8, 2), 112, "constant", [0.1] * 8)
    leaves = [x.nan_to_num().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)] + [inputs.alpha.requires_grad_()]

    def run() -> list[bytes]:
        out = operator(*leaves, "constant", **inputs.sequences)
        return bits(*torch.autograd.grad(out.float().square().sum(), leaves))

    torch.use_deterministic_algorithms(True)
    try:
        first = run()
        assert all(run() == first for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)


class Attention(torch.nn.Module):
    """Projections and a learned opening, around an `attend`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.linspace(-3, 1, 4, device=device))
        self.project = torch.nn.Parameter(normal(device, torch.float32, 64, 8 * 64) / 8)

    def forward(self, x: Tensor, attend: Any) -> Tensor:
        q, k, v = (x @ self.project.to(x.dtype)).unflatten(-1, (8, 64)).split((4, 2, 2), dim=2)  # [b, s, 8 d]
        return attend(q, k, v, torch.sigmoid(self.theta), "constant")


def test_training_step_with_a_learned_alpha(device):
    """bf16 with the kernel and fp32 with the definition: losses and gradients agree to bf16, and both fall."""
    x, goal = normal(device, torch.float32, 2, 200, 64, seed=1), normal(device, torch.float32, 2, 200, 4, 64, seed=2)
    histories = []
    for dtype, attend in ((BF16, operator), (torch.float32, lambda *a: reference(*a)[0])):
        module = Attention(device)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        history = []
        for _ in range(5):
            loss = (module(x.to(dtype), attend).float() - goal).square().mean()
            optimizer.zero_grad()
            loss.backward()
            history.append((loss.item(), module.theta.grad.clone(), module.project.grad.clone()))
            optimizer.step()
        assert history[-1][0] < history[0][0]
        assert history[0][1].abs().min() > 0
        histories.append(history)
    for name, ours, plain in zip(("loss", "theta", "projection"), histories[0][0], histories[1][0], strict=True):
        difference = (torch.as_tensor(ours) - torch.as_tensor(plain)).norm()
        assert difference <= 0.03 * torch.as_tensor(plain).norm(), name


# ---- as torch sees it


def operands(inputs: Inputs, gradients: bool) -> tuple[Any, ...]:
    leaves = [x.nan_to_num().requires_grad_(gradients) for x in (inputs.q, inputs.k, inputs.v)]
    alpha = inputs.alpha.clone().requires_grad_(gradients and inputs.form != "column")
    sequences = inputs.sequences
    rest = (sequences.get("lengths"), sequences.get("cu_seqlens"), sequences.get("max_length", 0))
    return *leaves, alpha, *rest, inputs.form, 0.125


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [padded, packed])
def test_operator_is_registered_as_torch_wants_it(device, make, form):
    torch.library.opcheck(FORWARD, operands(make(device, BF16, [65, 7], form=form), gradients=True))


@pytest.mark.parametrize("make", [padded, packed])
def test_compiled_without_breaks_and_new_values_need_no_compilation(device, make):
    torch._dynamo.reset()

    def run(call: Any, alpha: float, lengths: list[int]) -> list[Tensor]:
        inputs = make(device, BF16, lengths, alpha=alpha)
        *leaves, _, _, _, _, _ = operands(inputs, gradients=True)
        out = call(*leaves, "row", **inputs.sequences)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    compiled = torch.compile(operator, fullgraph=True)
    expected = run(operator, 0.3, [100, 80])
    found = run(compiled, 0.3, [100, 80])
    assert torch.equal(found[0], expected[0])
    for x, y in zip(found[1:], expected[1:], strict=True):
        assert (x - y).float().norm() <= 0.01 * y.float().norm()  # the order of the stock backward's sums may differ
    with torch.compiler.set_stance("fail_on_recompile"):
        for alpha, lengths in ((0.0, [100, 80]), (0.7, [100, 80]), (1.0, [100, 80])):
            assert torch.equal(run(compiled, alpha, lengths)[0], run(operator, alpha, lengths)[0])


def test_cuda_graph(device):
    """Captured once, then replayed with other inputs, another alpha and other lengths."""
    inputs = padded(device, BF16, [130, 77])
    inputs.run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inputs.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = inputs.run()
    for seed, alpha, lengths in ((3, 0.0, [130, 77]), (4, 0.7, [1, 130]), (5, 1.0, [0, 64])):
        for i, x in enumerate((inputs.q, inputs.k, inputs.v)):
            x.copy_(normal(device, BF16, *x.shape, seed=10 * seed + i))
        inputs.alpha.fill_(alpha)
        inputs.sequences["lengths"].copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        assert bits(out, lse) == bits(*inputs.run())


def test_other_stream(device):
    """What is queued before on the stream in use is waited for."""
    inputs = padded(device, BF16, [2048, 1000], head_dim=128)
    want = bits(*inputs.run())
    late = replace(inputs, q=torch.zeros_like(inputs.q))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        late.q.copy_(inputs.q)
        found = late.run()
    torch.cuda.synchronize()
    assert bits(*found) == want


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    results = []
    for index in (0, 1):  # the current device stays 0
        inputs = padded(torch.device("cuda", index), BF16, [130, 77])
        found = inputs.run()
        assert all(x.device.index == index for x in found)
        assert torch.cuda.current_device() == 0
        results.append(bits(*found))
        check_gradients(inputs)
    assert results[0] == results[1]


def test_the_door_takes_the_kernel(device):
    """`auto` is the kernel in bf16: the same bits; and none of its inputs makes the host wait."""
    inputs = padded(device, BF16, [130, 77])
    arguments = (inputs.q, inputs.k, inputs.v, inputs.alpha, inputs.form)
    want = bits(inputs.run()[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [soft_mask_attention(*arguments, **inputs.sequences, backend=name) for name in ("auto", "kernel")]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bits(found[0]) == bits(found[1]) == want


@pytest.mark.parametrize("form", FORMS)
def test_backends_agree(device, form):
    inputs = padded(device, BF16, [130, 77], form=form)
    arguments = [x.nan_to_num() for x in (inputs.q, inputs.k, inputs.v)] + [inputs.alpha, form]
    want = soft_mask_attention(*arguments, **inputs.sequences, backend="reference").float()
    for backend in ("kernel", "two_pass", "sdpa"):
        found = soft_mask_attention(*arguments, **inputs.sequences, backend=backend).float()
        assert (found - want).norm() <= 0.01 * want.norm(), backend


def test_unaligned_views_go_another_way(device):
    """`auto` leaves them to two_pass, which copies them."""
    q, k, v = (normal(device, BF16, 2, 70, n, 65)[..., 1:] for n in (4, 2, 2))
    alpha, lengths = torch.tensor(0.3, device=device), torch.tensor([70, 33], device=device)
    want = soft_mask_attention(q, k, v, alpha, lengths=lengths, backend="reference").float()
    found = soft_mask_attention(q, k, v, alpha, lengths=lengths).float()
    assert (found - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize("max_length", [1, 2])
def test_sequences_of_one_token(device, max_length):
    """torch's flash attention takes them for decoding, and fails with groups, if it isn't kept from it."""
    q, k, v = (normal(device, BF16, 8, n, 64).requires_grad_() for n in (4, 2, 2))
    sequences = {"cu_seqlens": torch.tensor([0, 1, 2], dtype=torch.int32, device=device), "max_length": max_length}
    want = torch.cat([v[:2].repeat_interleave(2, dim=1), v.new_zeros(6, 4, 64)])
    for attend in (two_pass, operator):
        out = attend(q, k, v, torch.tensor(0.3, device=device), "row", **sequences)
        assert torch.equal(out, want)
        dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
        for x in (dq, dk):
            torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-3)
        assert torch.equal(dv[:2], torch.full_like(dv[:2], 2.0))


# ---- for compute-sanitizer


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("make", [padded, packed])
def test_small_forward(device, make, head_dim):
    """Two tiles of rows, one of them not full, and an empty sequence; both kernels of a head dim."""
    for form, alpha in (("row", 0.3), ("row", 0.0), ("column", 0.3)):
        check_forward(make(device, BF16, [130, 0, 3], (2, 1), head_dim, form, alpha))


def test_small_gradients(device):
    check_gradients(padded(device, BF16, [130, 3], (2, 1), form="constant", alpha=[0.1, 0.9]))
