"""Fused attention kernels and their reference implementations."""
