"""The kernels on the host: the same device source, built with g++ and run by fibers, for tests without a GPU.

It sees numerics, index arithmetic, layouts and synchronisation, and it counts operations, bytes and bank conflicts. It
doesn't see speed, registers, what nvcc makes of the source, nor plain loads and stores through pointers (but for the guard
zones around the results).
"""

from megatron_conan.kernels.soft_mask_attention.emulate.counters import LaunchCounters
from megatron_conan.kernels.soft_mask_attention.emulate.forward import EmulatedLaunch, emulated_forward, emulated_launch

__all__ = ["EmulatedLaunch", "LaunchCounters", "emulated_forward", "emulated_launch"]
