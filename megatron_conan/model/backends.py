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
