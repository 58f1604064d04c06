"""The only place that imports optional packages; everything else asks here."""

from __future__ import annotations

from types import ModuleType


def import_faiss() -> ModuleType:
    """Return the faiss module. Raises ImportError that names the extras to install where it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"hard-negative mining needs faiss, which could not be imported ({error}): "
            "`pip install megatron_conan[cpu]` or, on a machine with a GPU, `pip install megatron_conan[gpu]`"
        ) from error
    return faiss


def import_te_linears() -> tuple[type, type]:
    """Transformer-engine's column- and row-parallel linears in megatron-core's wrapping.

    Raises:
        ImportError: where transformer-engine is missing or does not load (it needs a CUDA GPU).
    """
    try:
        from megatron.core.extensions.transformer_engine import (
            HAVE_TE,
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        if not HAVE_TE:  # megatron-core puts mocks in its place
            raise ImportError("transformer_engine is not installed")
    except (ImportError, RuntimeError) as error:  # on a machine without CUDA transformer-engine raises RuntimeError
        raise ImportError(
            "model.spec=te needs transformer-engine on a CUDA machine, which could not be imported: install it with "
            f"`pip install megatron_conan[gpu]`, or set model.spec=local ({error})"
        ) from error
    return TEColumnParallelLinear, TERowParallelLinear
