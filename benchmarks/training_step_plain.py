"""The decoder in plain PyTorch, and a plain training step around it: what our step is measured against.

Written as one would without any framework: fused q/k/v and gate/up products, torch's attention, norm, cross-entropy, clipping
and AdamW, the latter in each of the forms that torch has. Imports torch alone.

Shapes: `b` texts, `s` tokens of the longest, `h` hidden, `n` heads, `g` key/value heads, `d` head dim, `e` embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_seq_length: int
    rotary_base: float
    norm_epsilon: float


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
        self.heads, self.groups, self.d = shape.num_attention_heads, shape.num_query_groups, d
        self.attention_norm = nn.RMSNorm(h, shape.norm_epsilon)
        self.qkv = nn.Linear(h, (self.heads + 2 * self.groups) * d, bias=False)
        self.out = nn.Linear(self.heads * d, h, bias=False)
        self.mlp_norm = nn.RMSNorm(h, shape.norm_epsilon)
        self.gate_up = nn.Linear(h, 2 * f, bias=False)
        self.down = nn.Linear(f, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """[b, s, h] -> [b, s, h]; causal without a mask."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.d)).transpose(1, 2)  # [b, n + 2 g, s, d]
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=1)
        attended = functional.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        x = x + self.out(attended.transpose(1, 2).flatten(2))  # [b, n, s, d] -> [b, s, n * d]
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [b, n, s, d] by [s, d], in the two-halves layout."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class PlainDecoder(nn.Module):
    """Tied embedding, layers, norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.norm_epsilon)
        frequency = shape.rotary_base ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.outer(torch.arange(shape.max_seq_length), frequency).repeat(1, 2)  # [s, d]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b, s] -> [b, s, h]; causal, or as the boolean mask [b, 1, 1, s] says."""
        x, s = self.embedding(tokens), tokens.shape[1]
        cos, sin = self.cos[:s], self.sin[:s]
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)

    def next_token_loss(self, tokens: Tensor, labels: Tensor, chunked: bool) -> Tensor:
        """Mean over [b, s] tokens; `chunked`: without ever holding all logits, as torch 2.13 can."""
        hidden, weight, labels = self(tokens).flatten(0, 1), self.embedding.weight, labels.flatten()  # -> [b * s, h]
        if chunked:
            return functional.linear_cross_entropy(hidden, weight, labels, options=nn.LinearCrossEntropyOptions())
        return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)

    def embed(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[b, s] right-padded texts, attended in both directions -> [b, e] mean of the tokens, unit length."""
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # [b, s]
        hidden = self(tokens, valid[:, None, None, :]).float()
        pooled = (hidden * valid[..., None]).sum(dim=1) / lengths[:, None]
        return functional.normalize(pooled, dim=-1)

    @torch.no_grad()
    def take(self, weights: dict[str, Tensor]) -> None:
        """Copy weights that have megatron-core's names and layout."""
        names = {
            "embedding.weight": "embedding.word_embeddings.weight",
            "norm.weight": "decoder.final_layernorm.weight",
        }
        inner = {
            "attention_norm": "input_layernorm",
            "qkv": "self_attention.linear_qkv",
            "out": "self_attention.linear_proj",
            "mlp_norm": "pre_mlp_layernorm",
            "gate_up": "mlp.linear_fc1",
            "down": "mlp.linear_fc2",
        }
        for name, parameter in self.named_parameters():
            if name in names:
                parameter.copy_(weights[names[name]])
                continue
            _, i, part, _ = name.split(".")
            value, layer = weights[f"decoder.layers.{i}.{inner[part]}.weight"], self.layers[int(i)]
            if part == "qkv":  # megatron-core has the rows of each group together: its queries, its key, its value
                rows = value.unflatten(0, (layer.groups, -1, layer.d))  # [g, n / g + 2, d, h]
                q, k, v = rows[:, :-2], rows[:, -2], rows[:, -1]
                value = torch.cat([q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)])
            parameter.copy_(value)


def info_nce(query: Tensor, document: Tensor, temperature: float) -> Tensor:
    """Mean of both directions, in the batch; row i of `query` [b, e] belongs to row i of `document`."""
    scores = query @ document.T / temperature
    labels = torch.arange(len(scores), device=scores.device)
    return 0.5 * (functional.cross_entropy(scores, labels) + functional.cross_entropy(scores.T, labels))


@dataclass(frozen=True)
class Update:
    """AdamW's settings."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float


@dataclass(frozen=True)
class Form:
    """Which of torch's implementations are taken."""

    adamw: str = "fused"
    """fused, foreach or forloop."""
    chunked_head: bool = False

    def __str__(self) -> str:
        return f"{self.adamw} AdamW" + (", chunked head" if self.chunked_head else "")


def forms(with_head: bool) -> list[Form]:
    """All that this torch has; `with_head`: of language models."""
    heads = [False, True] if with_head and hasattr(nn, "LinearCrossEntropyOptions") else [False]
    return [Form(adamw, chunked) for chunked in heads for adamw in ("fused", "foreach", "forloop")]


class PlainTraining:
    """Model and optimizer. On a GPU the products are in bf16 (autocast), weights and their update in fp32."""

    def __init__(self, model: PlainDecoder, update: Update, form: Form) -> None:
        self.model, self.clip_grad, self.form = model, update.clip_grad, form
        matrices, vectors = ([p for p in model.parameters() if (p.dim() == 2) is wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": update.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        flags = {"fused": form.adamw == "fused", "foreach": form.adamw == "foreach"}
        self.optimizer = torch.optim.AdamW(groups, lr=update.lr, betas=update.betas, eps=update.eps, **flags)
        self.on_gpu = model.embedding.weight.is_cuda

    def language_step(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """(tokens, labels) of micro-batches of one size -> the mean loss before the update."""
        losses = []
        for tokens, labels in micro_batches:
            with torch.autocast("cuda", torch.bfloat16, enabled=self.on_gpu):
                loss = self.model.next_token_loss(tokens, labels, self.form.chunked_head) / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
        self._update()
        return torch.stack(losses).sum().item()

    def contrastive_step(
        self, queries: tuple[Tensor, Tensor], documents: tuple[Tensor, Tensor], temperature: float
    ) -> float:
        """(tokens, lengths) of queries and of their documents -> the loss before the update."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.on_gpu):
            query, document = self.model.embed(*queries), self.model.embed(*documents)
        loss = info_nce(query.float(), document.float(), temperature)
        loss.backward()
        self._update()
        return loss.item()

    def _update(self) -> None:
        if self.clip_grad > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
