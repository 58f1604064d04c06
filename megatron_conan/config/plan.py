"""What a config amounts to, by arithmetic: nothing is built."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_conan.config.checks import data_parallel_size
from megatron_conan.config.tree import ModelConfig, RunConfig

GIB = 2**30


def count_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model: tied embedding, attention, SwiGLU, norms; no biases."""
    h, d = model.hidden_size, model.head_dim
    attention = h * d * (model.num_attention_heads + 2 * model.num_query_groups) + model.num_attention_heads * d * h
    feed_forward = 3 * h * model.ffn_hidden_size
    return model.vocab_size * h + model.num_layers * (attention + feed_forward + 2 * h) + h


@dataclass(frozen=True)
class Plan:
    """Sizes of a run on a number of ranks."""

    parameters: int
    dp: int
    num_micro_batches: int | None
    """Of a rank and step; None where it depends on the texts (`train.micro_batch_tokens`)."""
    state_gib: float
    """Weights, gradients and optimizer state of one rank in GiB (activations come on top)."""


def make_plan(config: RunConfig, world_size: int) -> Plan:
    """Work out the sizes; the config must have passed `check_config` for this world size."""
    p, t = config.parallel, config.train
    dp = data_parallel_size(config, world_size)
    parameters = count_parameters(config.model) + config.model.hidden_size * (config.pooling.projection_dim or 0)
    table = config.model.vocab_size * config.model.hidden_size  # whole on the first and on the last stage
    own = ((parameters - table) / p.pipeline + table) / p.tensor
    weights = 2 if t.precision == "bf16" else 4
    master = 4 if t.precision == "bf16" else 0
    optimizer = (8 + master) / (dp if p.distributed_optimizer else 1)
    state = own * (weights + 4 + optimizer)  # gradients are kept in fp32
    num_micro_batches = None if t.micro_batch_size is None else t.global_batch_size // (t.micro_batch_size * dp)
    return Plan(parameters, dp, num_micro_batches, state / GIB)


def format_plan(config: RunConfig, world_size: int) -> str:
    """The plan as text for a terminal."""
    plan, p, t = make_plan(config, world_size), config.parallel, config.train
    samples = t.steps * t.global_batch_size
    unit = "queries" if config.is_contrastive else "sequences"
    micro_batches = (
        f"micro-batches of up to {t.micro_batch_tokens:,} tokens"
        if t.micro_batch_tokens is not None
        else f"{plan.num_micro_batches} micro-batches of {t.micro_batch_size}"
    )
    lines = [
        f"stage            {config.stage} -> {config.run_dir}",
        f"parameters       {plan.parameters:,}",
        f"ranks            {world_size} = tensor {p.tensor} x pipeline {p.pipeline} x data {plan.dp}",
        f"step             {t.global_batch_size:,} {unit} = {micro_batches} x {plan.dp} data-parallel ranks",
        f"run              {t.steps:,} steps, {samples:,} {unit}",
        f"memory a rank    {plan.state_gib:.2f} GiB for weights, gradients and optimizer; activations come on top",
    ]
    if not config.is_contrastive:
        lines.insert(5, f"tokens           {samples * config.seq_length:,}")
    if config.mining is not None:
        when = f"every {config.mining.every:,} steps" if config.mining.at is None else f"after steps {config.mining.at}"
        lines.append(f"mining           {config.mining.count(t.steps)} times, {when}")
    return "\n".join(lines)
