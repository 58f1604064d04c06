"""Soft-mask attention: what it computes (`semantics`), its backends, and the one function to call (`gateway`)."""

from megatron_conan.kernels.soft_mask_attention.gateway import (
    AttentionCase,
    Backend,
    BackendName,
    case_of,
    choose_backend,
    is_supported,
    soft_mask_attention,
)
from megatron_conan.kernels.soft_mask_attention.reference import reference
from megatron_conan.kernels.soft_mask_attention.semantics import Form, check_inputs, soft_mask_weights

__all__ = [
    "AttentionCase",
    "Backend",
    "BackendName",
    "Form",
    "case_of",
    "check_inputs",
    "choose_backend",
    "is_supported",
    "reference",
    "soft_mask_attention",
    "soft_mask_weights",
]
