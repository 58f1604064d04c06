"""The operator of soft-mask attention on the CPU: registered as torch wants it, compiled as it runs eagerly, refusing in words.

Shapes: `b` batch, `s` sequence, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_conan.kernels.soft_mask_attention import library, op
from megatron_conan.kernels.soft_mask_attention.op import (
    library_error,
    soft_mask_attention,
    soft_mask_attention_with_lse,
)
from megatron_conan.kernels.soft_mask_attention.reference import reference
from megatron_conan.kernels.soft_mask_attention.two_pass import two_pass

FORWARD = torch.ops.megatron_conan.soft_mask_attention.default
BACKWARD = torch.ops.megatron_conan.soft_mask_attention_backward.default
SCALE = 0.3
LAYOUTS = ["padded", "full", "packed"]
FORMS = ["row", "column", "constant", "learned"]


@dataclass
class Inputs:
    """q [b, s, n, d] or [t, n, d], k and v with g heads, alpha [] or [n], and how the sequences lie."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    form: str
    sequences: dict[str, Any]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.alpha

    def operands(self) -> tuple[Any, ...]:
        """Arguments of the operator itself."""
        sequences = self.sequences
        rest = (sequences.get("lengths"), sequences.get("cu_seqlens"), sequences.get("max_length", 0), self.form, SCALE)
        return *self.leaves, *rest


def make_inputs(layout: str, form: str = "row", gradients: bool = True, opening: float = 0.4) -> Inputs:
    generator = torch.Generator().manual_seed(5)
    rows = (13,) if layout == "packed" else (2, 7)
    q, k, v = (torch.randn(*rows, heads, 8, generator=generator) for heads in (4, 2, 2))
    alpha = torch.linspace(0.1, 0.9, 4) if form == "learned" else torch.tensor(opening)
    sequences = {
        "padded": {"lengths": torch.tensor([7, 3], dtype=torch.int32)},
        "full": {},
        "packed": {"cu_seqlens": torch.tensor([0, 5, 5, 12], dtype=torch.int32), "max_length": 7},
    }[layout]
    kernel_form = "constant" if form == "learned" else form
    inputs = Inputs(q, k, v, alpha, kernel_form, sequences)
    for x in inputs.leaves[:3] if form == "column" else inputs.leaves:
        x.requires_grad_(gradients)
    return inputs


