"""The forward kernel's own source on CPU tensors, with every access and every synchronisation checked.

Shapes: `b` sequences, `s` rows a sequence, `t` packed tokens, `m` packed sequences, `n` query heads, `g` key/value heads,
`d` head dim.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_conan.kernels.soft_mask_attention.emulate.build import KERNEL, load_library
from megatron_conan.kernels.soft_mask_attention.reference import Form

Order = Literal["ascending", "descending", "random"]

ORDERS = ("ascending", "descending", "random")
FORMS = ("constant", "row", "column")
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
GUARD_BYTES = 4096
MESSAGE_BYTES = 1024


class Strides(ctypes.Structure):
    """`Strides` of csrc/params.h."""

    _fields_: ClassVar = [("sequence", c_int64), ("row", c_int64), ("head", c_int64)]


class ForwardParams(ctypes.Structure):
    """`ForwardParams` of csrc/params.h."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("q", "k", "v", "out", "lse", "alpha", "lengths", "cu_seqlens")),
        *((name, Strides) for name in ("q_strides", "k_strides", "v_strides", "out_strides")),
        *((name, c_int64) for name in ("lse_sequence_stride", "lse_head_stride")),
        *((name, c_int32) for name in ("num_sequences", "num_rows", "max_length", "num_heads", "heads_per_group")),
        *((name, c_int32) for name in ("alpha_stride", "form")),
        ("scale", c_float),
    ]


class GlobalRange(ctypes.Structure):
    """`GlobalRange` of machine.h."""

    _fields_: ClassVar = [("begin", c_uint64), ("end", c_uint64), ("writable", c_int32), ("unused", c_int32)]


class GuardedTensor:
    """A tensor with guard zones around it; all bytes 0xFF at first, also its own: what no result ever is."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> None:
        span = (
            sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
        )
        self.guard = GUARD_BYTES // dtype.itemsize
        self.bits = torch.full((span + 2 * self.guard,), -1, dtype={2: torch.int16, 4: torch.int32}[dtype.itemsize])
        self.tensor = self.bits.view(dtype).as_strided(shape, strides, self.guard)

    @classmethod
    def copy(cls, source: Tensor) -> GuardedTensor:
        guarded = cls(tuple(source.shape), source.contiguous().stride(), source.dtype)
        guarded.tensor.copy_(source)
        return guarded

    def check(self, name: str) -> None:
        """Raises RuntimeError unless the zones are untouched and the tensor is all written."""
        if not bool((self.bits[: self.guard] == -1).all() and (self.bits[len(self.bits) - self.guard :] == -1).all()):
            raise RuntimeError(f"the kernel has written beside {name}")
        bits = self.bits.as_strided(self.tensor.shape, self.tensor.stride(), self.guard)
        if bool((bits == -1).any()):
            first = (bits == -1).nonzero()[0].tolist()
            raise RuntimeError(
                f"the kernel has left elements of {name} {list(bits.shape)} unwritten, the first at {first}"
            )


def load_forward(dtype: torch.dtype, head_dim: int, *, kernel: Path = KERNEL) -> ctypes.CDLL:
    """The forward kernel for one element type and head dim, built from the sources in `kernel`."""
    if dtype not in ELEMENTS:
        raise ValueError(f"the kernel takes {' or '.join(map(str, ELEMENTS))}, not {dtype}")
    definitions = (f"INSTANCE_ELEMENT={ELEMENTS[dtype]}", f"INSTANCE_HEAD_DIM={head_dim}")
    library = load_library(kernel / "emulate" / "emulate.cpp", definitions, kernel=kernel)
    library.forward_params_size.restype = c_int64
    size = library.forward_params_size()
    if size != ctypes.sizeof(ForwardParams):
        raise RuntimeError(
            f"ForwardParams of params.h has {size} bytes, here {ctypes.sizeof(ForwardParams)}: make them equal"
        )
    return library


def emulated_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    form: Form,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    order: Order = "ascending",
    seed: int = 0,
    kernel: Path = KERNEL,
) -> tuple[Tensor, Tensor]:
    """Soft-mask attention by the emulated kernel.

    Args:
        q: [b, s, n, d], packed [t, n, d]; bf16 or fp16 on the CPU, the last dim contiguous.
        k: [b, s, g, d], packed [t, g, d].
        v: like k.
        alpha: scalar or [n], fp32.
        form: row, column or constant.
        lengths: [b] int32; s each if not given.
        cu_seqlens: [m + 1] int32 where packed.
        max_length: the longest length, which sizes the grid; found if not given.
        scale: factor on the scores; 1/sqrt(d) if not given.
        order: of warps, lanes and blocks.
        seed: of the random order.
        kernel: the folder of csrc/ and emulate/.

    Returns:
        out like q, and lse [b, n, s] or [n, t] fp32.

    Raises:
        RuntimeError: what the kernel did wrong.
    """
    packed = cu_seqlens is not None
    num_rows, num_heads, head_dim = q.shape[-3:]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != (3 if packed else 4) or tensor.dtype != q.dtype or tensor.stride(-1) != 1 or tensor.is_cuda:
            raise ValueError(
                f"{name} {list(tensor.shape)} {tensor.dtype}: must be like q, on the CPU, head dim contiguous"
            )
    library = load_forward(q.dtype, head_dim, kernel=kernel)

    out = GuardedTensor(tuple(q.shape), torch.empty_like(q, device="meta").stride(), q.dtype)
    lse_shape = (num_heads, num_rows) if packed else (q.shape[0], num_heads, num_rows)
    lse = GuardedTensor(lse_shape, torch.empty(lse_shape, device="meta").stride(), torch.float32)
    small = [None if x is None else GuardedTensor.copy(x) for x in (alpha.float(), lengths, cu_seqlens)]
    if max_length is None:
        ends = num_rows if lengths is None else lengths.max()
        max_length = int(cu_seqlens.diff().max() if packed and len(cu_seqlens) > 1 else ends)
    params = ForwardParams(
        *(x.data_ptr() for x in (q, k, v, out.tensor, lse.tensor)),
        *(None if x is None else x.tensor.data_ptr() for x in small),
        *(Strides(0 if packed else x.stride(0), *x.stride()[-3:-1]) for x in (q, k, v, out.tensor)),
        lse_sequence_stride=0 if packed else lse.tensor.stride(0),
        lse_head_stride=lse.tensor.stride(-2),
        num_sequences=len(cu_seqlens) - 1 if packed else q.shape[0],
        num_rows=num_rows,
        max_length=max_length,
        num_heads=num_heads,
        heads_per_group=num_heads // k.shape[-2],
        alpha_stride=alpha.dim(),
        form=FORMS.index(form),
        scale=head_dim**-0.5 if scale is None else scale,
    )
    ranges = [global_range(x, writable=False) for x in (q, k, v)] + [global_range(out.tensor, writable=True)]
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    code = library.emulate_forward(
        ctypes.byref(params),
        c_int32(ORDERS.index(order)),
        c_uint64(seed),
        (GlobalRange * len(ranges))(*ranges),
        c_int32(len(ranges)),
        message,
        c_int64(MESSAGE_BYTES),
    )
    if code != 0:
        raise RuntimeError(f"the emulated kernel failed with code {code}: {message.value.decode()}")
    out.check("out")
    lse.check("lse")
    return out.tensor, lse.tensor


def global_range(tensor: Tensor, *, writable: bool) -> GlobalRange:
    """The addresses from the tensor's first element to its last."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    size = tensor.element_size() * span if tensor.numel() else 0
    return GlobalRange(tensor.data_ptr(), tensor.data_ptr() + size, int(writable), 0)
