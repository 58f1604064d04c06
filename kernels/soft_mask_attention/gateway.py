"""The one door to soft-mask attention: which backend can take a case, which one does, and the call.

| backend | what it is |
|---|---|
| `kernel` | our CUDA kernel: one pass, bf16 and fp16 |
| `two_pass` | two calls of torch's flash attention, merged |
| `sdpa` | torch's scaled_dot_product_attention with a dense bias; padded sequences only, and the padding must be finite |
| `reference` | the definition, dense |

Shapes: see `semantics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_conan.kernels.soft_mask_attention import op
from megatron_conan.kernels.soft_mask_attention.reference import reference
from megatron_conan.kernels.soft_mask_attention.sdpa import sdpa
from megatron_conan.kernels.soft_mask_attention.semantics import Form, check_inputs, check_sequence_values
from megatron_conan.kernels.soft_mask_attention.stock_flash import is_aligned
from megatron_conan.kernels.soft_mask_attention.two_pass import two_pass

Backend = Literal["kernel", "two_pass", "sdpa", "reference"]
BackendName = Backend | Literal["auto"]
"""What one may ask for; `auto` is the fastest backend that takes the case."""

HALF = (torch.bfloat16, torch.float16)
KERNEL_HEAD_DIMS = (64, 112, 128)
COLUMN_ALPHA = "has no gradient of alpha in the column form; use backend=sdpa or form=row"


@dataclass(frozen=True)
class AttentionCase:
    """What the choice of a backend depends on.

    Attributes:
        device_type: `cuda`, `cpu`, ...
        dtype: of q, k and v.
        head_dim: d.
        form: row, column or constant.
        alpha_gradient: whether alpha takes a gradient.
        packed: packed sequences (cu_seqlens) or padded ones.
        lengths: whether padded sequences have lengths of their own.
        compute_capability: of the CUDA device; None: taken as sufficient.
        aligned: q, k, v have a contiguous head dim, and other strides and addresses that are multiples of 16 bytes.
        known_alpha: alpha's value if the host knows it; `auto` alone looks at it.
        length: s of padded sequences; `auto` alone looks at it.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    form: Form
    alpha_gradient: bool = False
    packed: bool = False
    lengths: bool = False
    compute_capability: tuple[int, int] | None = None
    aligned: bool = True
    known_alpha: float | None = None
    length: int = 0


def case_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    form: Form,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    known_alpha: float | None = None,
) -> AttentionCase:
    """The case that a call with these tensors is."""
    capability = None
    if q.is_cuda and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(q.device)
    return AttentionCase(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        form=form,
        alpha_gradient=alpha.requires_grad and torch.is_grad_enabled(),
        packed=cu_seqlens is not None,
        lengths=lengths is not None,
        compute_capability=capability,
        aligned=all(is_aligned(x) for x in (q, k, v)),
        known_alpha=None if alpha.requires_grad else known_alpha,
        length=q.shape[-3] if q.dim() == 4 else 0,
    )


def is_supported(backend: Backend, case: AttentionCase) -> tuple[bool, str]:
    """Whether a backend takes a case.

    Returns:
        True and "", or False and the reason with what to do about it.
    """
    reasons = {
        "kernel": _against_kernel,
        "two_pass": _against_two_pass,
        "sdpa": _against_sdpa,
        "reference": lambda case: "",
    }
    reason = reasons[backend](case)
    return not reason, reason


def choose_backend(name: BackendName, case: AttentionCase) -> Backend:
    """The backend that `name` stands for; `auto` is the fastest one that takes the case.

    Raises:
        ValueError: for an unknown name, or a backend asked for by name that doesn't take the case.
    """
    if name != "auto":
        if name not in get_args(Backend):
            raise ValueError(f"unknown attention backend {name!r}; known are auto, {', '.join(get_args(Backend))}")
        supported, reason = is_supported(name, case)
        if not supported:
            raise ValueError(f"attention backend {name} {reason}")
        return name
    return next((backend for backend in _fastest_first(case) if is_supported(backend, case)[0]), "reference")


