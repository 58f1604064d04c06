"""SoftMaskAttention: megatron-core's `core_attention`, with the mask of Conan-embedding-v2.

Shapes: `s` sequence, `b` micro-batch, `t` packed tokens, `n` query and `g` key/value heads of this tensor rank, `d` head dim.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_conan.config import RunConfig
from megatron_conan.data.packing import PackedSequences
from megatron_conan.kernels.soft_mask_attention import (
    AttentionCase,
    Backend,
    BackendName,
    Form,
    case_of,
    choose_backend,
    is_supported,
    soft_mask_attention,
)
from megatron_conan.model.mask import SoftMask

LEARNED_THETA_START = -6.0
"""Where the learned form starts: sigmoid(-6) = .0025, nearly causal, with a finite gradient."""

logger = logging.getLogger(__name__)


def attention_case(config: RunConfig, device: torch.device) -> AttentionCase:
    """What the choice of a backend depends on, as far as the config says it."""
    form = config.soft_mask.form
    return AttentionCase(
        device_type=device.type,
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        head_dim=config.model.head_dim,
        form="constant" if form == "learned" else form,
        alpha_gradient=form == "learned",
        compute_capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
    )


def check_attention(config: RunConfig, device: torch.device) -> None:
    """Refuse a backend that is asked for by name and can't compute this model's attention; say once what `auto` does without.

    Raises:
        ValueError: names the backend, the reason and the remedy.
    """
    name, case = config.attention.backend, attention_case(config, device)
    try:
        choose_backend(name, case)
    except ValueError as error:
        raise ValueError(f"attention.backend={name}: {error}") from error
    supported, reason = is_supported("kernel", case)
    if name == "auto" and device.type == "cuda" and not supported and torch.distributed.get_rank() == 0:
        logger.warning("soft-mask attention goes without its fused kernel, which %s", reason)


def computes_packed(name: BackendName, case: AttentionCase) -> bool:
    """Whether packed texts are computed as they are. Else they go in padded groups, which is cheaper on a CPU."""
    packed = replace(case, packed=True)
    backends: tuple[Backend, ...] = ("kernel", "two_pass")
    return case.device_type == "cuda" and any(name in ("auto", x) and is_supported(x, packed)[0] for x in backends)


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
        backend: BackendName,
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
            # counted from its start: around 0 a bf16 weight can follow small changes, around -6 it moves in steps of 1/32
            self.theta = torch.nn.Parameter(torch.zeros(heads))
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
            [s, b, n * d]; rows of padding are finite and of no meaning.
        """
        if isinstance(attention_mask, PackedSequences):
            return self._attend_packed(query, key, value, attention_mask)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [s, b, n, d] -> [b, s, n, d]
        return self._attend(q, k, v, lengths=attention_mask).transpose(0, 1).flatten(2)  # [b, s, n, d] -> [s, b, n * d]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **sequences: Any) -> Tensor:
        """[b, s, n, d] -> [b, s, n, d], or [t, n, d] -> [t, n, d]."""
        form, alpha = effective_alpha(self.soft_mask, self.theta)
        known_alpha = self.soft_mask.value if self.theta is None else None
        settings: dict[str, Any] = {"scale": self.scale, "backend": self.backend, "known_alpha": known_alpha}
        return soft_mask_attention(q, k, v, alpha, form, **sequences, **settings, zero_padding=False)

    def _attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """[t, 1, n, d] -> [t, 1, n * d]."""
        q, k, v = (x[:, 0] for x in (query, key, value))  # [t, 1, n, d] -> [t, n, d]
        form, alpha = effective_alpha(self.soft_mask, self.theta)
        if computes_packed(self.backend, case_of(q, k, v, alpha, form)):
            out = self._attend(q, k, v, cu_seqlens=packed.cu_seqlens, max_length=packed.max_length)
        else:
            out = self._attend_groups(q, k, v, packed)
        return out.flatten(1).unsqueeze(1)  # [t, n, d] -> [t, 1, n * d]

    def _attend_groups(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
        """[t, n, d] -> [t, n, d]: texts of similar length together, padded."""
        padded = [_Pad.apply(x, packed) for x in (q, k, v)]  # [t, n, d] -> [p, n, d]
        outputs, start = [], 0
        for group in packed.groups:
            end = start + group.num_texts * group.width
            q, k, v = (x[start:end].unflatten(0, (group.num_texts, group.width)) for x in padded)  # -> [b, s, n, d]
            outputs.append(self._attend(q, k, v, lengths=group.lengths).flatten(0, 1))  # -> [p of the group, n, d]
            start = end
        return _Unpad.apply(torch.cat(outputs), packed)

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


def effective_alpha(soft_mask: SoftMask, theta: Tensor | None) -> tuple[Form, Tensor]:
    """Form and alpha of the attention; the learned form is alpha_h = a + (1 - a) sigmoid(-6 + theta_h), the same everywhere.

    a(t) is the schedule, so that every learned run starts nearly causal and ends exactly bidirectional.
    """
    if soft_mask.form == "learned":
        assert theta is not None
        opening = torch.sigmoid(LEARNED_THETA_START + theta.float())
        return "constant", soft_mask.alpha + (1.0 - soft_mask.alpha) * opening
    return soft_mask.form, soft_mask.alpha
