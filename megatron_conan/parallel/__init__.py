"""Ranks, groups and devices as one explicit object; megatron-core on CPU."""
