"""The kernels on the host: the same device source, built with g++ and run by fibers, for tests without a GPU.

It sees numerics, index arithmetic, layouts and synchronisation. It doesn't see speed, bank conflicts, registers, what nvcc
makes of the source, nor plain loads and stores through pointers (but for the guard zones around the results).
"""

from megatron_conan.kernels.soft_mask_attention.emulate.forward import emulated_forward

__all__ = ["emulated_forward"]
