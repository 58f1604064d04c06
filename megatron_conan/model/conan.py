"""The Conan decoder: tied embedding, soft-mask transformer layers, and an LM head or a pooled embedding.

Shapes: `b` micro-batch, `s` sequence, `h` hidden, `v` vocabulary of this tensor rank.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_conan.config import RunConfig
from megatron_conan.data.packing import PackedSequences
from megatron_conan.model.attention import check_attention
from megatron_conan.model.mask import SoftMask
from megatron_conan.model.pooling import pool_packed, pool_padded
from megatron_conan.model.spec import decoder_spec, transformer_config

Head = Literal["lm", "embedding"]

RESIDUAL_WRITERS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
"""Projections that write to the residual stream: they start smaller."""


class ConanModel(LanguageModule):
    """Decoder-only transformer: RMSNorm (pre-norm), RoPE, SwiGLU, GQA, no biases, tied embeddings.

    One instance is one pipeline stage (or model chunk). With head "lm" the last stage gives logits or per-token losses; with
    head "embedding" it gives pooled unit vectors and builds no output layer.
    """

    def __init__(
        self,
        config: RunConfig,
        core: TransformerConfig,
        soft_mask: SoftMask,
        head: Head,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        """Build this stage's modules with uninitialised weights; `build_model` fills them."""
        super().__init__(config=core)
        self.model_type = ModelType.encoder_or_decoder
        self.model_config, self.head, self.soft_mask = config.model, head, soft_mask
        self.pooling = config.pooling
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = head == "lm"
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                core, config.model.vocab_size, config.model.max_seq_length, position_embedding_type="none"
            )
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True  # for optimizer.decoupled_lr
        self.decoder = TransformerBlock(
            core,
            decoder_spec(config, core, soft_mask, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.output_layer = None
        if head == "lm" and post_process:
            self.output_layer = ColumnParallelLinear(
                core.hidden_size,
                config.model.vocab_size,
                config=core,
                init_method=core.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process,
                tp_group=self.tp_group,
            )
        if head == "lm":
            self.setup_embeddings_and_output_layer()
        self.projection = None
        if head == "embedding" and post_process and config.pooling.projection_dim is not None:
            # every tensor rank has the whole map, and gets the same gradient: pooled vectors are the same on all of them
            self.projection = torch.nn.Linear(
                core.hidden_size, config.pooling.projection_dim, bias=False, dtype=core.params_dtype
            )

    @property
    def embedding_dim(self) -> int:
        """Size of the embeddings that this head gives."""
        size = self.pooling.projection_dim if self.head == "embedding" else None
        return size or self.config.hidden_size

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Called by the pipeline schedule with the previous stage's activations, [s, b, h]."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | PackedSequences | None = None,
        labels: Tensor | None = None,
        embed: bool = False,
        prompt_lengths: Tensor | int = 0,
    ) -> Tensor:
        """Run this stage.

        Args:
            tokens: [b, s] int64; every pipeline stage gets them (later stages use the shape alone).
            lengths: [b] true lengths of right-padded rows; None where padding is harmless (causal, or none); or the n texts
                that are packed into b = 1 row.
            labels: [b, s] next tokens (head "lm", last stage).
            embed: give pooled embeddings from a model with head "lm" too.
            prompt_lengths: [b] or [n] tokens of each text's prompt, or one number for all.

        Returns:
            Not the last stage: activations [s, b, h] (s / tp under sequence parallelism).
            Head "embedding", or `embed`: [b, e] (packed: [n, e]) fp32, unit length.
            Head "lm": losses [b, s] fp32 if labels are given, else logits [s, b, v].
        """
        hidden = self.embedding(tokens, None) if self.pre_process else None
        hidden = self.decoder(hidden, attention_mask=lengths, rotary_pos_emb=self._rotary_angles(tokens, lengths))
        if not self.post_process:
            return hidden
        if embed or self.head == "embedding":
            assert lengths is not None
            if self.config.sequence_parallel:
                # The pooled vectors are the same on every tensor rank, and so is their gradient: it must not be summed.
                hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
            return self._pool(hidden, lengths, prompt_lengths)
        assert self.output_layer is not None
        logits, _ = self.output_layer(hidden, weight=self.shared_embedding_or_output_weight())
        if labels is None:
            return logits
        return self.compute_language_model_loss(labels, logits.float())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Tensors with their place in the whole model; without an output layer there is no tied copy to describe."""
        if self.head == "lm":
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)

    def _pool(self, hidden: Tensor, lengths: Tensor | PackedSequences, prompt_lengths: Tensor | int) -> Tensor:
        """[s, b, h] -> [b or n, e] fp32, unit length."""
        mode, include_prompt = self.pooling.mode, self.pooling.include_prompt
        if isinstance(lengths, PackedSequences):
            prompts = lengths.lengths.new_zeros(()) + prompt_lengths
            pooled = pool_packed(
                hidden[:, 0],  # [t, 1, h] -> [t, h]
                lengths.position,
                lengths.lengths,
                mode,
                prompts.expand(len(lengths.lengths)),
                include_prompt,
            )
        else:
            pooled = pool_padded(hidden, lengths, mode, prompt_lengths, include_prompt)
        if self.projection is not None:
            pooled = torch.nn.functional.linear(pooled, self.projection.weight.float())
        return torch.nn.functional.normalize(pooled, dim=-1)

    def _rotary_angles(self, tokens: Tensor, lengths: Tensor | PackedSequences | None) -> Tensor:
        """Angles [s, 1, 1, d] of the tokens' positions in their text, in the two-halves (NeoX, Llama) layout.

        Computed here in fp32: as a buffer megatron-core's bf16 wrapper would round them.
        """
        d, size = self.model_config.head_dim, tokens.shape[1]
        frequency = self.model_config.rotary_base ** (
            -torch.arange(0, d, 2, dtype=torch.float32, device=tokens.device) / d
        )
        position = torch.arange(size, dtype=torch.float32, device=tokens.device)
        if isinstance(lengths, PackedSequences):
            position = torch.nn.functional.pad(lengths.position.float(), (0, size - lengths.position.shape[0]))
        angles = torch.outer(position, frequency)  # [s, d / 2]
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def build_model(
    config: RunConfig, device: torch.device, soft_mask: SoftMask, head: Head
) -> tuple[list[ConanModel], TransformerConfig]:
    """Build this rank's model chunks with weights that do not depend on the layout.

    Returns:
        The chunks (one, or `parallel.virtual_pipeline`), and megatron-core's config that they share.

    Raises:
        ValueError: if `attention.backend` can't compute this model's attention.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    check_attention(config, device)
    model_parallel_cuda_manual_seed(config.train.seed)
    core = transformer_config(config, device)
    num_chunks = config.parallel.virtual_pipeline or 1
    chunks = []
    for i in range(num_chunks):
        vp_stage = i if config.parallel.virtual_pipeline else None
        chunk = ConanModel(
            config,
            core,
            soft_mask,
            head,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        initialize_parameters(chunk, config)
        chunks.append(chunk.to(device))
    return chunks, core


def global_parameter_name(model: ConanModel, name: str) -> str:
    """The parameter's name in the whole model: layers counted over all pipeline stages, the tied head as the embedding."""
    if name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    index, _, rest = name[len(prefix) :].partition(".")
    return f"{prefix}{model.decoder.layers[int(index)].layer_number - 1}.{rest}"


@torch.no_grad()
def initialize_parameters(model: ConanModel, config: RunConfig) -> None:
    """Draw each parameter from a generator seeded by (seed, its global name), whole, and keep this rank's part.

    So every layout starts from the same weights. Norm weights are 1; theta of the learned soft mask keeps its start.
    """
    m = config.model
    residual_scale = m.residual_init_scale if m.residual_init_scale is not None else 1.0 / math.sqrt(2 * m.num_layers)
    for local_name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        name = global_parameter_name(model, local_name)
        std = m.init_std
        if name == "embedding.word_embeddings.weight" and m.embedding_init_std is not None:
            std = m.embedding_init_std
        if name.endswith(RESIDUAL_WRITERS):
            std *= residual_scale
        seed = int.from_bytes(hashlib.sha256(f"{config.train.seed}/{name}".encode()).digest()[:8], "big") >> 1
        shape = list(parameter.shape)
        size, rank = model.tp_group.size(), model.tp_group.rank()
        split = size > 1 and getattr(parameter, "tensor_model_parallel", False)
        dim = parameter.partition_dim if split else 0
        if split:
            shape[dim] *= size
        whole = torch.empty(shape, dtype=torch.float32)
        whole.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
        parameter.copy_(_local_part(whole, name, dim, rank, size) if split else whole)


def _local_part(whole: Tensor, name: str, dim: int, rank: int, size: int) -> Tensor:
    """This tensor rank's slice; linear_fc1 is [gate; up], and a rank holds its part of both."""
    if name.endswith("mlp.linear_fc1.weight"):
        return torch.cat([half.chunk(size, dim)[rank] for half in whole.chunk(2, dim)], dim)
    return whole.chunk(size, dim)[rank]
