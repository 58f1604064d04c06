"""Checks across fields of a config, run on every rank before any heavy work."""

from __future__ import annotations

from megatron_conan.config.tree import RunConfig


def check_config(config: RunConfig, world_size: int) -> None:
    """Refuse sizes that do not fit together.

    Args:
        config: the run's config.
        world_size: number of ranks.

    Raises:
        ValueError: what, the values, and the remedy.
    """
    _check_ranks(config, world_size)
    _check_model(config)
    _check_batch(config, world_size)
    _check_source_names(config)
    _check_stage(config)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Ranks that hold different data: world size / (tensor x pipeline)."""
    return world_size // (config.parallel.tensor * config.parallel.pipeline)


def _check_ranks(config: RunConfig, world_size: int) -> None:
    p = config.parallel
    block = p.tensor * p.pipeline
    if world_size % block:
        raise ValueError(
            f"{world_size} ranks are not divisible by parallel.tensor={p.tensor} x parallel.pipeline={p.pipeline} = "
            f"{block}; start a multiple of {block} processes (torchrun --nproc-per-node) or change parallel.*"
        )
    if p.sequence and p.tensor == 1:
        raise ValueError("parallel.sequence=true needs parallel.tensor > 1: it splits activations over tensor ranks")
    if p.virtual_pipeline is not None and p.pipeline == 1:
        raise ValueError(f"parallel.virtual_pipeline={p.virtual_pipeline} needs parallel.pipeline > 1")


def _check_model(config: RunConfig) -> None:
    m, p = config.model, config.parallel
    if m.kv_channels is None and m.hidden_size % m.num_attention_heads:
        raise ValueError(
            f"model.hidden_size={m.hidden_size} is not divisible by model.num_attention_heads={m.num_attention_heads}; "
            "give model.kv_channels (the size of one head) or change one of them"
        )
    if m.head_dim % 2:
        raise ValueError(f"model.kv_channels={m.head_dim} must be even: rotary embeddings turn pairs of channels")
    if m.num_attention_heads % m.num_query_groups:
        raise ValueError(
            f"model.num_attention_heads={m.num_attention_heads} is not divisible by "
            f"model.num_query_groups={m.num_query_groups}"
        )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        if getattr(m, name) % p.tensor:
            raise ValueError(f"model.{name}={getattr(m, name)} is not divisible by parallel.tensor={p.tensor}")
    chunks = p.pipeline * (p.virtual_pipeline or 1)
    if m.num_layers % chunks:
        raise ValueError(
            f"model.num_layers={m.num_layers} is not divisible by parallel.pipeline={p.pipeline} x "
            f"parallel.virtual_pipeline={p.virtual_pipeline or 1} = {chunks}"
        )
    if p.sequence and config.seq_length % p.tensor:
        raise ValueError(f"data.seq_length={config.seq_length} is not divisible by parallel.tensor={p.tensor}")
    for name in ("seq_length", "max_query_length", "max_document_length"):
        if getattr(config, name) > m.max_seq_length:
            raise ValueError(
                f"data.{name}={getattr(config, name)} is longer than model.max_seq_length={m.max_seq_length}"
            )


def _check_batch(config: RunConfig, world_size: int) -> None:
    t, o = config.train, config.optimizer
    if o.min_lr > min(o.lr, o.decoupled_lr or o.lr):
        raise ValueError(
            f"optimizer.min_lr={o.min_lr} is above the peak rate (lr={o.lr}, decoupled_lr={o.decoupled_lr})"
        )
    dp = data_parallel_size(config, world_size)
    if config.is_contrastive and t.micro_batch_tokens is not None:
        _check_micro_batch_tokens(config)
        return
    if t.micro_batch_tokens is not None:
        raise ValueError(
            f"train.micro_batch_tokens={t.micro_batch_tokens} is for the contrastive stages; stage={config.stage} takes "
            "sequences of one length: set train.micro_batch_size"
        )
    if t.micro_batch_size is None:
        either = " or train.micro_batch_tokens" if config.is_contrastive else ""
        raise ValueError(f"train.micro_batch_size{either} is required and missing")
    step = t.micro_batch_size * dp
    if t.global_batch_size % step:
        below, above = t.global_batch_size // step * step, -(-t.global_batch_size // step) * step
        remedy = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"train.global_batch_size={t.global_batch_size} must be divisible by train.micro_batch_size="
            f"{t.micro_batch_size} x dp={dp} = {step}; use {remedy}"
        )
    num_micro_batches = t.global_batch_size // step
    if not config.is_contrastive and config.parallel.virtual_pipeline and num_micro_batches % config.parallel.pipeline:
        raise ValueError(
            f"the interleaved schedule needs a number of micro-batches ({num_micro_batches}) divisible by "
            f"parallel.pipeline={config.parallel.pipeline}; change train.global_batch_size"
        )


def _check_micro_batch_tokens(config: RunConfig) -> None:
    t = config.train
    assert t.micro_batch_tokens is not None
    if t.micro_batch_size is not None:
        raise ValueError(
            f"train.micro_batch_size={t.micro_batch_size} and train.micro_batch_tokens={t.micro_batch_tokens} exclude each "
            "other; give one"
        )
    longest = max(config.max_query_length, config.max_document_length)
    if t.micro_batch_tokens < longest:
        raise ValueError(
            f"train.micro_batch_tokens={t.micro_batch_tokens} is below one text of {longest} tokens "
            "(data.max_query_length, data.max_document_length); raise it, or shorten those"
        )


def _check_source_names(config: RunConfig) -> None:
    labels = [source.label for source in config.data.sources]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise ValueError(
                f"data.sources.{labels.index(label)} and data.sources.{i} are both called {label!r}; give one a name "
                f"(data.sources.{i}.name)"
            )


def _check_stage(config: RunConfig) -> None:
    if not config.is_contrastive:
        if config.mining is not None:
            raise ValueError(f"section mining is for the contrastive stages, not for stage={config.stage}; remove it")
        if config.soft_mask.schedule != "constant" or config.soft_mask.alpha != 0.0:
            raise ValueError(
                f"stage={config.stage} trains next-token prediction and must stay causal; remove the soft_mask section"
            )
        sized = [str(source.prefix) for source in config.data.sources if source.batch_size is not None]
        if sized:
            raise ValueError(
                f"data.sources: batch_size of {', '.join(sized)} is for the contrastive stages; set train.global_batch_size"
            )
        if config.pooling.projection_dim is not None:
            raise ValueError(
                f"pooling.projection_dim is trained in the contrastive stages, not in stage={config.stage}; remove it"
            )
        return
    _check_losses(config)
    _check_prompts(config)
    if config.soft_mask.form == "learned" and config.stage != "weak":
        raise ValueError("soft_mask.form=learned is trained in stage=weak only; finetune runs at the final alpha")
    if config.mining is not None and config.contrastive.num_hard_negatives == 0:
        raise ValueError("section mining needs contrastive.num_hard_negatives > 0; set it, or remove the section")
    if config.mining is not None and config.mining.pool_size < config.contrastive.num_hard_negatives:
        raise ValueError(
            f"mining.pool_size={config.mining.pool_size} is smaller than "
            f"contrastive.num_hard_negatives={config.contrastive.num_hard_negatives}"
        )
    if config.mining is not None:
        _check_mining(config)


def _check_mining(config: RunConfig) -> None:
    mining = config.mining
    assert mining is not None
    if mining.every is None and mining.at is None:
        raise ValueError("section mining doesn't say when to mine; give mining.every or mining.at")
    if mining.every is not None and mining.at is not None:
        raise ValueError(f"mining.every={mining.every} and mining.at={mining.at} exclude each other; give one")
    if mining.at is not None and (sorted(set(mining.at)) != mining.at or not mining.at):
        raise ValueError(f"mining.at={mining.at} must hold rising numbers of steps, none twice")
    if mining.at is not None and mining.at[-1] >= config.train.steps:
        raise ValueError(
            f"mining.at={mining.at} goes beyond train.steps={config.train.steps}: no step would use that mining"
        )
    if mining.window <= mining.skip_top:
        raise ValueError(
            f"mining.window={mining.window} leaves nothing after mining.skip_top={mining.skip_top}; widen the window"
        )
    if mining.pool_size > mining.window - mining.skip_top:
        raise ValueError(
            f"mining.pool_size={mining.pool_size} is more than the {mining.window - mining.skip_top} documents from "
            f"mining.skip_top={mining.skip_top} to mining.window={mining.window}; widen the window, or lower the pool size"
        )
    if mining.margin is not None and (mining.margin < 0 or (mining.margin_kind == "relative" and mining.margin > 1)):
        raise ValueError(
            f"mining.margin={mining.margin} must be a share of the positive's score, 0 to 1 (or, with "
            "mining.margin_kind=absolute, a distance of at least 0)"
        )
    if mining.rule == "v1" and mining.pool_size < mining.rule_offset + config.contrastive.num_hard_negatives:
        raise ValueError(
            f"mining.pool_size={mining.pool_size} holds no replacement: mining.rule=v1 takes those from mining.rule_offset="
            f"{mining.rule_offset} on, contrastive.num_hard_negatives={config.contrastive.num_hard_negatives} at a time"
        )
    longest = max(config.max_query_length, config.max_document_length)
    if mining.max_tokens < longest:
        raise ValueError(
            f"mining.max_tokens={mining.max_tokens} is below one text of {longest} tokens; use at least {longest}"
        )


def _check_prompts(config: RunConfig) -> None:
    for i, source in enumerate(config.data.sources):
        for key in ("query_prompt", "document_prompt"):
            name = getattr(source, key)
            if name and name not in config.prompts:
                raise ValueError(
                    f"data.sources.{i}.{key}={name} is not among the prompts ({', '.join(config.prompts) or 'none'}); add "
                    f"prompts.{name}, or write {key}='' for none"
                )


def _check_losses(config: RunConfig) -> None:
    c = config.contrastive
    if c.matryoshka_weights is not None and len(c.matryoshka_weights) != len(c.matryoshka_dims or []):
        raise ValueError(
            f"contrastive.matryoshka_weights={c.matryoshka_weights} must have one weight for each of "
            f"contrastive.matryoshka_dims={c.matryoshka_dims}"
        )
    dims, width = c.matryoshka_dims or [], config.embedding_dim
    if len(set(dims)) < len(dims) or max(dims, default=width) > width:
        raise ValueError(
            f"contrastive.matryoshka_dims={dims} must be distinct sizes of at most {width}, the embedding's own "
            "(model.hidden_size or pooling.projection_dim)"
        )
    if len(set(c.in_batch_negatives)) < len(c.in_batch_negatives):
        raise ValueError(f"contrastive.in_batch_negatives={c.in_batch_negatives} names one twice; each counts once")
    if not c.in_batch_negatives and c.num_hard_negatives == 0:
        raise ValueError(
            "contrastive.in_batch_negatives=[] with contrastive.num_hard_negatives=0 leaves queries without a negative; "
            "set one of them"
        )
