"""SoftMaskAttention: megatron-core's `core_attention`, with the mask of Conan-embedding-v2, and its backends.

Shapes: `s` sequence, `b` micro-batch, `n` query heads and `g` key/value heads of this tensor rank, `d` head dim.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_conan.data.packing import PackedSequences
from megatron_conan.kernels.soft_mask_attention import soft_mask_attention_reference, soft_mask_weights
from megatron_conan.model.mask import SoftMask

Backend = Literal["sdpa", "reference"]

LEARNED_THETA_START = -6.0
"""Initial theta of the learned form: sigmoid(-6) = .0025, nearly causal, with a finite gradient."""


def choose_backend(name: Literal["auto", "sdpa", "reference"]) -> Backend:
    """The backend that `attention.backend` stands for; `auto` is the fastest there is."""
    return "sdpa" if name == "auto" else name


class SoftMaskAttention(MegatronModule):
    """softmax(q k^T * scale + log m) v over right-padded or packed sequences.

    `attention_mask` of megatron-core carries the sequences' lengths [b] (int64), or None where no row is padded or the
    padding is harmless (causal attention with padding on the right: no valid row sees it), or the `PackedSequences` of one
    packed row.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        soft_mask: SoftMask,
        backend: Backend,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        """Built by megatron-core's attention; `soft_mask` and `backend` are bound by the layer spec."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.soft_mask = soft_mask
        self.backend = backend
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.theta: torch.nn.Parameter | None = None
        if soft_mask.form == "learned":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.theta = torch.nn.Parameter(torch.full((heads,), LEARNED_THETA_START, dtype=torch.float32))
            self.theta.tensor_model_parallel = True  # type: ignore[attr-defined]
            self.theta.partition_dim = 0  # type: ignore[attr-defined]
            self.theta.partition_stride = 1  # type: ignore[attr-defined]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | PackedSequences | None,
        /,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, d].
            key: [s, b, g, d].
            value: [s, b, g, d].
            attention_mask: lengths [b] int64, or None (all of length s), or the sequences packed into b = 1 row.

        Returns:
            [s, b, n * d].
        """
        if isinstance(attention_mask, PackedSequences):
            return self._attend_packed(query, key, value, attention_mask)
        s, b = query.shape[:2]
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [s, b, n, d] -> [b, s, n, d]
        output = self._attend(q, k, v, attention_mask)
        return output.transpose(0, 1).reshape(s, b, -1)  # [b, s, n, d] -> [s, b, n * d]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """[b, s, n, d] -> [b, s, n, d]."""
        attend = _sdpa if self.backend == "sdpa" else _reference
        return attend(q, k, v, lengths, self.soft_mask, self.theta, self.scale)

    def _attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """[t, 1, n, d] -> [t, 1, n * d]: the backends know no packing, so they get texts of similar length, padded."""
        padded = [_Pad.apply(x[:, 0], packed) for x in (query, key, value)]  # [t, n, d] -> [p, n, d]
        outputs, start = [], 0
        for group in packed.groups:
            end = start + group.num_texts * group.width
            q, k, v = (x[start:end].unflatten(0, (group.num_texts, group.width)) for x in padded)  # -> [b, s, n, d]
            outputs.append(self._attend(q, k, v, group.lengths).flatten(0, 1))  # [b, s, n, d] -> [p of the group, n, d]
            start = end
        return _Unpad.apply(torch.cat(outputs), packed).flatten(1).unsqueeze(1)  # [t, n, d] -> [t, 1, n * d]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """theta is split over tensor ranks by heads; nothing else is stored."""
        if self.theta is None:
            return {}
        return make_sharded_tensors_for_checkpoint({"theta": self.theta}, prefix, {"theta": 0}, sharded_offsets)


def _pad(x: Tensor, packed: PackedSequences) -> Tensor:
    """[t, ...] -> [p, ...]; what stands at padded places is of no meaning."""
    return x.index_select(0, packed.to_padded)


def _unpad(x: Tensor, packed: PackedSequences) -> Tensor:
    """[p, ...] -> [t, ...]; zeros behind the last text."""
    y = x.index_select(0, packed.to_packed)
    y[packed.position.shape[0] :] = 0
    return y


class _Pad(torch.autograd.Function):
    """Packed to padded. Its gradient is a gather too: faster than autograd's adding by index, and deterministic on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedSequences) -> Tensor:
        ctx.packed = packed
        return _pad(x, packed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _unpad(gradients[0], ctx.packed), None


class _Unpad(torch.autograd.Function):
    """Padded to packed; the adjoint of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedSequences) -> Tensor:
        ctx.packed = packed
        return _unpad(x, packed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _pad(gradients[0], ctx.packed).index_fill_(0, ctx.packed.padding, 0), None


def effective_alpha(soft_mask: SoftMask, theta: Tensor | None) -> tuple[Literal["row", "column", "constant"], Tensor]:
    """Form and alpha of the attention; the learned form is alpha_h = a + (1 - a) sigmoid(theta_h), the same everywhere.

    a(t) is the schedule, so that every learned run starts nearly causal and ends exactly bidirectional.
    """
    if soft_mask.form == "learned":
        assert theta is not None
        return "constant", soft_mask.alpha + (1.0 - soft_mask.alpha) * torch.sigmoid(theta.float())
    return soft_mask.form, soft_mask.alpha


def _reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, soft_mask: SoftMask, theta: Tensor | None, scale: float
) -> Tensor:
    if lengths is None:
        lengths = torch.full((q.shape[0],), q.shape[1], dtype=torch.int64, device=q.device)
    form, alpha = effective_alpha(soft_mask, theta)
    return soft_mask_attention_reference(q, k, v, lengths, alpha, form, scale)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, soft_mask: SoftMask, theta: Tensor | None, scale: float
) -> Tensor:
    """torch's scaled_dot_product_attention; a dense float bias only where the mask is neither causal nor full."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, s, n, d] -> [b, n, s, d]
    learned = soft_mask.form == "learned"
    causal = soft_mask.value == 0.0 and not learned
    bias = None
    if not causal and (lengths is not None or soft_mask.value < 1.0 or learned):
        bias = _bias(q, lengths, soft_mask, theta)
    grouped = q.shape[1] != k.shape[1]
    if grouped and bias is not None and q.is_cuda:  # the memory-efficient kernel takes a bias, but no groups
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    output = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return output.transpose(1, 2)  # [b, n, s, d] -> [b, s, n, d]


def _bias(q: Tensor, lengths: Tensor | None, soft_mask: SoftMask, theta: Tensor | None) -> Tensor:
    """Additive bias broadcastable to [b, n, s, s]: key padding alone at alpha = 1, log m otherwise."""
    b, _, s, _ = q.shape
    if lengths is None:
        lengths = torch.full((b,), s, dtype=torch.int64, device=q.device)
    if soft_mask.value == 1.0 and theta is None:
        return (torch.arange(s, device=q.device) < lengths[:, None])[:, None, None, :]  # [b, 1, 1, s] True = attend
    form, alpha = effective_alpha(soft_mask, theta)
    return torch.log(soft_mask_weights(form, alpha, lengths, s)).to(q.dtype)