def run(attend: Any, inputs: Inputs) -> list[Tensor]:
    """Output, and the gradients of what takes one."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs.leaves]
    out = attend(*leaves, inputs.form, scale=SCALE, **inputs.sequences)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    wanted = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), wanted)]


@pytest.mark.parametrize(("layout", "form"), itertools.product(LAYOUTS, FORMS))
def test_operator_is_registered_as_torch_wants_it(layout, form):
    torch.library.opcheck(FORWARD, make_inputs(layout, form).operands())
    inputs = make_inputs(layout, form, gradients=False)
    operands = inputs.operands()
    out, lse = FORWARD(*operands)
    for alpha_gradient in (False, form != "column"):
        torch.library.opcheck(BACKWARD, (out, *operands[:3], out, lse, *operands[3:], alpha_gradient))


@pytest.mark.parametrize(("layout", "form"), itertools.product(LAYOUTS, FORMS))
def test_operator_is_two_pass_and_the_definition(layout, form):
    inputs = make_inputs(layout, form)
    found = run(soft_mask_attention, inputs)
    for x, y in zip(found, run(two_pass, inputs), strict=True):
        assert torch.equal(x, y)
    sequences = {name: value for name, value in inputs.sequences.items() if name != "max_length"}
    expected = run(lambda *a, **b: reference(*a, scale=SCALE, **sequences)[0], inputs)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("layout", "form"), [("padded", "row"), ("packed", "learned"), ("full", "column")])
def test_compiled_equals_eager_and_new_values_need_no_compilation(layout, form):
    torch._dynamo.reset()
    inputs = make_inputs(layout, form)
    compiled = torch.compile(soft_mask_attention, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(compiled, inputs), run(soft_mask_attention, inputs), strict=True):
        assert torch.equal(found, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        for opening in (0.0, 0.7, 1.0):
            changed = make_inputs(layout, form, opening=opening)
            if layout == "padded":
                changed.sequences["lengths"] = torch.tensor([1, 6], dtype=torch.int32)
            if layout == "packed":
                changed.sequences["cu_seqlens"] = torch.tensor([0, 1, 8, 13], dtype=torch.int32)
            for found, expected in zip(run(compiled, changed), run(soft_mask_attention, changed), strict=True):
                assert torch.equal(found, expected)


def test_sizes_can_be_dynamic():
    torch._dynamo.reset()
    compiled = torch.compile(soft_mask_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 13, 29):
        q, k, v = (
            torch.randn(tokens, heads, 8, generator=torch.Generator().manual_seed(tokens)) for heads in (4, 2, 2)
        )
        sequences = {"cu_seqlens": torch.tensor([0, 3, tokens], dtype=torch.int32), "max_length": tokens - 3}
        alpha = torch.tensor(0.3)
        assert torch.equal(compiled(q, k, v, alpha, **sequences), soft_mask_attention(q, k, v, alpha, **sequences))


def test_gradient_of_alpha_is_computed_only_where_it_is_asked_for(monkeypatch):
    asked = []
    original = torch.ops.megatron_conan.soft_mask_attention_backward

    def note(*arguments):
        asked.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(torch.ops.megatron_conan, "soft_mask_attention_backward", note)
    for gradients in (True, False):
        inputs = make_inputs("padded")
        inputs.alpha.requires_grad_(gradients)
        run(soft_mask_attention, inputs)
    assert asked == [True, False]


def test_the_operator_gets_what_the_kernel_reads(monkeypatch):
    """alpha in fp32 and lengths in int32, both contiguous, whatever the caller has."""
    seen = []
    monkeypatch.setattr(torch.ops.megatron_conan, "soft_mask_attention", lambda *x: seen.append(x) or x[:2])
    q, k, v = (torch.zeros(2, 7, n, 8, dtype=torch.bfloat16) for n in (4, 2, 2))
    lengths_of_others = torch.tensor([[7, 1], [3, 1]], dtype=torch.int32)[:, 0]
    soft_mask_attention(q, k, v, torch.tensor(0.5).expand(4), form="constant", lengths=lengths_of_others)
    soft_mask_attention(q, k, v, torch.tensor(0.5).bfloat16(), lengths=torch.tensor([7, 3]))
    assert all(alpha.is_contiguous() and lengths.is_contiguous() for *_, alpha, lengths, _, _, _, _ in seen)
    *_, alpha, lengths, cu_seqlens, max_length, form, scale = seen[-1]
    assert (alpha.dtype, lengths.dtype) == (torch.float32, torch.int32)
    assert (cu_seqlens, max_length, form, scale) == (None, 0, "row", 8**-0.5)


def test_without_the_library_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(op, "library_error", lambda: "not built: run `make kernels`")
    with FakeTensorMode():
        q = torch.empty(1, 3, 2, 64, dtype=torch.bfloat16, device="cuda")
        with pytest.raises(RuntimeError, match="the soft-mask kernel isn't there: not built: run `make kernels`"):
            soft_mask_attention(q, q, q, torch.empty((), device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_shapes_and_dtypes_are_known_before_it_runs(dtype):
    """Output like q, lse in fp32, or fp64 for fp64: of the fake implementation as of the real one."""
    inputs = make_inputs("packed", gradients=False)
    q, k, v, *rest = inputs.operands()
    operands = (q.to(dtype), k.to(dtype), v.to(dtype), inputs.alpha.to(torch.promote_types(dtype, torch.float32)))
    torch.library.opcheck(FORWARD, (*operands, *rest[1:]), test_utils="test_faketensor")
    assert FORWARD(*operands, *rest[1:])[1].dtype == operands[3].dtype


def test_log_sum_exp_carries_no_gradient():
    inputs = make_inputs("padded")
    out, lse = soft_mask_attention_with_lse(*inputs.leaves, "row", lengths=inputs.sequences["lengths"])
    assert out.requires_grad
    assert not lse.requires_grad
    assert lse.shape == (2, 4, 7)
    assert lse.dtype == torch.float32
    assert torch.isneginf(lse[1, :, 3:]).all()


def test_fp64_passes_gradcheck():
    inputs = make_inputs("padded")
    leaves = tuple(x.detach().double().requires_grad_() for x in inputs.leaves)
    lengths = inputs.sequences["lengths"].long()
    assert torch.autograd.gradcheck(lambda *x: soft_mask_attention(*x, "row", lengths=lengths), leaves)


def test_a_second_derivative_is_refused():
    q = torch.randn(1, 3, 1, 8, requires_grad=True)
    out = soft_mask_attention(q, q, q, torch.tensor(0.5))
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; use backend=reference"):
        grad.sum().backward()


def test_wrong_inputs_are_refused_in_words():
    inputs = make_inputs("packed", gradients=False)
    q, k, v, alpha = inputs.leaves
    with pytest.raises(ValueError, match="needs cu_seqlens and max_length"):
        soft_mask_attention(q, k, v, alpha)
    with pytest.raises(ValueError, match=r"q, k, v have dtypes torch.float32, torch.float64, torch.float32"):
        soft_mask_attention(q, k.double(), v, alpha, **inputs.sequences)
    with pytest.raises(ValueError, match="unknown soft-mask form 'diagonal'; known are row, column, constant"):
        soft_mask_attention(q, k, v, alpha, "diagonal", **inputs.sequences)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha takes no gradient with form=column; use form=row or constant"):
        soft_mask_attention(q, k, v, alpha.clone().requires_grad_(), "column", **inputs.sequences)
    with pytest.raises(ValueError, match=r"cu_seqlens runs from 0 to 99; it must stay in 0\.\.13"):
        soft_mask_attention(q, k, v, alpha, cu_seqlens=torch.tensor([0, 99], dtype=torch.int32), max_length=99)


def test_a_library_that_cannot_be_loaded_is_explained(tmp_path):
    sources, file = tmp_path / "csrc", tmp_path / "libsoft_mask_attention.so"
    sources.mkdir()
    assert library.load(file, sources) == "not built: run `make kernels`"
    file.write_bytes(b"no library")
    assert "was built from other sources than are here: run `make kernels`" in str(library.load(file, sources))
    stamp = {"sources": library.source_digest(sources), "nvcc": "12.4.1", "torch": "2.11.0+cu124"}
    library.stamp_file(file).write_text(str(stamp).replace("'", '"'))
    error = str(library.load(file, sources))
    assert (
        f"built with nvcc 12.4.1 for torch 2.11.0+cu124 and can't be loaded beside torch {torch.__version__}" in error
    )
    assert error.endswith("run `make kernels` here")


def test_whether_the_library_is_there_can_be_asked_while_compiling():
    torch._dynamo.reset()

    def doubled_if_there(x: Tensor) -> Tensor:
        return x if library_error() else 2 * x

    x = torch.ones(2)
    compiled = torch.compile(doubled_if_there, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), doubled_if_there(x))
