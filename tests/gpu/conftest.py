"""Tests that need a CUDA GPU, and are skipped with the reason where there is none, and the compiled kernels."""

import pytest
import torch

from megatron_conan.kernels.soft_mask_attention.op import library_error


def missing() -> str | None:
    """Why these tests can't run here."""
    if not torch.cuda.is_available():
        return f"needs a CUDA GPU: torch {torch.__version__} finds none"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


@pytest.fixture(autouse=True)
def _needs_gpu_and_kernels() -> None:
    if reason := missing():
        pytest.skip(reason)
    if error := library_error():
        pytest.fail(f"the compiled kernels are not there: {error}")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
