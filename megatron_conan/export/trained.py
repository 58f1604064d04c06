"""A trained run, whole in a process: its model as a function from texts to vectors, and its export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_conan.config import RunConfig
from megatron_conan.config.tree import ParallelConfig, SoftMaskConfig
from megatron_conan.data.format import Formatter, TextKind
from megatron_conan.data.packing import PackedTexts
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.export.hf import ExportReport, ExportSettings, export_sentence_transformer
from megatron_conan.export.mapping import ModelShape
from megatron_conan.mining.encode import encode_texts
from megatron_conan.model.conan import ConanModel, build_model
from megatron_conan.model.mask import SoftMask
from megatron_conan.parallel.context import ParallelContext, build_context, initialize_distributed
from megatron_conan.train.checkpoint import load_weights
from megatron_conan.train.checkpoint_files import find_checkpoint, read_state
from megatron_conan.train.run_folder import read_config

ENCODE_TOKENS = 16384
"""Padded tokens of one encoding batch."""


@dataclass(frozen=True)
class TrainedRun:
    """A run's latest checkpoint, loaded whole into this process whatever layout it was trained in."""

    config: RunConfig
    checkpoint: Path
    step: int
    alpha: float
    """Opening of the soft mask at the checkpoint."""
    model: ConanModel
    tokenizer: Tokenizer
    context: ParallelContext

    @torch.no_grad()
    def embed_packed(self, micro_batches: Sequence[PackedTexts]) -> torch.Tensor:
        """[n of all micro-batches, e] unit vectors, fp32."""
        return torch.cat(
            [
                self.model(batch.tokens, batch.sequences, embed=True, prompt_lengths=batch.prompt_lengths)
                for batch in micro_batches
            ]
        )

    def embed(self, texts: Sequence[str], kind: TextKind = "document", prompt: str | None = None) -> np.ndarray:
        """Unit vectors [n, e] fp32, texts formatted and cut as in training.

        Args:
            prompt: name of the prompt before each text, none if there is no such prompt; that of `kind` if not given.
        """
        formatter = Formatter.of_run(self.config, self.tokenizer)
        name = kind if prompt is None else prompt

        return encode_texts(
            self.embed_packed,
            [formatter.format(ids, kind, name) for ids in self.tokenizer.encode_batch(texts)],
            self.context,
            width=self.config.embedding_dim,
            max_tokens=max(ENCODE_TOKENS, formatter.max_lengths[kind] + 8),
            pad_id=self.tokenizer.pad_id,
            prompt_length=len(formatter.prompt_tokens(name)),
        )


def load_run(run_dir: Path, *, every_rank: bool = False) -> TrainedRun:
    """Load a run folder (or one of its step_* folders) into this one process.

    Args:
        every_rank: load it whole into every process that torchrun started; all must call, and are data-parallel ranks.

    Raises:
        ValueError: if there is no run or no checkpoint, or several processes without `every_rank`.
    """
    checkpoint = find_checkpoint(run_dir)
    run = checkpoint.parent.parent
    state = read_state(checkpoint)
    trained = read_config(run)
    form = trained.soft_mask.form
    if form == "learned" and state["alpha"] < 1.0:
        raise ValueError(
            f"{checkpoint} was saved at alpha={state['alpha']} of a learned soft mask, which exists in training only; take "
            "the run's last checkpoint"
        )
    pooling = trained.pooling
    if not trained.is_contrastive:  # there is no projection in a language model
        pooling = pooling.model_copy(update={"projection_dim": None})
    mask = SoftMaskConfig(form="constant" if form == "learned" else form, schedule="constant", alpha=state["alpha"])
    config = trained.model_copy(
        update={
            "parallel": ParallelConfig(),
            "soft_mask": mask,
            "pooling": pooling,
            "model": trained.model.model_copy(update={"spec": "local"}),
            "train": trained.train.model_copy(update={"precision": "fp32"}),
        }
    )
    device = initialize_distributed()
    if dist.get_world_size() != 1 and not every_rank:
        raise ValueError(
            f"loading a trained run takes one process, not {dist.get_world_size()}; start it without torchrun"
        )
    context = build_context(config.parallel, device)
    soft_mask = SoftMask(config.soft_mask, config.train.steps, device)
    soft_mask.set(state["alpha"])
    chunks, _ = build_model(config, device, soft_mask, "embedding")
    load_weights(checkpoint, chunks, context)
    tokenizer = Tokenizer(config.tokenizer.model)
    if tokenizer.sha256 != state["tokenizer_sha256"]:
        raise ValueError(
            f"{run} was trained with another tokenizer (sha256 {state['tokenizer_sha256'][:12]}) than {config.tokenizer.model} "
            f"({tokenizer.sha256[:12]}) is now; put the old file back"
        )
    return TrainedRun(config, checkpoint, state["step"], state["alpha"], chunks[0].eval(), tokenizer, context)


def model_shape(config: RunConfig) -> ModelShape:
    """The shape that the weight table needs."""
    m = config.model
    return ModelShape(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.head_dim,
        ffn_hidden_size=m.ffn_hidden_size,
        vocab_size=m.vocab_size,
        rotary_base=m.rotary_base,
        norm_epsilon=m.norm_epsilon,
        projection_dim=config.pooling.projection_dim,
    )


def export_run(run: TrainedRun, out_dir: Path, verify_texts: Sequence[str]) -> ExportReport:
    """Write the run as a SentenceTransformer folder, checked against the trained model's own vectors.

    Raises:
        ValueError: if the mask is half open (0 < alpha < 1) or `out_dir` holds something else than an export.
        RuntimeError: if the stock libraries give other vectors than the trained model.
    """
    config = run.config
    settings = ExportSettings(
        tokenizer_path=config.tokenizer.model,
        alpha=run.alpha,
        pooling=config.pooling.mode,
        max_seq_length=config.max_document_length,
        max_query_length=config.max_query_length,
        prompts=config.prompts,
        include_prompt=config.pooling.include_prompt,
        matryoshka_dims=config.contrastive.matryoshka_dims or (),
        name=f"{run.checkpoint.parent.parent.name} (megatron_conan)",
    )
    return export_sentence_transformer(
        {
            name: value.float().cpu()
            for name, value in run.model.state_dict().items()
            if isinstance(value, torch.Tensor)
        },
        model_shape(config),
        settings,
        out_dir,
        verify_texts=verify_texts,
        reference=lambda texts, prompt: run.embed(texts, "document", prompt or ""),
    )
