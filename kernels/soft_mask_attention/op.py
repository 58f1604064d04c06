"""Soft-mask attention as an operator of torch: differentiable, and opaque to torch.compile.

`megatron_conan::soft_mask_attention` is the compiled kernel on CUDA and `two_pass` on the CPU; its backward is `two_pass` on
both, from the kernel's output and log-sum-exp. alpha, lengths and cu_seqlens are tensors: new values cause neither a
synchronisation nor a recompilation. The schemas are defined here and not in C++, so that all but CUDA works without nvcc.

Shapes: see `semantics`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_conan.kernels.soft_mask_attention.library import library_error
from megatron_conan.kernels.soft_mask_attention.semantics import Form, check_inputs, check_sequence_values, wide_dtype
from megatron_conan.kernels.soft_mask_attention.two_pass import two_pass_backward, two_pass_forward

FORWARD = "megatron_conan::soft_mask_attention"
BACKWARD = "megatron_conan::soft_mask_attention_backward"

torch.library.define(
    FORWARD,
    "(Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor? lengths, Tensor? cu_seqlens, SymInt max_length, str form, "
    "float scale) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    BACKWARD,
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor alpha, Tensor? lengths, Tensor? cu_seqlens, "
    "SymInt max_length, str form, float scale, bool alpha_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
)


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
) -> Tensor:
    """Soft-mask attention by the kernel (CUDA, half precision) or by two passes (CPU).

    Args:
        q: [b, s, n, d] or [t, n, d]. On CUDA bf16 or fp16, d 64, 112 or 128.
        k: [b, s, g, d] or [t, g, d].
        v: as k.
        alpha: scalar, or [n] in the constant form; takes a gradient in the row and constant forms.
        form: row, column or constant.
        lengths: [b] int32 or int64, padded sequences only; None: all of length s.
        cu_seqlens: [num_sequences + 1] int32, packed sequences.
        max_length: bound on a packed sequence's length.
        scale: factor on the scores; 1/sqrt(d) if not given.

    Returns:
        As q, contiguous.

    Raises:
        ValueError: for inputs that don't fit together.
        RuntimeError: on CUDA without the compiled kernel, or with what it isn't built for.
    """
    return soft_mask_attention_with_lse(
        q, k, v, alpha, form, lengths=lengths, cu_seqlens=cu_seqlens, max_length=max_length, scale=scale
    )[0]


def soft_mask_attention_with_lse(
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
) -> tuple[Tensor, Tensor]:
    """As `soft_mask_attention`, and the log-sum-exp.

    Returns:
        Output as q; lse [b, n, s] or [n, t] in fp32 (fp64 for fp64 input), which carries no gradient.
    """
    check_inputs(q, k, v, alpha, form, lengths=lengths, cu_seqlens=cu_seqlens, max_length=max_length, scale=scale)
    if form == "column" and alpha.requires_grad and torch.is_grad_enabled():
        raise ValueError("alpha takes no gradient with form=column; use form=row or constant, or alpha.detach()")
    if q.is_cuda and (error := library_error()) is not None:
        raise RuntimeError(f"the soft-mask kernel isn't there: {error}")
    return torch.ops.megatron_conan.soft_mask_attention(
        q,
        k,
        v,
        alpha.to(wide_dtype(q)).contiguous(),
        None if lengths is None else lengths.to(torch.int32).contiguous(),
        cu_seqlens,
        0 if max_length is None else max_length,
        form,
        q.shape[-1] ** -0.5 if scale is None else scale,
    )


@torch.library.impl(FORWARD, "cpu")
def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_length: int,
    form: Form,
    scale: float,
) -> tuple[Tensor, Tensor]:
    settings = _settings(lengths, cu_seqlens, max_length)
    check_sequence_values(q.shape[-3], **settings)
    out, lse = two_pass_forward(q, k, v, alpha, form, scale=scale, **settings)
    return out.contiguous(), lse.contiguous()


@torch.library.impl(BACKWARD, "default")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alpha: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_length: int,
    form: Form,
    scale: float,
    alpha_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = _settings(lengths, cu_seqlens, max_length)
    dq, dk, dv, dalpha = two_pass_backward(
        grad, q, k, v, out, lse, alpha, form, scale=scale, alpha_gradient=alpha_gradient, **settings
    )
    dalpha = alpha.new_empty(0) if dalpha is None else dalpha.contiguous()
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dalpha


@torch.library.register_fake(FORWARD)
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(lse, dtype=wide_dtype(q))


@torch.library.register_fake(BACKWARD)
def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, alpha: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha_gradient = rest[-1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, alpha.new_empty(alpha.shape if alpha_gradient else 0)


def _settings(lengths: Tensor | None, cu_seqlens: Tensor | None, max_length: int) -> dict[str, Any]:
    return {
        "lengths": lengths,
        "cu_seqlens": cu_seqlens,
        "max_length": None if cu_seqlens is None else max_length,
    }


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, alpha, lengths, cu_seqlens, ctx.max_length, ctx.form, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, alpha, lengths, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wants_alpha = ctx.needs_input_grad[3]
    dq, dk, dv, dalpha = torch.ops.megatron_conan.soft_mask_attention_backward(
        grad, *ctx.saved_tensors, ctx.max_length, ctx.form, ctx.scale, wants_alpha
    )
    return dq, dk, dv, dalpha if wants_alpha else None, None, None, None, None, None


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("soft-mask attention has no second derivative; use backend=reference, which has")


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_setup_context)
torch.library.register_autograd(BACKWARD, _differentiate_twice)
