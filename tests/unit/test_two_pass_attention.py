"""Two stock flash calls, merged, are soft-mask attention: value, log-sum-exp and every gradient, on the CPU's kernel and on an
emulation of CUDA's.

Shapes: `b` batch, `s` sequence, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_inputs import LAYOUTS, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from two_pass_checks import SCALE, assert_same, expected, found, tensor
from varlen_emulation import emulate_varlen

from megatron_conan.kernels.soft_mask_attention import Form, soft_mask_weights
from megatron_conan.kernels.soft_mask_attention.stock_flash import padded_sequences
from megatron_conan.kernels.soft_mask_attention.two_pass import (
    _with_key_weights,
    two_pass,
    two_pass_backward,
    two_pass_forward,
)

CASES = [
    *(("row", x) for x in (0.0, 1e-4, 0.03, 0.5, 1.0)),
    *(("column", x) for x in (0.0, 1e-4, 0.03, 0.5, 1.0)),
    *(("constant", x) for x in (0.0, 1e-4, 0.03, 0.5, 1.0, (0.0, 0.03, 0.5, 1.0))),
]
"""Form and alpha; alpha = .5 meets lengths of 2 and 64, where alpha l / i is exactly 1 in one row."""


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("form", "alpha"), CASES)
def test_two_passes_are_the_definition(form, alpha, layout, heads):
    inputs = make_inputs(layout, heads=heads)
    assert_same(found(inputs, tensor(alpha), form), expected(inputs, tensor(alpha), form))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("form", "alpha"), CASES)
def test_two_passes_are_the_definition_by_the_way_of_cuda(form, alpha, layout, monkeypatch):
    inputs = make_inputs(layout)
    wanted = expected(inputs, tensor(alpha), form)
    emulate_varlen(monkeypatch)
    assert_same(found(inputs, tensor(alpha), form), wanted)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_call_does_at_the_ends(alpha, layout, cuda, monkeypatch):
    inputs = make_inputs(layout)
    wanted = expected(inputs, tensor(alpha), "row")
    if cuda:
        emulate_varlen(monkeypatch)
    assert_same(found(inputs, tensor(alpha), "row", known_alpha=alpha), wanted)


def test_a_known_alpha_between_the_ends_changes_nothing():
    inputs = make_inputs("ragged")
    plain, known = (found(inputs, tensor(0.5), "row", known_alpha=x) for x in (None, 0.5))
    assert torch.equal(plain[0], known[0])
    assert all(torch.equal(x, y) for x, y in zip(plain[2], known[2], strict=False))


@pytest.mark.parametrize("form", ["row", "column", "constant"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_closed_mask_is_bitwise_causal(form, layout):
    inputs = make_inputs(layout).to(torch.float32)
    alpha = torch.zeros(())
    two, one = (found(inputs, alpha, form, known_alpha=x) for x in (None, 0.0))
    for x, y in zip((two[0], two[1], *two[2]), (one[0], one[1], *one[2]), strict=False):
        assert torch.equal(x, y)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    groups=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
    form=st.sampled_from(["row", "column", "constant", "per_head"]),
    opening=st.floats(0, 1),
    scale=st.sampled_from([None, 0.01, 0.7]),
)
def test_any_shape(lengths, groups, heads_per_group, head_dim, layout, form, opening, scale):
    n = groups * heads_per_group
    inputs = make_inputs(layout, tuple(lengths), (n, groups), head_dim, seed=sum(lengths))
    alpha = tensor(opening) * (torch.linspace(0, 1, n, dtype=torch.float64) if form == "per_head" else 1)
    kernel_form: Form = "constant" if form == "per_head" else form
    assert_same(found(inputs, alpha, kernel_form, scale), expected(inputs, alpha, kernel_form, scale), 1e-11)


@pytest.mark.parametrize(
    ("form", "alpha"),
    [("row", 0.27), ("row", 0.0), ("constant", 0.4), ("constant", (0.1, 0.2, 0.9, 1.0)), ("column", 0.3)],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(form, alpha, layout):
    inputs = make_inputs(layout, (5, 0, 3), d=3)
    leaves = [x.requires_grad_() for x in inputs.tensors]
    opening = tensor(alpha).requires_grad_(form != "column" and alpha != 0.0)  # alpha = 0 has no left side to step to
    assert torch.autograd.gradcheck(
        lambda q, k, v, a: two_pass(q, k, v, a, form, **inputs.sequences), (*leaves, opening), fast_mode=False
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha", [0.3, (0.0, 0.2, 0.9, 1.0)])
def test_autograd_gives_what_the_backward_gives(alpha, layout):
    inputs = make_inputs(layout)
    leaves = [x.clone().requires_grad_() for x in (*inputs.tensors, tensor(alpha))]
    out = two_pass(*leaves, "constant", **inputs.sequences, scale=SCALE, known_alpha=0.0)  # a learned alpha isn't known
    wanted = found(inputs, tensor(alpha), "constant")
    assert torch.equal(out, wanted[0])
    for x, y in zip(torch.autograd.grad(out, leaves, inputs.grad), wanted[2], strict=True):
        assert torch.equal(x, y)


def test_no_second_derivative():
    leaves = [x.requires_grad_() for x in (*make_inputs("full", (4,)).tensors, tensor(0.3))]
    out = two_pass(*leaves, "row")
    for x in torch.autograd.grad(out.square().sum(), leaves, create_graph=True):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            x.square().sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_takes_output_and_lse_of_another_implementation(layout):
    inputs, alpha = make_inputs(layout), tensor(0.3)
    out, lse, wanted = expected(inputs, alpha, "row")
    *gradients, d_alpha = two_pass_backward(
        inputs.grad, *inputs.tensors, out, lse, alpha, "row", **inputs.sequences, scale=SCALE, alpha_gradient=True
    )
    for x, y in zip([*gradients, d_alpha], wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_each_time(layout):
    inputs, alpha = make_inputs(layout).to(torch.float32), tensor((0.0, 0.03, 0.5, 1.0), torch.float32)
    first, second = (found(inputs, alpha, "constant") for _ in range(2))
    for x, y in zip((*first[:2], *first[2]), (*second[:2], *second[2]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("form", ["row", "column", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_error_is_at_most_twice_that_of_torch(dtype, form, alpha):
    """Against fp64 of the same rounded inputs. torch gets a plain mask at the ends and its own dense bias between."""
    inputs = make_inputs("full", (127, 96, 1), d=32).to(dtype)
    exact = expected(inputs.to(torch.float64), tensor(alpha), form, None)
    ours = found(inputs, tensor(alpha, torch.float32), form, None)
    leaves = [x.clone().transpose(1, 2).requires_grad_() for x in inputs.tensors]  # [b, s, n, d] -> [b, n, s, d]
    size = inputs.q.shape[1]
    mask = soft_mask_weights(form, tensor(alpha, torch.float32), torch.full((3,), size), size)
    bias = None if alpha in (0.0, 1.0) else torch.log(mask).to(dtype)
    out = scaled_dot_product_attention(*leaves, attn_mask=bias, is_causal=alpha == 0.0, enable_gqa=True)
    gradients = torch.autograd.grad(out, leaves, inputs.grad.transpose(1, 2))
    theirs = [x.detach().transpose(1, 2) for x in (out, *gradients)]
    for mine, other, truth in zip((ours[0], *ours[2][:3]), theirs, (exact[0], *exact[2][:3]), strict=True):
        error, allowed = ((x.double() - truth).norm() for x in (mine, other))
        assert error <= 2 * allowed
    # lse is fp32 in bf16 too; the CPU's kernel takes a coarser exp there
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-4)
    if form != "column":
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(ours[2][3].double(), exact[2][3], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", ["row", "column", "constant"])
@pytest.mark.parametrize("alpha", [1e-4, 0.5, 1.0])
def test_large_scores_and_one_key_above_all(form, alpha):
    """Scores of hundreds, beyond the range of exp in fp32, and a last key that takes all there is."""
    inputs = make_inputs("ragged", (33, 40))
    inputs.q *= 30
    inputs.k[0, 32] = 4 * inputs.q[0, 3, :2] / inputs.q[0, 3, :2].norm(dim=-1, keepdim=True)
    inputs = inputs.to(torch.float32)
    exact = expected(inputs.to(torch.float64), tensor(alpha, torch.float32).double(), form)
    ours = found(inputs, tensor(alpha, torch.float32), form)
    assert float(exact[1].max()) > 100
    # fp32 scores of 300 are known to 2e-5, and so is a probability
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=0, atol=5e-4)
    for x, y in zip(ours[2][:3], exact[2][:3], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-5, 0.125, 8.0])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.25])
def test_column_weights_are_exact_in_half_precision(dtype, scale, alpha):
    """What the dims of the keys' weights add to a score is log min(l / j, 1 / alpha) to fp32's rounding, at any scale."""
    size = 300
    q, k = torch.zeros(size, 2, 8, dtype=dtype), torch.zeros(size, 1, 8, dtype=dtype)
    sequences = padded_sequences(q[None], None)
    q, k, _ = _with_key_weights(q, k, k, tensor(alpha, torch.float32), "column", sequences, scale)
    ratio = size / torch.arange(1, size + 1, dtype=torch.float64)
    added = scale * (q.double()[:1] @ k.double().transpose(1, 2))[..., 0]  # [s, n]
    wanted = torch.log(ratio.clamp(max=1 / alpha if alpha else math.inf))
    torch.testing.assert_close(added, wanted[:, None].expand(-1, 2), rtol=0, atol=2e-6)


def test_closed_keys_beyond_all_range_take_no_part():
    """At alpha = 0 a key behind the query may score e^1000 above all it sees."""
    inputs = make_inputs("full", (5,), (1, 1))
    inputs.k[0, 4], inputs.q[0, 0] = 50.0, 10.0
    actual, wanted = found(inputs, tensor(0.0), "row"), expected(inputs, tensor(0.0), "row")
    assert_same((*actual[:2], actual[2][:3]), (*wanted[:2], wanted[2][:3]))


def test_no_gradient_of_alpha_in_the_column_form():
    inputs = make_inputs("full", (4,))
    alpha = tensor(0.5).requires_grad_()
    with pytest.raises(ValueError, match=r"no gradient of alpha in the column form; use backend=sdpa or form=row"):
        two_pass(*inputs.tensors, alpha, "column")
    with torch.no_grad():
        assert two_pass(*inputs.tensors, alpha, "column").shape == inputs.q.shape
    with pytest.raises(ValueError, match=r"no gradient of alpha for form=column"):
        two_pass_backward(
            inputs.grad, *inputs.tensors, inputs.q, inputs.q[..., 0], alpha, "column", alpha_gradient=True
        )
    with pytest.raises(ValueError, match=r"for form=row with known_alpha=0.5; use row or constant, None"):
        two_pass_backward(
            *(inputs.grad, *inputs.tensors, inputs.q, inputs.q[..., 0], alpha, "row"),
            alpha_gradient=True,
            known_alpha=0.5,
        )


def test_alpha_may_be_of_half_precision():
    """alpha l / i is made in fp32, where lengths above 256 are exact; its gradient is in alpha's dtype."""
    inputs = make_inputs("ragged", (301,), (2, 1)).to(torch.float32)
    half = tensor(0.25, torch.bfloat16)
    plain, rounded = (found(inputs, x, "row") for x in (half.float(), half))
    for x, y in zip((*plain[:2], *plain[2][:3]), (*rounded[:2], *rounded[2][:3]), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(rounded[2][3], plain[2][3].bfloat16())


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["row", "column", "constant"])
def test_nothing_depends_on_values(form, layout, cuda, monkeypatch):
    """Tensors without values go through forward and backward, and torch's own declarations of both ops take the arguments.

    The fake tensors are of the CPU even on the way of CUDA: torch without CUDA can't index fake tensors of a GPU.
    """
    inputs = make_inputs(layout)
    dtype, device = torch.bfloat16 if cuda else torch.float32, "cpu"
    if cuda:
        emulate_varlen(monkeypatch, ops=False)
    with FakeTensorMode():
        q, k, v, grad = (torch.empty(x.shape, dtype=dtype, device=device) for x in (*inputs.tensors, inputs.grad))
        sequences = {
            name: torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, Tensor) else value
            for name, value in inputs.sequences.items()
        }
        for known in (None, 0.0, 1.0):
            alpha, learned = torch.empty((), device=device), form != "column" and known is None
            both: dict[str, Any] = {**sequences, "known_alpha": known}
            out, lse = two_pass_forward(q, k, v, alpha, form, **both)
            assert (out.shape, out.dtype, out.device) == (q.shape, dtype, q.device)
            assert lse.dtype == torch.float32
            gradients = two_pass_backward(grad, q, k, v, out, lse, alpha, form, **both, alpha_gradient=learned)
            for x, like in zip(gradients, (q, k, v, alpha if learned else None), strict=True):
                assert (x is None) == (like is None)
                assert x is None or (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)


def test_compiled_without_a_break_and_once_for_all_alphas():
    inputs = make_inputs("ragged", (9, 4)).to(torch.float32)
    compilations: list[int] = []

    def count(graph: Any, example_inputs: Any) -> Any:
        compilations.append(1)
        return aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(two_pass, backend=count, fullgraph=True)
    for value in (0.0, 0.3, 1.0):
        alpha = torch.tensor(value, requires_grad=True)
        leaves = [x.clone().requires_grad_() for x in inputs.tensors]
        out = compiled(*leaves, alpha, "row", **inputs.sequences, scale=SCALE)
        wanted = expected(inputs.to(torch.float64), alpha.detach().double(), "row")
        torch.testing.assert_close(out.double(), wanted[0], rtol=0, atol=1e-5)
        for x, y in zip(torch.autograd.grad(out, [*leaves, alpha], inputs.grad), wanted[2], strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
    assert len(compilations) == 1
