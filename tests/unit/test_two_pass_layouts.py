"""Two stock flash calls whatever the inputs' layout: short and empty sequences, strides, what stands between sequences.

Shapes: `b` batch, `s` sequence, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

import math

import pytest
import torch
from attention_inputs import LAYOUTS, Inputs, make_inputs
from two_pass_checks import SCALE, assert_same, expected, found, tensor
from varlen_emulation import emulate_varlen

from megatron_conan.kernels.soft_mask_attention.stock_flash import is_aligned
from megatron_conan.kernels.soft_mask_attention.two_pass import two_pass, two_pass_forward


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("form", ["row", "column", "constant"])
def test_many_tokens_before_short_sequences_and_none_behind(form, cuda, monkeypatch):
    """Places of tokens that belong to no sequence, and of the empty one at the end, must not lead out of the tensors."""
    inputs = make_inputs("full", (8,))
    q, k, v, grad = (x[0] for x in (*inputs.tensors, inputs.grad))  # [1, 9, n, d] -> [9, n, d]
    sequences = {"cu_seqlens": torch.tensor([6, 9, 9], dtype=torch.int32), "max_length": 3}
    inputs = Inputs(q, k, v, grad, sequences, torch.arange(9) >= 6)
    wanted = expected(inputs, tensor(0.3), form)
    if cuda:
        emulate_varlen(monkeypatch)
    assert_same(found(inputs, tensor(0.3), form), wanted)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("form", ["row", "column"])
@pytest.mark.parametrize("boundaries", [None, [0, 1], [0, 1, 2, 3]])
def test_sequences_of_one_token(boundaries, form, cuda, monkeypatch):
    """torch's own kernel takes them for decoding, and fails with groups."""
    inputs = make_inputs("full", (1,))
    if boundaries is not None:
        q, k, v, grad = (torch.cat([x[0]] * 8) for x in (*inputs.tensors, inputs.grad))  # [1, 1, n, d] -> [8, n, d]
        sequences = {"cu_seqlens": torch.tensor(boundaries, dtype=torch.int32), "max_length": 1}
        inputs = Inputs(q, k, v, grad, sequences, torch.arange(8) < boundaries[-1])
    wanted = expected(inputs, tensor(0.3), form)
    if cuda:
        emulate_varlen(monkeypatch)
    assert_same(found(inputs, tensor(0.3), form), wanted)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("layout", ["ragged", "packed"])
@pytest.mark.parametrize(("form", "known"), [("row", None), ("column", None), ("constant", 0.0), ("constant", 1.0)])
def test_nan_where_no_sequence_is_has_no_influence(form, known, layout, cuda, monkeypatch):
    inputs = make_inputs(layout)
    alpha = tensor(0.4 if known is None else known)
    wanted = expected(inputs, alpha, form)
    if cuda:
        emulate_varlen(monkeypatch)
    for x in (*inputs.tensors, inputs.grad):
        x[~inputs.inside] = math.nan
    actual = found(inputs, alpha, form, known_alpha=known)
    assert_same(actual, wanted)
    assert_same(expected(inputs, alpha, form), wanted)  # the reference keeps out of the padding too
    for x in (actual[0], *actual[2][:3]):
        assert not x[~inputs.inside].any()
    assert bool((actual[1].isneginf().any(-2 if layout == "ragged" else 0) == ~inputs.inside).all())


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_and_an_expanded_gradient(layout, cuda, monkeypatch):
    """megatron-core hands over [s, b, ...] transposed; .sum() hands back one number for all."""
    inputs = make_inputs(layout)
    inputs.grad = torch.ones_like(inputs.grad)
    wanted = expected(inputs, tensor(0.3), "row")
    leaves = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs.tensors]
    assert not leaves[0].is_contiguous()
    if cuda:
        emulate_varlen(monkeypatch)
    out = two_pass(*leaves, tensor(0.3), "row", **inputs.sequences, scale=SCALE)
    torch.testing.assert_close(out, wanted[0], rtol=1e-12, atol=1e-12)
    for x, y in zip(torch.autograd.grad(out.sum(), leaves), wanted[2], strict=False):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("gap", "start"), [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_that_begin_between_two_16_bytes(layout, gap, start, monkeypatch):
    """Views into wider tensors: the stock kernel of CUDA can't read them, so they are copied."""
    inputs = make_inputs(layout)
    wanted = expected(inputs, tensor(0.3), "row")
    emulate_varlen(monkeypatch)
    leaves = [torch.cat([x.new_zeros(*x.shape[:-1], start), x], -1) for x in inputs.tensors]
    leaves = [torch.cat([x, x.new_zeros(*x.shape[:-1], gap)], -1).requires_grad_() for x in leaves]
    views = [x[..., start : start + inputs.q.shape[-1]] for x in leaves]
    assert not any(is_aligned(x) for x in views)
    out = two_pass(*views, tensor(0.3), "row", **inputs.sequences, scale=SCALE)
    torch.testing.assert_close(out, wanted[0], rtol=1e-12, atol=1e-12)
    for x, y in zip(torch.autograd.grad(out, views, inputs.grad), wanted[2], strict=False):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_tokens(shape):
    q, k, v = (torch.zeros(*shape, n, 8, requires_grad=True) for n in (4, 2, 2))
    alpha = torch.tensor(0.5, requires_grad=True)
    out = two_pass(q, k, v, alpha, "row")
    assert out.shape == q.shape
    assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
    assert two_pass_forward(q, k, v, alpha, "row")[1].shape == (shape[0], 4, shape[1])
