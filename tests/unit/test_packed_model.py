"""Packed texts through attention and through the whole model: each is as if it were alone, in value and in every gradient.

Shapes: `t` packed tokens, `s` sequence, `b` texts of a padded batch, `n` query heads, `g` key/value heads, `d` head dim.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gloo_pool import WorkerPool
from layouts import TINY_MODEL, tiny_config
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_conan.config import RunConfig
from megatron_conan.config.tree import SoftMaskConfig
from megatron_conan.data.packing import PackedSequences, pack_sequences, pack_texts
from megatron_conan.kernels.soft_mask_attention import AttentionCase
from megatron_conan.model.attention import (
    LEARNED_THETA_START,
    SoftMaskAttention,
    attention_case,
    check_attention,
    computes_packed,
)
from megatron_conan.model.mask import SoftMask

HEADS, GROUPS, HEAD_DIM = 4, 2, 8
RAGGED = [13, 12, 10, 7, 7, 3, 1]
TAIL = 5
FORMS = ["row", "column", "constant", "learned"]
every_mask = pytest.mark.parametrize(
    ("backend", "form", "alpha"), list(itertools.product(["reference", "sdpa", "two_pass"], FORMS, [0.0, 0.3, 1.0]))
)


def attention(backend: str, form: str, alpha: float) -> SoftMaskAttention:
    """The module as the model builds it, at one alpha; thetas that differ."""
    core = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        use_cpu_initialization=True,
    )
    mask = SoftMask(SoftMaskConfig(form=form, schedule="constant", alpha=alpha), steps=1, device=torch.device("cpu"))
    module = SoftMaskAttention(core, layer_number=1, soft_mask=mask, backend=backend)
    if module.theta is not None:
        module.theta.data.copy_(torch.linspace(-2, 2, HEADS) - LEARNED_THETA_START)
    return module


GPU = AttentionCase("cuda", torch.bfloat16, 112, "row", compute_capability=(9, 0))


@pytest.mark.parametrize(
    ("name", "case", "packed"),
    [
        ("auto", GPU, True),
        ("two_pass", GPU, True),
        ("sdpa", GPU, False),
        ("reference", GPU, False),
        ("auto", replace(GPU, dtype=torch.float32), False),
        ("two_pass", replace(GPU, head_dim=100), False),
        ("auto", replace(GPU, device_type="cpu"), False),
        ("two_pass", replace(GPU, device_type="cpu"), False),
    ],
)
def test_packed_texts_are_computed_as_they_are_on_gpus_where_a_backend_can(name, case, packed):
    assert computes_packed(name, case) == packed


def config(form: str, precision: str, backend: str = "auto") -> SimpleNamespace:
    return SimpleNamespace(
        soft_mask=SimpleNamespace(form=form),
        train=SimpleNamespace(precision=precision),
        model=SimpleNamespace(head_dim=112),
        attention=SimpleNamespace(backend=backend),
    )


def test_the_case_that_a_config_says():
    cpu = torch.device("cpu")
    learned = AttentionCase("cpu", torch.bfloat16, 112, "constant", alpha_gradient=True)
    assert attention_case(config("learned", "bf16"), cpu) == learned
    assert attention_case(config("row", "fp32"), cpu) == AttentionCase("cpu", torch.float32, 112, "row")
    with pytest.raises(
        ValueError, match=r"^attention\.backend=kernel: attention backend kernel runs on CUDA, not on cpu"
    ):
        check_attention(config("row", "fp32", "kernel"), cpu)


@pytest.mark.parametrize(("rank", "backend", "warnings"), [(0, "auto", 1), (1, "auto", 0), (0, "sdpa", 0)])
def test_rank_0_says_once_that_the_kernel_is_not_used(rank, backend, warnings, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    check_attention(config("row", "bf16", backend), torch.device("cuda"))
    said = [record.message for record in caplog.records]
    assert len(said) == warnings
    assert all("goes without its fused kernel, which needs compute capability 8.0, this GPU has 7.5" in x for x in said)


def draw(num_tokens: int) -> tuple[list[Tensor], Tensor]:
    """q [t, 1, n, d], k and v [t, 1, g, d]; and a direction [t, 1, n * d] for gradients."""
    generator = torch.Generator().manual_seed(num_tokens)
    qkv = [torch.randn(num_tokens, 1, heads, HEAD_DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]
    return qkv, torch.randn(num_tokens, 1, HEADS * HEAD_DIM, generator=generator)


def gradients(out: Tensor, direction: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    (out * direction).sum().backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def run_packed(module: SoftMaskAttention, packed: PackedSequences, qkv: list[Tensor], direction: Tensor):
    """Value, and gradients of q, k, v and theta."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = module(*leaves, packed)
    return out, gradients(out, direction, leaves + ([module.theta] if module.theta is not None else []))


