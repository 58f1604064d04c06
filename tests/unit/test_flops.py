"""Model FLOPs against torch's own counter on a plain decoder; chips by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import tiny_config
from plain_decoder import make_weights, token_vectors
from torch.utils.flop_counter import FlopCounterMode

from megatron_conan.config import RunConfig
from megatron_conan.export.mapping import EMBEDDING, ModelShape
from megatron_conan.train.flops import known_peak, peak_flops, step_flops

LENGTHS = [1, 7, 13, 24]
SHAPE = ModelShape(
    num_layers=3,
    hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=12,  # heads together are wider than the model
    ffn_hidden_size=56,
    vocab_size=330,
    rotary_base=500.0,
    norm_epsilon=1e-4,
)


def _config(stage: str, folder: Path, peak_tflops: float | None = None) -> RunConfig:
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size")
    model = {name: getattr(SHAPE, name) for name in names} | {"vocab_size": SHAPE.vocab_size}
    files = dict.fromkeys(("lm", "pairs", "tokenizer"), folder)
    return tiny_config(stage, files, folder, model=model, train={"peak_tflops": peak_tflops})


@pytest.mark.parametrize("stage", ["pretrain", "weak"])
def test_flops_are_those_of_a_plain_decoder(stage: str, tmp_path: Path) -> None:
    """One text at a time, without padding; scores are all computed there, whatever the mask closes."""
    weights = {name: weight.requires_grad_() for name, weight in make_weights(SHAPE, padding_rows=0).items()}
    with FlopCounterMode(display=False) as counter:
        for length in LENGTHS:
            x = token_vectors(list(range(length)), weights, SHAPE, bidirectional=stage == "weak")
            if stage == "pretrain":
                x = x @ weights[EMBEDDING].T
            x.sum().backward()
    tokens, pairs = sum(LENGTHS), sum(length**2 for length in LENGTHS)
    config = _config(stage, tmp_path)
    assert step_flops(config, tokens, pairs, causal=False) == counter.get_total_flops()
    closed = sum(length * (length - 1) // 2 for length in LENGTHS)
    products = 3 * 2 * 2 * 72 * SHAPE.num_layers  # passes, q k^T and p v, FLOPs of each, heads' width, layers
    assert step_flops(config, tokens, pairs, causal=True) == counter.get_total_flops() - products * closed


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks_are_dense_and_by_the_whole_name(name: str, tflops: float) -> None:
    assert known_peak(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["Tesla T4", "NVIDIA A10G", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA RTX A1000"])
def test_an_unknown_chip_and_a_slice_of_one_have_no_peak(name: str) -> None:
    assert known_peak(name) is None


def test_a_given_peak_wins_and_a_cpu_has_none(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert peak_flops(_config("weak", tmp_path), cpu) is None
    assert peak_flops(_config("weak", tmp_path, peak_tflops=0.5), cpu) == 5e11
