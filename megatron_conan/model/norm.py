"""RMSNorm in fp32, usable under sequence parallelism (megatron-core's torch norm is not)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        """`config` says whether sequence parallelism is on: the weight's gradient is then summed over tp."""
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x [..., h]; same shape and dtype."""
        if x.is_cuda:  # one fused kernel there; on a CPU torch runs a chain of a dozen passes over memory
            return torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)
        return _FewPasses.apply(x.float(), self.weight.float(), self.eps).to(x.dtype)


class _FewPasses(torch.autograd.Function):
    """RMSNorm on a CPU, where passes over memory are what costs: three forward, six backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)  # [..., 1]
        unit = x * scale
        ctx.save_for_backward(unit, weight, scale)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With u = x * scale: dw = sum g u, dx = scale (g w - u mean(g w u))."""
        unit, weight, scale = ctx.saved_tensors
        product = gradients[0] * unit
        rows = product.reshape(-1, unit.shape[-1])
        mean = (rows @ weight).reshape(scale.shape) / unit.shape[-1]
        dx = (gradients[0] * weight).addcmul_(unit, mean, value=-1.0).mul_(scale)
        return dx, rows.sum(dim=0), None
