"""The forward kernel's own source on CPU tensors, with every access and every synchronisation checked.

Shapes: `b` sequences, `s` rows a sequence, `t` packed tokens, `m` packed sequences, `n` query heads, `g` key/value heads,
`d` head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_conan.kernels.soft_mask_attention.emulate.build import KERNEL, load_library
from megatron_conan.kernels.soft_mask_attention.emulate.counters import Counters, LaunchCounters
from megatron_conan.kernels.soft_mask_attention.semantics import Form

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

    _fields_: ClassVar = [
        *((name, c_uint64) for name in ("begin", "end")),
        *((name, c_int32) for name in ("writable", "unused")),
        ("accesses", c_void_p),
    ]


class CountedRange:
    """A stretch of global memory with a count of accesses for every 16 bytes."""

    def __init__(self, begin: int, end: int, *, writable: bool) -> None:
        self.begin, self.end, self.writable = begin, end, writable
        self.accesses = torch.zeros((end - begin + 15) // 16, dtype=torch.int32)

    def as_struct(self) -> GlobalRange:
        return GlobalRange(self.begin, self.end, int(self.writable), 0, self.accesses.data_ptr())

    def of(self, tensor: Tensor) -> Tensor:
        """Accesses to a tensor that lies in this range, [..., d] -> [..., d/8]."""
        shape = (*tensor.shape[:-1], tensor.shape[-1] // 8)
        strides = (*(stride // 8 for stride in tensor.stride()[:-1]), 1)
        return self.accesses.as_strided(shape, strides, (tensor.data_ptr() - self.begin) // 16)


@dataclass
class EmulatedLaunch:
    """What a launch gave, and what it cost."""

    out: Tensor
    lse: Tensor
    counters: LaunchCounters


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
    sizes = ((library.forward_params_size, ForwardParams, "params.h"), (library.counters_size, Counters, "counters.h"))
    for function, struct, header in sizes:
        function.restype = c_int64
        size = function()
        if size != ctypes.sizeof(struct):
            raise RuntimeError(
                f"{struct.__name__} of {header} has {size} bytes, here {ctypes.sizeof(struct)}: make them equal"
            )
    return library


def emulated_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, form: Form, **arguments: object
) -> tuple[Tensor, Tensor]:
    """Out and lse of `emulated_launch`, which has the arguments."""
    launch = emulated_launch(q, k, v, alpha, form, **arguments)
    return launch.out, launch.lse


def emulated_launch(
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
) -> EmulatedLaunch:
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
        out like q, lse [b, n, s] or [n, t] fp32, and what it cost.

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
    inputs = counted_ranges([q, k, v], writable=False)
    outputs = counted_ranges([out.tensor], writable=True)
    ranges = [x.as_struct() for x in (*inputs, *outputs)]
    counters, message = Counters(), ctypes.create_string_buffer(MESSAGE_BYTES)
    code = library.emulate_forward(
        ctypes.byref(params),
        c_int32(ORDERS.index(order)),
        c_uint64(seed),
        (GlobalRange * len(ranges))(*ranges),
        c_int32(len(ranges)),
        ctypes.byref(counters),
        message,
        c_int64(MESSAGE_BYTES),
    )
    if code != 0:
        raise RuntimeError(f"the emulated kernel failed with code {code}: {message.value.decode()}")
    out.check("out")
    lse.check("lse")
    reads = [next(x.of(tensor) for x in inputs if x.begin <= tensor.data_ptr() <= x.end) for tensor in (q, k, v)]
    return EmulatedLaunch(
        out.tensor, lse.tensor, LaunchCounters(counters, *reads, out_writes=outputs[0].of(out.tensor))
    )


def counted_ranges(tensors: Sequence[Tensor], *, writable: bool) -> list[CountedRange]:
    """The addresses from each tensor's first element to its last; those of tensors that overlap are one range."""
    spans: list[tuple[int, int]] = []
    for begin, end in sorted(map(address_span, tensors)):
        if spans and begin < spans[-1][1]:
            begin, end = spans[-1][0], max(end, spans.pop()[1])
        spans.append((begin, end))
    return [CountedRange(begin, end, writable=writable) for begin, end in spans]


def address_span(tensor: Tensor) -> tuple[int, int]:
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    size = tensor.element_size() * span if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + size
