"""Soft-mask attention by torch's scaled_dot_product_attention, with a dense float bias where the mask needs one.

Shapes: see `semantics`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_conan.kernels.soft_mask_attention.semantics import Form, soft_mask_weights

STABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    form: Form,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    known_alpha: float | None = None,
    zero_padding: bool = True,
) -> Tensor:
    """Attend; the memory of the bias is b * s * s elements, n times that for an alpha per head.

    What stands in the padding must be finite: the stock kernels multiply it by probabilities of 0, and 0 * NaN is NaN.
    (Copies without it would cost a fifth of the whole at s = 128, and more below.)

    Args:
        q: [b, s, n, d].
        k: [b, s, g, d].
        v: [b, s, g, d].
        alpha: scalar, or [n] in the constant form. Its gradient needs alpha > 0: here it is that of log m.
        form: row, column or constant.
        lengths: [b] true lengths; None: all of length s.
        cu_seqlens: must be None: packed sequences are not known here.
        max_length: must be None.
        scale: factor on the scores; 1/sqrt(d) if not given.
        known_alpha: alpha's value if the host knows it: at 0 and 1 the mask is stock and no bias is made. Not looked at
            where alpha takes a gradient.
        zero_padding: False where nobody looks at rows beyond a sequence's length: zeroing them costs 8 to 16% of the whole
            on a CPU. They are finite then, and of no meaning.

    Returns:
        [b, s, n, d]; rows beyond a sequence's length are zero, if `zero_padding`.

    Raises:
        ValueError: for packed sequences.
    """
    if q.dim() != 4 or cu_seqlens is not None or max_length is not None:
        raise ValueError(f"sdpa takes padded sequences only, q has shape {list(q.shape)}; use two_pass, or pad them")
    if alpha.requires_grad:
        known_alpha = None
    b, s, n, _ = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, s, n, d] -> [b, n, s, d]
    # at least one key each, so that no row is 0 / 0; the rows of a sequence of length 0 are zeroed in the end
    keys = torch.full((b,), s, device=q.device) if lengths is None else lengths.clamp(min=1)  # [b]
    bias = None
    if known_alpha not in (0.0, 1.0):
        bias = torch.log(soft_mask_weights(form, alpha, keys, s)).to(q.dtype)  # [b, 1 or n, s, s]
    elif known_alpha == 1.0 and lengths is not None:
        bias = (torch.arange(s, device=q.device) < keys[:, None])[:, None, None]  # [b, 1, 1, s] True = attend
    grouped = n != k.shape[1]
    if grouped and bias is not None and q.is_cuda:  # the memory-efficient kernel takes a bias, but no groups
        k, v = (x.repeat_interleave(n // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    # with a mask cuDNN's backward gives NaN at some lengths: pytorch/pytorch#196678
    without_cudnn = sdpa_kernel(STABLE) if bias is not None and q.is_cuda else nullcontext()
    with without_cudnn:
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=known_alpha == 0.0, scale=scale, enable_gqa=grouped
        )
    output = output.transpose(1, 2)  # [b, n, s, d] -> [b, s, n, d]
    if lengths is None or not zero_padding:
        return output
    inside = torch.arange(s, device=q.device) < lengths[:, None]  # [b, s]
    return torch.where(inside[:, :, None, None], output, 0.0)
