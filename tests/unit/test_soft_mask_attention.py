"""Soft-mask attention: its definition written as a loop in fp64, its ends, its backends against each other.

Shapes: `b` batch, `s` sequence, `n` query heads, `g` key/value heads, `d` head dim.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_conan.config.tree import SoftMaskConfig
from megatron_conan.kernels.soft_mask_attention import reference, soft_mask_weights
from megatron_conan.model.attention import LEARNED_THETA_START, SoftMaskAttention, effective_alpha
from megatron_conan.model.mask import SoftMask

HEADS, HEAD_DIM, BATCH = 4, 8, 3
CPU = torch.device("cpu")
FORMS = ["row", "column", "constant", "per_head", "learned"]


@dataclass
class Inputs:
    """q [b, s, n, d], k and v [b, s, g, d], lengths [b], and a direction [b, s, n, d] for gradients, zero in padding."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    direction: Tensor

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """Fresh q, k, v that take gradients."""
        return [x.to(dtype).clone().requires_grad_() for x in (self.q, self.k, self.v)]

    @property
    def inside(self) -> Tensor:
        """[b, s] bool: positions that are no padding."""
        return torch.arange(self.q.shape[1]) < self.lengths[:, None]


def make_inputs(size: int, groups: int, ragged: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(size * 10 + groups)
    shapes = [(BATCH, size, n, HEAD_DIM) for n in (HEADS, groups, groups, HEADS)]
    q, k, v, direction = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    lengths = torch.tensor([size, max(1, size // 2), 1] if ragged else [size] * BATCH)
    inputs = Inputs(q, k, v, lengths, direction)
    inputs.direction = direction * inputs.inside[:, :, None, None]
    return inputs


def by_definition(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, alpha: Tensor, form: str) -> Tensor:
    """o_i = sum_j m_ij exp(q_i.k_j / sqrt(d)) v_j / sum_j m_ij exp(q_i.k_j / sqrt(d)), position by position.

    alpha is a scalar, or [n].
    """
    b, s, n, d = q.shape
    rows = {}
    for e, h, i in itertools.product(range(b), range(n), range(s)):
        length = int(lengths[e])
        if i >= length:
            rows[e, h, i] = torch.zeros(d, dtype=q.dtype)
            continue
        a = alpha if alpha.dim() == 0 else alpha[h]
        weights = []
        for j in range(length):  # i and j count from 0 here, from 1 in the paper
            opened = {"row": a * length / (i + 1), "column": a * length / (j + 1), "constant": a}[form]
            weights.append(torch.clamp(opened, max=1.0) if j > i else torch.ones((), dtype=q.dtype))
        group = h // (n // k.shape[2])
        exponentials = torch.exp(k[e, :length, group] @ q[e, i, h] / d**0.5) * torch.stack(weights)
        rows[e, h, i] = (exponentials / exponentials.sum()) @ v[e, :length, group]
    return torch.stack(
        [torch.stack([torch.stack([rows[e, h, i] for h in range(n)]) for i in range(s)]) for e in range(b)]
    )


def attention(backend: str, form: str, alpha: float, groups: int) -> SoftMaskAttention:
    """The module as the model builds it, at one alpha."""
    core = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        kv_channels=HEAD_DIM,
        use_cpu_initialization=True,
    )
    mask = SoftMask(SoftMaskConfig(form=form, schedule="constant", alpha=alpha), steps=1, device=CPU)
    return SoftMaskAttention(core, layer_number=1, soft_mask=mask, backend=backend)


def run(module: SoftMaskAttention, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """[b, s, n, d] through megatron-core's layout, [s, b, n, d] in and [s, b, n * d] out."""
    out = module(*(x.transpose(0, 1) for x in (q, k, v)), lengths)
    s, b = out.shape[:2]
    return out.reshape(s, b, HEADS, HEAD_DIM).transpose(0, 1)


def gradients(out: Tensor, inputs: Inputs, leaves: list[Tensor]) -> list[Tensor]:
    (out * inputs.direction.to(out.dtype)).sum().backward()
    # a single token leaves theta no say: no gradient is a gradient of zero
    return [torch.zeros_like(x).double() if x.grad is None else x.grad.double() for x in leaves]


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("alpha", "groups"), [(0.1, 2), (0.6, 1), (0.6, 2), (0.9, 4)])
def test_half_open_mask_is_its_definition_in_value_and_gradient(size, form, alpha, groups):
    inputs = make_inputs(size, groups)
    theta = torch.linspace(-2, 2, HEADS, dtype=torch.float64, requires_grad=True)
    opening = torch.tensor(alpha, dtype=torch.float64)
    if form == "learned":
        opening = alpha + (1 - alpha) * torch.sigmoid(theta)
    elif form == "per_head":
        opening = torch.linspace(0.05, 1.0, HEADS, dtype=torch.float64)
    kernel_form = form if form in ("row", "column") else "constant"

    exact = inputs.leaves(torch.float64)
    expected = by_definition(*exact, inputs.lengths, opening, kernel_form)
    expected_gradients = gradients(expected, inputs, [*exact, theta] if form == "learned" else exact)

    leaves = inputs.leaves(torch.float64)
    found, _ = reference(*leaves, opening.detach(), kernel_form, lengths=inputs.lengths)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(found, inputs, leaves), expected_gradients, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    if form == "per_head":
        return  # an alpha a head is what the learned form makes; no module takes it as such
    for backend in ("reference", "sdpa", "two_pass"):
        module = attention(backend, form, alpha, groups)
        leaves = inputs.leaves(torch.float32)
        if module.theta is not None:
            torch.nn.init.ones_(module.theta).data.copy_(theta.detach() - LEARNED_THETA_START)
            leaves.append(module.theta)
        out = run(module, *leaves[:3], inputs.lengths)
        torch.testing.assert_close(out[inputs.inside].double(), expected[inputs.inside], rtol=0, atol=2e-6)
        for a, b in zip(gradients(out, inputs, leaves), expected_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "two_pass"])
@pytest.mark.parametrize("form", ["row", "column", "constant"])
@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_both_ends_are_stock_attention(backend, form, size, alpha):
    """alpha 0 is causal, alpha 1 bidirectional with the padding's keys masked; [s, b, ...] rows of padding don't count."""
    inputs = make_inputs(size, groups=2)
    q, k, v = (x.float().transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))  # [b, n, s, d]
    keys = inputs.inside[:, None, None, :]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    expected = scaled_dot_product_attention(q, k, v, keys & causal if alpha == 0 else keys, enable_gqa=True)
    out = run(attention(backend, form, alpha, 2), *inputs.leaves(torch.float32), inputs.lengths)
    torch.testing.assert_close(out[inputs.inside], expected.transpose(1, 2)[inputs.inside], rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", ["row", "column", "constant", "learned"])
@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("with_lengths", [True, False])
@pytest.mark.parametrize("name", ["sdpa", "two_pass"])
def test_backends_equal_reference_in_fp32(name, form, alpha, with_lengths):
    inputs = make_inputs(16, groups=2, ragged=with_lengths)
    lengths = inputs.lengths if with_lengths else None
    results = []
    for backend in (name, "reference"):
        module, leaves = attention(backend, form, alpha, 2), inputs.leaves(torch.float32)
        out = run(module, *leaves, lengths)
        results.append((out[inputs.inside], gradients(out, inputs, leaves), module.theta))
    (fast, fast_gradients, fast_theta), (plain, plain_gradients, plain_theta) = results
    torch.testing.assert_close(fast, plain, rtol=0, atol=2e-6)
    for a, b in zip(fast_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)
    if form == "learned":
        torch.testing.assert_close(fast_theta.grad, plain_theta.grad, rtol=1e-4, atol=1e-6)
        assert bool(fast_theta.grad.any()) == (alpha < 1.0)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "two_pass"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_padding_and_other_rows_of_the_batch_have_no_influence(backend, alpha):
    inputs = make_inputs(7, groups=2)
    module = attention(backend, "row", alpha, 2)
    plain = run(module, *inputs.leaves(torch.float32), inputs.lengths)
    for x in (inputs.q, inputs.k, inputs.v):
        x[~inputs.inside] = 50.0
    noisy = run(module, *inputs.leaves(torch.float32), inputs.lengths)
    assert torch.equal(noisy[inputs.inside], plain[inputs.inside])
    for row, length in enumerate(inputs.lengths.tolist()):
        alone = [x[row : row + 1, :length] for x in inputs.leaves(torch.float32)]
        out = run(module, *alone, inputs.lengths[row : row + 1])
        torch.testing.assert_close(out[0], plain[row, :length], rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", ["row", "column", "constant", "per_head"])
def test_reference_passes_gradcheck(form):
    q, k, v = (
        torch.randn(2, 5, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2)
    )
    alpha = torch.linspace(0.2, 0.9, 4, dtype=torch.float64) if form == "per_head" else torch.tensor(0.27).double()
    leaves = tuple(x.requires_grad_() for x in (q, k, v, alpha))
    kernel_form = "constant" if form == "per_head" else form
    lengths = torch.tensor([5, 3])
    assert torch.autograd.gradcheck(lambda q, k, v, a: reference(q, k, v, a, kernel_form, lengths=lengths)[0], leaves)


def test_weights_as_the_paper_prints_them():
    """Row form, l = 4, alpha = .5: row i has min(2 / i, 1) above the diagonal."""
    row = soft_mask_weights("row", torch.tensor(0.5), torch.tensor([4]), 5)
    expected = torch.tensor(
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 2 / 3, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]], dtype=torch.float32
    )
    torch.testing.assert_close(row[0, 0], expected)
    column = soft_mask_weights("column", torch.tensor(0.5), torch.tensor([4]), 4)
    torch.testing.assert_close(column[0, 0, 0], torch.tensor([1, 1, 2 / 3, 1 / 2]))


@pytest.mark.parametrize("form", ["row", "column", "constant"])
def test_a_wider_alpha_never_closes_a_position(form):
    alphas = [0.0, 0.1, 0.3, 0.7, 1.0]
    weights = [soft_mask_weights(form, torch.tensor(alpha), torch.tensor([9]), 9) for alpha in alphas]
    assert all(bool((a <= b).all()) for a, b in itertools.pairwise(weights))
    assert torch.equal(weights[0][0, 0], torch.ones(9, 9).tril())
    assert torch.equal(weights[-1][0, 0], torch.ones(9, 9))


def test_learned_form_starts_nearly_causal_and_ends_bidirectional():
    module = attention("sdpa", "learned", 0.0, 2)
    assert module.theta is not None
    assert module.theta.shape == (HEADS,)
    assert not module.theta.any()
    form, alpha = effective_alpha(module.soft_mask, module.theta)
    assert form == "constant"
    assert ((alpha > 0.001) & (alpha < 0.003)).all()
    form, alpha = effective_alpha(attention("sdpa", "learned", 1.0, 2).soft_mask, module.theta)
    assert torch.equal(alpha, torch.ones(HEADS))


@pytest.mark.parametrize("backend", ["two_pass", "sdpa", "reference"])
def test_learned_opening_and_scale_count_without_gradients_too(backend):
    """At alpha = 0 on the host the mask would be causal, but theta opens it."""
    inputs, closed = make_inputs(7, 2), attention(backend, "learned", 0.0, 2)
    module = SoftMaskAttention(closed.config, 1, closed.soft_mask, backend, softmax_scale=0.7)
    q, k, v = (x.float() for x in (inputs.q, inputs.k, inputs.v))
    with torch.no_grad():
        module.theta.copy_(torch.linspace(-2, 2, HEADS) - LEARNED_THETA_START)
        found = run(module, q, k, v, inputs.lengths)
    expected = reference(
        q, k, v, torch.sigmoid(module.theta + LEARNED_THETA_START), "constant", lengths=inputs.lengths, scale=0.7
    )[0]
    assert module.scale == 0.7
    torch.testing.assert_close(found[inputs.inside], expected[inputs.inside].detach(), rtol=1e-5, atol=1e-6)


def test_wrong_forms_are_refused():
    with pytest.raises(ValueError, match="known are row, column, constant"):
        soft_mask_weights("diagonal", torch.tensor(0.5), torch.tensor([3]), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha per head is defined for form=constant only"):
        soft_mask_weights("row", torch.ones(4), torch.tensor([3]), 3)


def test_bf16_mask_has_the_pattern_of_fp32() -> None:
    """bf16 can't count beyond 256: positions must not be computed in it."""
    lengths = torch.tensor([301, 400])
    for form in ("row", "column", "constant"):
        half = soft_mask_weights(form, torch.tensor(0.5, dtype=torch.bfloat16), lengths, 400)
        full = soft_mask_weights(form, torch.tensor(0.5), lengths, 400)
        torch.testing.assert_close(half.float(), full)
