"""megatron-core on a machine without CUDA.

megatron-core 0.16.1 asks for `torch.cuda` in about twenty places. Here every megatron-core module's global name `torch`
is replaced by a stand-in whose `cuda` namespace and tensor factories mean the CPU; torch itself stays as it is. What may be
asked for is listed below: anything else raises, naming it, so that a new version of megatron-core cannot silently take
another path.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")

hits: set[tuple[str, str]] = set()
"""Stand-ins used so far: (what, module that asked)."""

PASSED_THROUGH = frozenset({"is_available", "device_count", "nvtx", "amp", "is_current_stream_capturing"})
"""Names of torch.cuda that work without a GPU and are handed through."""

FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like")
"""Functions whose `device="cuda"` becomes the CPU."""

CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
"""megatron-core sorts parameters by these names."""


def _stand_ins() -> dict[str, Callable[..., Any]]:
    """What megatron-core may ask of torch.cuda, and the CPU's answer."""
    return {
        "current_device": lambda: CPU,
        "synchronize": lambda *_: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    }


def _caller() -> str:
    """Name of the nearest megatron-core module on the stack, or an empty string."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("megatron.core"):
            return str(name)
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class _CudaNamespace(types.ModuleType):
    """torch.cuda as megatron-core sees it."""

    def __init__(self) -> None:
        super().__init__("torch.cuda on CPU")
        for name, function in _stand_ins().items():
            setattr(self, name, _recorded(f"cuda.{name}", function))

    def __getattr__(self, name: str) -> Any:
        if name in PASSED_THROUGH or name.startswith("__"):
            return getattr(torch.cuda, name)
        raise AttributeError(
            f"{_caller() or 'megatron-core'} asked for torch.cuda.{name}, which megatron_conan/parallel/cpu.py does "
            "not stand in for; megatron-core is tried on CPU in version 0.16.1 only"
        )


class _TorchNamespace(types.ModuleType):
    """torch as megatron-core sees it: everything is torch's own but `cuda` and the factories."""

    def __init__(self) -> None:
        super().__init__("torch on CPU")
        self.cuda = _CudaNamespace()
        for name in FACTORIES:
            setattr(self, name, _factory_on_cpu(name, getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _recorded(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        hits.add((what, _caller()))
        return function(*args, **kwargs)

    return stand_in


def _factory_on_cpu(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def factory(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            hits.add((f"{name}(device='cuda')", _caller()))
            kwargs["device"] = CPU
        return function(*args, **kwargs)

    return factory


def install() -> bool:
    """Let megatron-core run on the CPU. Call once, before any megatron-core object is built.

    Returns:
        True if the stand-ins are in place, False where CUDA is available and nothing was touched.
    """
    if torch.cuda.is_available():
        return False
    import megatron.core.dist_checkpointing.strategies.fully_parallel
    import megatron.core.dist_checkpointing.strategies.torch
    import megatron.core.distributed
    import megatron.core.models.common.language_module.language_module
    import megatron.core.optimizer
    import megatron.core.optimizer_param_scheduler
    import megatron.core.pipeline_parallel
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.transformer_block  # noqa: F401

    namespace = _TorchNamespace()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "__dict__", {}).get("torch") is torch:
            module.torch = namespace  # type: ignore[attr-defined]
    random._get_cuda_rng_state = _recorded("random._get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    random._set_cuda_rng_state = _recorded("random._set_cuda_rng_state", lambda s, *_, **__: torch.set_rng_state(s))
    # "CPU RNG state changed within GPU RNG context": here both are one generator
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    _install_tensor_methods()
    return True


def _install_tensor_methods() -> None:
    """`Tensor.cuda()` and `Tensor.type()` answer as on a GPU, to callers inside megatron-core only."""
    if getattr(torch.Tensor.type, "stands_in", False):
        return
    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    def from_megatron_core() -> bool:
        return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core")

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.dtype not in CUDA_TYPE_NAMES or not from_megatron_core():
            return real_type(self, *args, **kwargs)
        hits.add(("Tensor.type", _caller()))
        return CUDA_TYPE_NAMES[self.dtype]

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not from_megatron_core():
            return real_cuda(self, *args, **kwargs)
        hits.add(("Tensor.cuda", _caller()))
        return self

    type_.stands_in = True  # type: ignore[attr-defined]
    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign,assignment]