def run_alone(module: SoftMaskAttention, lengths: list[int], qkv: list[Tensor], direction: Tensor):
    """Text by text, one call each."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    ends = list(itertools.accumulate(lengths))
    outs = [
        module(*(x[end - length : end] for x in leaves), torch.tensor([length]))
        for length, end in zip(lengths, ends, strict=True)
    ]
    out = torch.cat(outs)
    return out, gradients(out, direction[: ends[-1]], leaves + ([module.theta] if module.theta is not None else []))


def run_padded(module: SoftMaskAttention, lengths: list[int], qkv: list[Tensor], direction: Tensor):
    """All texts in one right-padded batch."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    ends = list(itertools.accumulate(lengths))

    def pad(x: Tensor) -> Tensor:
        parts = [x[end - length : end, 0] for length, end in zip(lengths, ends, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(parts)  # [s, b, ...]

    padded = module(*(pad(x) for x in leaves), torch.tensor(lengths))
    out = torch.cat([padded[:length, i] for i, length in enumerate(lengths)])[:, None]
    return out, gradients(out, direction[: ends[-1]], leaves + ([module.theta] if module.theta is not None else []))


@every_mask
@pytest.mark.parametrize("lengths", [RAGGED, [5, 1, 9, 2], [6, 6, 6], [4]], ids=str)
def test_packed_attention_is_that_of_each_text_alone(backend, form, alpha, lengths):
    """fp32 sums of at most 13 terms of size 1, in another order: a few 1e-7, gradients a few 1e-6."""
    total = sum(lengths)
    qkv, direction = draw(total + TAIL)
    packed = pack_sequences(np.array(lengths), total + TAIL)
    out, found = run_packed(attention(backend, form, alpha), packed, qkv, direction)
    assert out.shape == (total + TAIL, 1, HEADS * HEAD_DIM)
    assert not out[total:].any()
    for run in (run_alone, run_padded):
        expected, expected_gradients = run(attention(backend, form, alpha), lengths, qkv, direction)
        torch.testing.assert_close(out[:total], expected, rtol=0, atol=2e-6)
        for a, b in zip(found, expected_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if form == "learned" and max(lengths) > 1:
        assert bool(found[3].any()) == (alpha < 1)


@every_mask
def test_what_follows_the_last_text_neither_gives_nor_takes(backend, form, alpha):
    """NaN there reaches nothing, and no gradient comes from it; nor does a text see its neighbours."""
    total = sum(RAGGED)
    packed = pack_sequences(np.array(RAGGED), total + TAIL)
    qkv, direction = draw(total + TAIL)
    out, plain = run_packed(attention(backend, form, alpha), packed, qkv, direction)
    for x in (*qkv, direction):
        x[total:] = torch.nan
    noisy, found = run_packed(attention(backend, form, alpha), packed, qkv, direction.nan_to_num(50.0))
    assert torch.equal(noisy, out)
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a, b)
    for gradient in found[:3]:
        assert not gradient[total:].any()
        assert gradient[:total].any()


def test_other_texts_have_no_influence():
    total = sum(RAGGED)
    packed = pack_sequences(np.array(RAGGED))
    qkv, direction = draw(total)
    module = attention("sdpa", "row", 0.3)
    out, _ = run_packed(module, packed, qkv, direction)
    begin, end = 13 + 12, 13 + 12 + 10
    for x in qkv:
        x[:begin] = 7.0
        x[end:] = -7.0
    changed, _ = run_packed(module, packed, qkv, direction)
    assert torch.equal(changed[begin:end], out[begin:end])
    assert not torch.equal(changed[:begin], out[:begin])


# The whole model.

MODEL_LENGTHS = [15, 14, 12, 9, 9, 4, 1]
PROMPT_LENGTHS = [6, 0, 3, 8, 1, 2, 0]
POOLING = [(mode, include) for mode in ("mean", "weighted_mean", "last") for include in (True, False)]


def check_model(config: RunConfig, alpha: float) -> None:
    """Embed packed, padded and alone: the same vectors, and the same gradient of every parameter. Runs in a worker.

    fp32: unit vectors are held to 1e-6, gradients to 1e-5 of the largest number of their tensor.
    """
    from megatron_conan.model.conan import build_model
    from megatron_conan.parallel.context import build_context

    build_context(config.parallel)
    cpu = torch.device("cpu")
    soft_mask = SoftMask(config.soft_mask, steps=1, device=cpu)
    soft_mask.set(alpha)
    (model,), _ = build_model(config, cpu, soft_mask, "embedding")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 500, (length,), generator=generator) for length in MODEL_LENGTHS]
    direction = torch.randn(len(texts), config.embedding_dim, generator=generator)
    lengths, prompts = torch.tensor(MODEL_LENGTHS), torch.tensor(PROMPT_LENGTHS)

    def packed() -> Tensor:
        batch = pack_texts(
            range(len(texts)), lambda i: texts[i].numpy(), np.array(PROMPT_LENGTHS), pad_id=0, pad_multiple=24
        )
        assert batch.tokens.shape[1] > sum(MODEL_LENGTHS)  # a tail
        return model(batch.tokens, batch.sequences, prompt_lengths=batch.prompt_lengths)

    def padded() -> Tensor:
        tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return model(tokens, lengths, prompt_lengths=prompts)

    def alone() -> Tensor:
        ones = zip(texts, PROMPT_LENGTHS, strict=True)
        return torch.cat([model(text[None], torch.tensor([len(text)]), prompt_lengths=prompt) for text, prompt in ones])

    def embed(way: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = way()
        (out * direction).sum().backward()
        return out.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected, expected_gradients = embed(alone)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(len(texts)))
    assert all(gradient.any() for gradient in expected_gradients.values())
    for way in (packed, padded):
        found, found_gradients = embed(way)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        for name, gradient in expected_gradients.items():
            atol = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: n + m)


def model_config(folder: Path, **sections: Any) -> RunConfig:
    files = {"pairs": folder / "pairs", "tokenizer": folder / "tokenizer"}  # nobody reads them
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    return tiny_config("weak", files, folder / "run", model=dict(TINY_MODEL, **model, init_std=0.3), **sections)


@pytest.mark.parametrize(("mode", "include_prompt"), POOLING)
def test_a_models_embeddings_of_packed_texts_are_those_of_each_alone(
    mode: str, include_prompt: bool, workers: WorkerPool, tmp_path: Path
) -> None:
    pooling = {"mode": mode, "include_prompt": include_prompt}
    workers.run(check_model, 1, model_config(tmp_path, pooling=pooling), 0.3)


@pytest.mark.parametrize(("form", "alpha"), [("row", 0.0), ("row", 1.0), ("column", 0.3), ("learned", 0.3)])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "two_pass"])
def test_every_mask_and_backend_of_the_model(
    form: str, alpha: float, backend: str, workers: WorkerPool, tmp_path: Path
) -> None:
    settings = {"soft_mask": {"form": form}, "attention": {"backend": backend}, "pooling": {"projection_dim": 24}}
    workers.run(check_model, 1, model_config(tmp_path, **settings), alpha)
