"""RMSNorm on a CPU against torch's own, value and gradient."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_conan.model.norm import RMSNorm


def test_equals_torch_value_and_gradient() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=48, num_attention_heads=4)
    norm = RMSNorm(config, 48, 1e-6)
    torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    for scale in (1e-3, 1.0, 1e3):
        x = (torch.randn(7, 3, 48) * scale).requires_grad_()
        g = torch.randn(7, 3, 48)
        found = torch.autograd.grad(norm(x), (x, norm.weight), g)
        expected_y = torch.nn.functional.rms_norm(x.double(), (48,), norm.weight.double(), 1e-6)
        expected = torch.autograd.grad(expected_y, (x, norm.weight), g.double())
        torch.testing.assert_close(norm(x).double(), expected_y, rtol=1e-5, atol=1e-6)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_zero_rows_are_finite() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    norm = RMSNorm(config, 8, 1e-6)
    x = torch.zeros(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert torch.isfinite(x.grad).all()
