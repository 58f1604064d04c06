"""Soft-mask attention: its semantics, and the plain reference every faster implementation is held against."""

from megatron_conan.kernels.soft_mask_attention.reference import soft_mask_attention_reference, soft_mask_weights

__all__ = ["soft_mask_attention_reference", "soft_mask_weights"]
