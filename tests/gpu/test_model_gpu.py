"""The whole model on a GPU in bf16: with the attention kernel it embeds as it does with torch's attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import TINY_MODEL, tiny_config
from torch import Tensor

from megatron_conan.config import RunConfig
from megatron_conan.data.packing import pack_texts
from megatron_conan.model.mask import SoftMask
from megatron_conan.parallel.context import build_context, destroy_context, initialize_distributed

pytestmark = pytest.mark.gpu

LENGTHS = [130, 64, 63, 17, 9, 1]
MODEL = {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "max_seq_length": 256}
"""Head dim 64."""


@pytest.fixture
def model_device() -> Iterator[torch.device]:
    """The device of a process group of one."""
    yield initialize_distributed()
    destroy_context()


def model_config(folder: Path, form: str, backend: str) -> RunConfig:
    files = {"pairs": folder / "pairs", "tokenizer": folder / "tokenizer"}  # nobody reads them
    train = {"steps": 4, "micro_batch_size": 8, "global_batch_size": 8, "precision": "bf16"}
    sections: dict[str, Any] = {"soft_mask": {"form": form}, "attention": {"backend": backend}, "train": train}
    return tiny_config("weak", files, folder / "run", model={**TINY_MODEL, **MODEL, "init_std": 0.1}, **sections)


def embed(config: RunConfig, alpha: float, device: torch.device) -> list[Tensor]:
    """Unit vectors of the same texts, packed and padded, and the gradient of the query, key and value projections."""
    from megatron_conan.model.conan import build_model

    build_context(config.parallel)
    soft_mask = SoftMask(config.soft_mask, steps=1, device=device)
    soft_mask.set(alpha)
    (model,), _ = build_model(config, device, soft_mask, "embedding")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 500, (length,), generator=generator) for length in LENGTHS]
    prompts = np.zeros(len(texts), dtype=np.int64)
    batch = pack_texts(range(len(texts)), lambda i: texts[i].numpy(), prompts, pad_id=0, pad_multiple=64).to(device)
    packed = model(batch.tokens, batch.sequences, prompt_lengths=batch.prompt_lengths).float()
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
    padded = model(tokens, torch.tensor(LENGTHS, device=device)).float()
    direction = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (packed * direction).sum().backward()
    gradients = [p.grad.float() for name, p in model.named_parameters() if "linear_qkv" in name]
    assert len(gradients) == MODEL["num_layers"]
    return [packed.detach(), padded.detach(), *gradients]


@pytest.mark.parametrize(
    ("form", "alpha"), [("row", 0.0), ("row", 0.3), ("row", 1.0), ("column", 0.3), ("learned", 0.3)]
)
def test_kernel_and_sdpa_give_the_same_embeddings(model_device, tmp_path, form, alpha):
    """bf16 rounds by 2^-9 at each of some twenty places, so vectors may differ by some percent; gradients by more.

    The definition, which rounds at other places, says how much that is.
    """
    found = {
        backend: embed(model_config(tmp_path, form, backend), alpha, model_device)
        for backend in ("kernel", "sdpa", "reference")
    }
    for place, (ours, sdpa, plain) in enumerate(zip(*found.values(), strict=True)):
        assert ours.isfinite().all()
        limit = max(2 * (sdpa - plain).norm().item(), 2**-8 * plain.norm().item())
        assert (ours - sdpa).norm() <= limit, place
        assert (ours - plain).norm() <= limit, place
    packed, padded = found["kernel"][:2]
    assert (packed - padded).norm() <= 2**-6 * padded.norm()
