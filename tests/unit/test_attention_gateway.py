"""The door to soft-mask attention: what it refuses, which backend it takes, and that all of them give one result.

Shapes: `b` batch, `s` sequence, `t` packed tokens, `n` query heads, `g` key/value heads, `d` head dim.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_conan.kernels.soft_mask_attention import (
    AttentionCase,
    case_of,
    check_inputs,
    choose_backend,
    gateway,
    is_supported,
    reference,
    soft_mask_attention,
)
from megatron_conan.kernels.soft_mask_attention.semantics import check_sequence_values

GPU = AttentionCase("cuda", torch.bfloat16, 64, "row", compute_capability=(9, 0))
CPU = AttentionCase("cpu", torch.float32, 64, "row")
HALF = torch.tensor(0.5)
CU_SEQLENS = torch.tensor([0, 3, 5], dtype=torch.int32)


def padded(**changes: Any) -> dict[str, Any]:
    q, k = torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 2, 8)
    return {"q": q, "k": k, "v": k, "alpha": HALF, "form": "constant"} | changes


def packed(**changes: Any) -> dict[str, Any]:
    q, k = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
    plain = {"q": q, "k": k, "v": k, "alpha": HALF, "form": "row", "cu_seqlens": CU_SEQLENS, "max_length": 3}
    return plain | changes


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


REFUSALS = [
    (padded(q=zeros(5, 8)), "q has shape [5, 8]; give [b, s, n, d] (padded) or [t, n, d] (packed)"),
    (padded(v=zeros(2, 5, 2, 16)), "k has shape [2, 5, 2, 8] and v [2, 5, 2, 16]; they must be equal"),
    (padded(k=zeros(2, 6, 2, 8), v=zeros(2, 6, 2, 8)), "k and v have shape [2, 6, 2, 8], q [2, 5, 4, 8]; all dims but"),
    (padded(k=zeros(2, 5, 2, 4), v=zeros(2, 5, 2, 4)), "k and v have shape [2, 5, 2, 4], q [2, 5, 4, 8]; all dims but"),
    (
        padded(k=zeros(5, 2, 8), v=zeros(5, 2, 8)),
        "k and v have shape [5, 2, 8], q [2, 5, 4, 8]; all dims but the heads",
    ),
    (padded(k=zeros(2, 5, 3, 8), v=zeros(2, 5, 3, 8)), "q has 4 heads of dim 8, k and v 3; give a positive dim and"),
    (padded(k=zeros(2, 5, 0, 8), v=zeros(2, 5, 0, 8)), "q has 4 heads of dim 8, k and v 0"),
    (
        padded(q=zeros(2, 5, 4, 0), k=zeros(2, 5, 2, 0), v=zeros(2, 5, 2, 0)),
        "q has 4 heads of dim 0, k and v 2; give a",
    ),
    (padded(q=zeros(2, 5, 4, 8).half()), "q, k, v have dtypes torch.float16, torch.float32, torch.float32; cast them"),
    (
        padded(v=zeros(2, 5, 2, 8).double()),
        "q, k, v have dtypes torch.float32, torch.float32, torch.float64; cast them",
    ),
    (
        padded(**dict.fromkeys(("q", "k", "v"), zeros(2, 5, 2, 8, dtype=torch.int32))),
        "q, k, v have dtypes torch.int32, torch.int32, torch.int32; cast them to one floating dtype",
    ),
    (padded(k=meta(2, 5, 2, 8)), "q, k, v are on cpu, meta, cpu; move them to one device"),
    (padded(v=meta(2, 5, 2, 8)), "q, k, v are on cpu, cpu, meta; move them to one device"),
    (padded(form="diagonal"), "unknown soft-mask form 'diagonal'; known are row, column, constant"),
    (
        padded(form="row", alpha=torch.ones(4)),
        "alpha per head is defined for form=constant only, not for form=row; give",
    ),
    (
        padded(form="column", alpha=torch.ones(4)),
        "alpha per head is defined for form=constant only, not for form=column",
    ),
    (padded(alpha=torch.ones(2)), "alpha has shape [2]; give a scalar, or [4]: one for each head of q"),
    (padded(alpha=torch.ones(1, 4)), "alpha has shape [1, 4]; give a scalar, or [4]"),
    (padded(alpha=torch.tensor(1)), "alpha has dtype torch.int64; give a floating dtype, best torch.float32"),
    (padded(alpha=meta()), "alpha is on meta, q on cpu; make alpha on q's device"),
    (padded(scale=0.0), "scale=0.0 must be finite and above 0; leave it out for 1/sqrt(d) = 0.3536"),
    (padded(scale=-1.0), "scale=-1.0 must be finite and above 0"),
    (padded(scale=math.inf), "scale=inf must be finite and above 0"),
    (padded(scale=math.nan), "scale=nan must be finite and above 0"),
    (
        padded(cu_seqlens=CU_SEQLENS),
        "q has shape [2, 5, 4, 8], padded, but cu_seqlens or max_length is given; give len",
    ),
    (padded(max_length=5), "q has shape [2, 5, 4, 8], padded, but cu_seqlens or max_length is given; give lengths"),
    (padded(lengths=torch.tensor([1, 2, 3])), "lengths has shape [3] and dtype torch.int64; give [2], one for each"),
    (
        padded(lengths=torch.tensor([[1], [2]])),
        "lengths has shape [2, 1] and dtype torch.int64; give [2], one for each",
    ),
    (
        padded(lengths=torch.ones(2)),
        "lengths has shape [2] and dtype torch.float32; give [2], one for each sequence, of",
    ),
    (padded(lengths=meta(2, dtype=torch.int64)), "lengths is on meta, q on cpu; move it there"),
    (
        packed(lengths=torch.tensor([3, 2])),
        "q has shape [6, 4, 8], packed, but lengths is given; give cu_seqlens and max_",
    ),
    (packed(cu_seqlens=None), "q has shape [6, 4, 8], packed, and needs cu_seqlens; give both, or q as [b, s, n, d]"),
    (packed(max_length=None), "q has shape [6, 4, 8], packed, and needs max_length; give both"),
    (packed(cu_seqlens=None, max_length=None), "packed, and needs cu_seqlens and max_length; give both"),
    (
        packed(cu_seqlens=CU_SEQLENS.long()),
        "cu_seqlens has shape [3] and dtype torch.int64; give [num_sequences + 1] of",
    ),
    (
        packed(cu_seqlens=CU_SEQLENS[None]),
        "cu_seqlens has shape [1, 3] and dtype torch.int32; give [num_sequences + 1]",
    ),
    (
        packed(cu_seqlens=CU_SEQLENS[:1]),
        "cu_seqlens has shape [1] and dtype torch.int32; give [num_sequences + 1] of int",
    ),
    (packed(cu_seqlens=CU_SEQLENS.repeat_interleave(2)[::2]), "cu_seqlens has stride 2; make it contiguous"),
    (packed(cu_seqlens=meta(3, dtype=torch.int32)), "cu_seqlens is on meta, q on cpu; move it there"),
    (packed(max_length=0), "max_length=0 must be 1 or more: the length of the longest sequence, or a bound on it"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=[str(i) for i in range(len(REFUSALS))])
def test_inputs_that_do_not_fit_are_refused(arguments, message):
    for call in (check_inputs, soft_mask_attention):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (padded(lengths=torch.tensor([5, 6])), "lengths[1]=6 must lie in 0..5, the size s of the padded sequences"),
        (padded(lengths=torch.tensor([-1, 5])), "lengths[0]=-1 must lie in 0..5"),
        (packed(cu_seqlens=torch.tensor([-1, 3, 5]).int()), "cu_seqlens runs from -1 to 5; it must stay in 0..6, the"),
        (
            packed(cu_seqlens=torch.tensor([0, 3, 7]).int(), max_length=9),
            "cu_seqlens runs from 0 to 7; it must stay in",
        ),
        (
            packed(cu_seqlens=torch.tensor([0, 3, 2]).int()),
            "cu_seqlens falls from 3 to 2 at entry 2; it must never fall",
        ),
        (
            packed(cu_seqlens=torch.tensor([1, 1, 5]).int()),
            "sequence 1 of cu_seqlens has length 4, above max_length=3;",
        ),
    ],
)
def test_wrong_lengths_are_refused_where_reading_them_is_free(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        soft_mask_attention(**arguments)


def test_what_fits_is_taken():
    check_inputs(**padded(lengths=torch.tensor([5, 0]).int(), scale=2.0))
    check_inputs(**padded(alpha=torch.ones(4)))
    check_inputs(**packed())
    check_sequence_values(5, lengths=torch.tensor([5, 0]))
    check_sequence_values(6, cu_seqlens=torch.tensor([2, 2, 6]), max_length=4)
    check_sequence_values(6)


NEEDS_KERNEL = [
    (replace(GPU, device_type="cpu", compute_capability=None), "runs on CUDA, not on cpu; use backend=auto"),
    (replace(GPU, compute_capability=(7, 5)), "needs compute capability 8.0, this GPU has 7.5; use backend=sdpa"),
    (
        replace(GPU, dtype=torch.float32),
        "computes in bf16 or fp16, not in torch.float32; use train.precision=bf16 or ba",
    ),
    (replace(GPU, head_dim=96), "is built for head dims (64, 112, 128), not for 96; use backend=two_pass"),
    (
        replace(GPU, form="column", alpha_gradient=True),
        "has no gradient of alpha in the column form; use backend=sdpa or",
    ),
    (
        replace(GPU, aligned=False),
        "needs a contiguous head dim and rows aligned to 16 bytes; make q, k, v contiguous or us",
    ),
]
TWO_PASS = [
    (replace(CPU, form="column", alpha_gradient=True), "has no gradient of alpha in the column form; use backend=sdpa"),
    (replace(CPU, device_type="mps"), "runs on CUDA and CPU, not on mps; use backend=sdpa"),
    (replace(GPU, compute_capability=(7, 0)), "needs compute capability 8.0, this GPU has 7.0; use backend=sdpa"),
    (replace(GPU, dtype=torch.float32), "computes in bf16 or fp16 on CUDA, not in torch.float32; use backend=sdpa"),
    (replace(GPU, head_dim=60), "needs a head dim that is a multiple of 8 up to 256, not 60; use backend=sdpa"),
    (replace(GPU, head_dim=264), "needs a head dim that is a multiple of 8 up to 256, not 264; use backend=sdpa"),
    (replace(GPU, head_dim=256, form="column"), "needs a head dim that is a multiple of 8 up to 248, not 256; use"),
]


@pytest.fixture
def kernel(monkeypatch):
    """Stands for the compiled kernel: there, and answering with its arguments; `.error` takes it away."""
    stub = SimpleNamespace(error=None, calls=[])
    stub.library_error = lambda: stub.error

    def attend(*tensors, **options):
        stub.calls.append((tensors, options))
        return tensors[0]

    stub.soft_mask_attention = attend
    monkeypatch.setattr(gateway, "op", stub)
    return stub


def test_what_the_backends_take(kernel):
    for backend, refused in (("kernel", NEEDS_KERNEL), ("two_pass", TWO_PASS)):
        for case, reason in refused:
            supported, found = is_supported(backend, case)
            assert not supported
            assert found.startswith(reason)
            with pytest.raises(ValueError, match=f"^attention backend {backend} ") as raised:
                choose_backend(backend, case)
            assert str(raised.value) == f"attention backend {backend} {found}"
    for form in ("row", "column", "constant"):
        for case in (GPU, replace(GPU, packed=True), replace(GPU, dtype=torch.float16, head_dim=112, lengths=True)):
            for backend in ("kernel", "two_pass"):
                assert is_supported(backend, replace(case, form=form)) == (True, "")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert is_supported("two_pass", replace(CPU, dtype=dtype, packed=True, head_dim=3)) == (True, "")
    assert is_supported("sdpa", replace(CPU, form="column", alpha_gradient=True)) == (True, "")
    supported, reason = is_supported("sdpa", replace(CPU, packed=True))
    assert (supported, reason) == (False, "takes padded sequences only; use backend=two_pass, or pad them")
    assert is_supported("reference", replace(CPU, device_type="mps", packed=True)) == (True, "")


def test_a_kernel_that_is_not_built_says_so(kernel):
    kernel.error = "not built: run make kernels"
    assert is_supported("kernel", GPU) == (
        False,
        "is not there: not built: run make kernels; or use backend=two_pass",
    )
    with pytest.raises(
        ValueError, match=r"^attention backend kernel is not there: not built: run make kernels; or use"
    ):
        choose_backend("kernel", GPU)


@pytest.mark.parametrize(
    ("case", "built", "chosen"),
    [
        (GPU, True, "kernel"),
        (GPU, False, "two_pass"),
        (replace(GPU, packed=True), True, "kernel"),
        (replace(GPU, aligned=False), True, "two_pass"),
        (replace(GPU, head_dim=96), True, "two_pass"),
        (replace(GPU, dtype=torch.float32), True, "sdpa"),
        (replace(GPU, form="column", alpha_gradient=True), True, "sdpa"),
        (replace(GPU, dtype=torch.float32, packed=True), True, "reference"),
        (replace(GPU, known_alpha=0.5), True, "kernel"),
        (replace(GPU, known_alpha=0.0), True, "sdpa"),
        (replace(GPU, known_alpha=0.0, lengths=True), True, "sdpa"),
        (replace(GPU, known_alpha=1.0), True, "sdpa"),
        (replace(GPU, known_alpha=1.0, lengths=True), True, "kernel"),
        (replace(GPU, known_alpha=0.0, packed=True), True, "two_pass"),
        (replace(GPU, known_alpha=1.0, packed=True), False, "two_pass"),
        (CPU, True, "sdpa"),
        (replace(CPU, alpha_gradient=True, form="constant", lengths=True), True, "sdpa"),
        (replace(CPU, length=2047, known_alpha=0.5), True, "sdpa"),
        (replace(CPU, length=2048, known_alpha=0.5), True, "two_pass"),
        (replace(CPU, length=4096, known_alpha=1.0), True, "sdpa"),
        (replace(CPU, length=1023, alpha_gradient=True), True, "sdpa"),
        (replace(CPU, length=1024, alpha_gradient=True), True, "two_pass"),
        (replace(CPU, length=4096, alpha_gradient=True, form="column"), True, "sdpa"),
        (replace(CPU, packed=True), True, "two_pass"),
        (replace(CPU, packed=True, form="column", alpha_gradient=True), True, "reference"),
        (replace(CPU, device_type="mps"), True, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_can(case, built, chosen, kernel):
    kernel.error = None if built else "not built: run make kernels"
    assert choose_backend("auto", case) == chosen
    assert choose_backend(chosen, case) == chosen


def test_an_unknown_backend_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown attention backend 'fast'; known are auto, kernel, two_pass, sdpa, ref"
    ):
        choose_backend("fast", CPU)  # type: ignore[arg-type]


def test_the_case_of_a_call():
    given = packed()
    tensors = [given[name] for name in ("q", "k", "v", "alpha", "form")]
    assert case_of(*tensors, cu_seqlens=CU_SEQLENS) == AttentionCase("cpu", torch.float32, 8, "row", packed=True)
    assert case_of(*tensors, known_alpha=0.5).known_alpha == 0.5
    tensors[3] = torch.tensor(0.5, requires_grad=True)
    assert case_of(*tensors).alpha_gradient
    assert case_of(*tensors, known_alpha=0.5).known_alpha is None
    with torch.no_grad():
        assert not case_of(*tensors).alpha_gradient
    case = case_of(*[padded()[name] for name in ("q", "k", "v", "alpha", "form")], lengths=CU_SEQLENS[:2])
    assert case == AttentionCase("cpu", torch.float32, 8, padded()["form"], lengths=True, length=5)
    for wrong in (
        torch.zeros(6, 4, 9)[..., :8],
        torch.zeros(6, 8, 4).transpose(1, 2),
        torch.zeros(217)[1:193].view(6, 4, 8),
    ):
        assert not case_of(wrong, *tensors[1:]).aligned
        assert not case_of(tensors[0], wrong, *tensors[2:]).aligned
        assert not case_of(tensors[0], tensors[1], wrong, *tensors[3:]).aligned


def test_the_kernel_is_called_with_what_the_caller_gave(kernel, monkeypatch):
    monkeypatch.setattr(gateway, "choose_backend", lambda name, case: "kernel")
    given = packed(scale=0.25)
    soft_mask_attention(**given)
    ((tensors, options),) = kernel.calls
    assert all(x is given[name] for x, name in zip(tensors, ("q", "k", "v", "alpha", "form"), strict=True))
    assert options == {"lengths": None, "cu_seqlens": CU_SEQLENS, "max_length": 3, "scale": 0.25}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("form", ["row", "column", "constant"])
@pytest.mark.parametrize("layout", ["full", "ragged", "packed"])
def test_all_backends_give_one_result(layout, form, alpha, known):
    generator = torch.Generator().manual_seed(1)
    shape = (20,) if layout == "packed" else (3, 9)
    q, k, v, grad = (torch.randn(*shape, n, 8, dtype=torch.float64, generator=generator) for n in (4, 2, 2, 4))
    options: dict[str, Any] = {"scale": 0.3, "known_alpha": alpha if known else None}
    if layout == "packed":
        options |= {"cu_seqlens": torch.tensor([1, 8, 8, 9, 18], dtype=torch.int32), "max_length": 9}
    elif layout == "ragged":
        options["lengths"] = torch.tensor([9, 0, 4])
    results = {}
    for backend in ("reference", "two_pass", "auto", *(["sdpa"] if layout != "packed" else [])):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = soft_mask_attention(*leaves, torch.tensor(alpha).double(), form, **options, backend=backend)
        results[backend] = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    for found in results.values():
        for x, y in zip(found, results["reference"], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["two_pass", "sdpa"])
def test_a_known_alpha_is_taken_at_its_word(backend):
    """The host's copy chooses the path: a wrong one shows that it got through."""
    q, k, v = (torch.randn(2, 6, n, 4, dtype=torch.float64) for n in (4, 2, 2))
    for known in (0.0, 1.0):
        out = soft_mask_attention(q, k, v, torch.tensor(0.5).double(), backend=backend, known_alpha=known)
        wanted = reference(q, k, v, torch.tensor(known).double(), "row")[0]
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_no_value_is_read_where_reading_costs(monkeypatch):
    """Fake lengths have no values; the door must not ask for them."""
    with torch._subclasses.FakeTensorMode():
        out = soft_mask_attention(
            **packed(
                **{k: torch.empty(6, n, 8) for k, n in (("q", 4), ("k", 2), ("v", 2))}
                | {"alpha": torch.empty(()), "cu_seqlens": torch.empty(3, dtype=torch.int32)}
            )
        )
    assert out.shape == (6, 4, 8)


@pytest.mark.parametrize("backend", ["auto", "two_pass", "sdpa", "reference"])
@pytest.mark.parametrize("form", ["row", "constant"])
def test_the_door_can_be_compiled(backend, form):
    torch._dynamo.reset()
    compiled = torch.compile(soft_mask_attention, fullgraph=True, backend="aot_eager")
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    for alpha in (0.0, 0.5, 1.0):
        arguments = {"lengths": torch.tensor([5, 3]), "backend": backend}
        leaves = [x.clone().requires_grad_() for x in (q, k, k)]
        found, wanted = (f(*leaves, torch.tensor(alpha), form, **arguments) for f in (compiled, soft_mask_attention))
        torch.testing.assert_close(found, wanted)
        for x, y in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (found, wanted)), strict=True):
            torch.testing.assert_close(x, y)


def test_import_is_cheap():
    """Neither megatron-core nor a compiler: the kernels are imported before either is known to be there."""
    code = (
        "import sys, megatron_conan.kernels.soft_mask_attention; "
        "print([x for x in ('megatron.core', 'triton', 'torch.utils.cpp_extension', 'transformers') if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
