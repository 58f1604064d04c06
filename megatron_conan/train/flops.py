"""Model FLOPs of a training step, and the chip's peak: what `mfu` is made of.

Model FLOPs are those of the decoder's matrix products, once forward and twice backward (Narayanan et al. 2021, appendix;
Chowdhery et al. 2022, appendix B), of texts without padding. What is done again doesn't count, as in mfu, not hfu: the second
forward pass of a contrastive step whose batch doesn't fit at once, recomputed activations. Attention counts the scores that
the mask asks for: all l^2 of a text of length l where it is open at all, l (l + 1) / 2 where it is causal. Megatron-LM halves
as well (`num_floating_point_operations` in its training.py); Chowdhery et al. and torch's FlopCounterMode take l^2 always.

Left out: norms, rotations, softmax, and behind the pooling projection and similarities: with 8 documents a row, less than a
thousandth of a step of 16k rows of conan_1.4b.
"""

from __future__ import annotations

import torch

from megatron_conan.config import RunConfig

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GB200": 2500.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L20": 119.5,
    "L4": 121.0,
    "MI300X": 1307.4,
}
"""Chip as torch.cuda.get_device_name calls it -> dense bf16 peak in TFLOP/s.

From the data sheets of NVIDIA (which show twice that, with sparsity, since Hopper and Ada) and AMD. GeForce cards aren't here:
names hide what differs (laptops, 4090 D), and bf16 runs at half of the advertised fp16 rate.
"""


def peak_flops(config: RunConfig, device: torch.device) -> float | None:
    """Dense bf16 peak of a rank's chip in FLOP/s: `train.peak_tflops`, or what is known of the GPU; None if nothing is."""
    if config.train.peak_tflops is not None:
        return config.train.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """As `peak_flops`, by the device's name: the longest entry in it; None for a slice of a chip (MIG)."""
    if " MIG " in name:
        return None
    found = [chip for chip in PEAK_TFLOPS if f" {chip} " in f" {name.replace('-', ' ')} "]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


def step_flops(config: RunConfig, tokens: float, attended_pairs: float, *, causal: bool) -> float:
    """Model FLOPs of a step, forward and backward, over all ranks.

    Args:
        config: the run's.
        tokens: of all texts of the global batch.
        attended_pairs: sum of l^2 over its texts of length l.
        causal: whether the mask is closed above the diagonal.
    """
    m = config.model
    queries, keys = m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim
    # query, key, value; output; gate, up and down of SwiGLU
    a_layer = m.hidden_size * (queries + 2 * keys) + queries * m.hidden_size + 3 * m.hidden_size * m.ffn_hidden_size
    weights = m.num_layers * a_layer
    if not config.is_contrastive:
        weights += m.hidden_size * m.vocab_size
    scores = (attended_pairs + tokens) / 2 if causal else attended_pairs
    forward = 2.0 * weights * tokens + 4.0 * m.num_layers * queries * scores  # q k^T and p v
    return 3.0 * forward