def soft_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    form: Form = "row",
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
    known_alpha: float | None = None,
    zero_padding: bool = True,
) -> Tensor:
    """Soft-mask attention, see `semantics`.

    Args:
        q: [b, s, n, d] padded on the right, or [t, n, d] packed.
        k: [b, s, g, d] or [t, g, d].
        v: as k.
        alpha: scalar tensor in [0, 1] on the device, or [n] in the constant form.
        form: row, column or constant.
        lengths: [b] int32 or int64, padded sequences; None: all of length s.
        cu_seqlens: [num_sequences + 1] int32, packed sequences.
        max_length: bound on a packed sequence's length.
        scale: factor on the scores; 1/sqrt(d) if not given.
        backend: kernel, two_pass, sdpa, reference, or auto.
        known_alpha: alpha's value if the host knows it, so that 0 and 1 take a stock kernel's own path. Not looked at where
            alpha takes a gradient.
        zero_padding: False where nobody looks at rows that belong to no sequence; sdpa is faster then, and leaves finite
            numbers there.

    Returns:
        As q; rows that belong to no sequence are zero, if `zero_padding`.

    Raises:
        ValueError: for inputs that don't fit together, or a backend that doesn't take them.
    """
    check_inputs(q, k, v, alpha, form, lengths=lengths, cu_seqlens=cu_seqlens, max_length=max_length, scale=scale)
    if not torch.compiler.is_compiling() and all(_readable(x) for x in (lengths, cu_seqlens)):
        size = q.shape[-3]
        check_sequence_values(size, lengths=lengths, cu_seqlens=cu_seqlens, max_length=max_length)
    chosen = choose_backend(backend, case_of(q, k, v, alpha, form, lengths, cu_seqlens, known_alpha))
    if chosen == "reference":
        return reference(q, k, v, alpha, form, lengths=lengths, cu_seqlens=cu_seqlens, scale=scale)[0]
    sequences = {"lengths": lengths, "cu_seqlens": cu_seqlens, "max_length": max_length, "scale": scale}
    if chosen == "kernel":
        return op.soft_mask_attention(q, k, v, alpha, form, **sequences)
    if chosen == "two_pass":
        return two_pass(q, k, v, alpha, form, **sequences, known_alpha=known_alpha)
    return sdpa(q, k, v, alpha, form, **sequences, known_alpha=known_alpha, zero_padding=zero_padding)


def _fastest_first(case: AttentionCase) -> tuple[Backend, ...]:
    stock = case.known_alpha in (0.0, 1.0)
    if case.device_type != "cuda":
        # Measured on CPUs: two passes take 2 to 3 times sdpa's time at length 64, 1.4 at 1024, .5 at 4096 (where sdpa's bias
        # and scores leave the caches); with a gradient of alpha .6 at 1024.
        long = not stock and case.length >= (1024 if case.alpha_gradient else 2048)
        return ("two_pass", "sdpa") if long else ("sdpa", "two_pass")
    if stock:
        # The mask is stock: one stock call each way, where the kernel's backward makes two. Right padding is harmless
        # to causal attention; an open mask over padded sequences needs a bias, and is left to the kernel.
        if case.packed:
            return "two_pass", "kernel", "sdpa"
        if case.known_alpha == 0.0 or not case.lengths:
            return "sdpa", "kernel", "two_pass"
    return "kernel", "two_pass", "sdpa"


def _against_kernel(case: AttentionCase) -> str:
    if case.device_type != "cuda":
        return f"runs on CUDA, not on {case.device_type}; use backend=auto"
    if case.compute_capability is not None and case.compute_capability < (8, 0):
        major, minor = case.compute_capability
        return f"needs compute capability 8.0, this GPU has {major}.{minor}; use backend=sdpa"
    if case.dtype not in HALF:
        return f"computes in bf16 or fp16, not in {case.dtype}; use train.precision=bf16 or backend=sdpa"
    if case.head_dim not in KERNEL_HEAD_DIMS:
        return f"is built for head dims {KERNEL_HEAD_DIMS}, not for {case.head_dim}; use backend=two_pass"
    if case.form == "column" and case.alpha_gradient:
        return COLUMN_ALPHA
    if not case.aligned:
        return (
            "needs a contiguous head dim and rows aligned to 16 bytes; make q, k, v contiguous or use backend=two_pass"
        )
    missing = op.library_error()
    return f"is not there: {missing}; or use backend=two_pass" if missing else ""


def _against_two_pass(case: AttentionCase) -> str:
    if case.form == "column" and case.alpha_gradient:
        return COLUMN_ALPHA
    if case.device_type == "cpu":
        return ""
    if case.device_type != "cuda":
        return f"runs on CUDA and CPU, not on {case.device_type}; use backend=sdpa"
    if case.compute_capability is not None and case.compute_capability < (8, 0):
        major, minor = case.compute_capability
        return f"needs compute capability 8.0, this GPU has {major}.{minor}; use backend=sdpa"
    if case.dtype not in HALF:
        return f"computes in bf16 or fp16 on CUDA, not in {case.dtype}; use backend=sdpa"
    largest = 248 if case.form == "column" else 256  # the column form adds 8
    if case.head_dim % 8 or case.head_dim > largest:
        return f"needs a head dim that is a multiple of 8 up to {largest}, not {case.head_dim}; use backend=sdpa"
    return ""


def _against_sdpa(case: AttentionCase) -> str:
    return "takes padded sequences only; use backend=two_pass, or pad them" if case.packed else ""


def _readable(x: Tensor | None) -> bool:
    """Reading it costs no synchronisation, and there is something to read."""
    return x is None or (x.device.type == "cpu" and not torch._subclasses.fake_tensor.is_fake(x))
