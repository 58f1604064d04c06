"""Ranks, groups and devices as one explicit object; megatron-core on CPU."""

import warnings


def hide_engine_warnings() -> None:
    """Silence what megatron-core and torch's checkpointing warn of at every start; for programs, not for a library's import.

    megatron-core names each optional package it lacks, in every process, and both use their own deprecated calls.
    """
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"megatron\.core|torch\.distributed")
