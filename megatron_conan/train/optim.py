"""megatron-core's optimizer, learning-rate schedule and gradient buffers, from the config."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_conan.config import RunConfig
from megatron_conan.model.conan import ConanModel


def wrap_for_training(
    chunks: list[ConanModel], core: TransformerConfig, config: RunConfig
) -> list[DistributedDataParallel]:
    """Put the model chunks behind megatron-core's gradient buffers and tell the schedule how to finish gradients."""
    p = config.parallel
    modules: list[MegatronModule] = list(chunks)
    if config.train.precision == "bf16":
        modules = [Float16Module(core, chunk) for chunk in chunks]
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=p.overlap_grad_reduce,
        use_distributed_optimizer=p.distributed_optimizer,
    )
    wrapped = [DistributedDataParallel(core, ddp, module, disable_bucketing=i > 0) for i, module in enumerate(modules)]
    for module in wrapped:
        module.broadcast_params()
    core.finalize_model_grads_func = finalize_model_grads
    if p.overlap_grad_reduce:
        no_sync = [module.no_sync for module in wrapped]
        core.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        start_sync = [module.start_grad_sync for module in wrapped]
        if p.pipeline > 1:
            core.grad_sync_func = start_sync if len(start_sync) > 1 else start_sync[0]
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], core: TransformerConfig, config: RunConfig
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over the chunks' parameters (weight decay on matrices only) and its learning-rate schedule.

    The schedule is stepped before each update: step 1 of n warm-up steps trains at lr/n, and the last step of a decay to
    zero still trains at a little above zero.
    """
    o = config.optimizer
    bf16 = config.train.precision == "bf16"
    decoupled_lr = o.decoupled_lr if o.decoupled_lr != o.lr else None
    optimizer = get_megatron_optimizer(
        CoreOptimizerConfig(
            optimizer="adam",
            lr=o.lr,
            min_lr=o.min_lr,
            decoupled_lr=decoupled_lr,
            decoupled_min_lr=o.min_lr if decoupled_lr is not None else None,
            weight_decay=o.weight_decay,
            adam_beta1=o.beta1,
            adam_beta2=o.beta2,
            adam_eps=o.epsilon,
            clip_grad=o.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        ),
        chunks,
    )
    _tell_groups_apart(optimizer, decoupled_lr)
    core.grad_scale_func = optimizer.scale_loss
    steps = config.train.steps
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=max(o.lr, o.decoupled_lr or 0.0),
        min_lr=o.min_lr,
        lr_warmup_steps=min(round(o.warmup_fraction * steps), steps),
        lr_decay_steps=steps + 1,
        lr_decay_style=o.decay,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def _tell_groups_apart(optimizer: MegatronOptimizer, decoupled_lr: float | None) -> None:
    """Mark the parameter group of the embedding table, where it has a learning rate of its own.

    megatron-core 0.16.1 finds the groups of a checkpoint by this mark among others, and never sets it: two groups that differ
    in nothing else then take each other's place on resume.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.param_groups:
            group["is_decoupled_lr"] = decoupled_lr is not None and group["max_lr"] == decoupled_lr
