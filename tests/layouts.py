"""Training runs in the worker pool: every parallel layout against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_conan.config import RunConfig, parse_config

TINY_MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
    "vocab_size": 512,
    "max_seq_length": 64,
}

VOLATILE = ("tokens_per_second", "memory_gib", "seconds")
"""Metrics that differ between two runs alike, and all that end in _seconds."""
LAYOUT_DEPENDENT = ("wasted_tokens", "attention_padding")
"""What texts cost depends on who embeds them together."""


def tiny_config(stage: str, files: dict[str, Path], run_dir: Path, **sections: Any) -> RunConfig:
    """A small run of a stage; `sections` are merged over the defaults here."""
    prefix = {"pretrain": "lm", "sft": "sft", "weak": "pairs", "finetune": "pairs"}[stage]
    lm = stage in ("pretrain", "sft")
    tree: dict[str, Any] = {
        "stage": stage,
        "run_dir": str(run_dir),
        "model": dict(TINY_MODEL),
        "tokenizer": {"model": str(files["tokenizer"])},
        "data": {"sources": [{"prefix": str(files[prefix])}], "seq_length": 32}
        if lm
        else {"sources": [{"prefix": str(files[prefix])}], "max_query_length": 24, "max_document_length": 48},
        "train": {"steps": 4, "micro_batch_size": 2 if lm else 8, "global_batch_size": 8},
        "optimizer": {"lr": 1e-3, "clip_grad": 0.5},
        "parallel": {},
        "checkpoint": {"asynchronous": False},  # no process more for every rank of every test
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return parse_config(tree, origin="test")


def deterministic(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without what differs between two runs alike: times and memory."""
    return {key: value for key, value in line.items() if key not in VOLATILE and not key.endswith("_seconds")}


def train_layout(config: RunConfig) -> dict[str, Any]:
    """Train step by step in this process's place of the world.

    Returns:
        losses and grad_norms of every step, and this rank's parameters and first two steps' gradients by global name.
    """
    from megatron_conan.train import loop

    trainer = build_test_trainer(config)
    losses: list[float] = []
    metrics: list[dict[str, float]] = []
    norms: list[float] = []
    gradients: dict[str, Any] = {}
    while trainer.step < config.train.steps:
        values = loop.one_step(trainer)
        losses.append(values["loss"])
        metrics.append({key: value for key, value in deterministic(values).items() if key != "grad_norm"})
        norms.append(values["grad_norm"])
        if trainer.step <= 2 and not config.parallel.distributed_optimizer:  # there a rank reduces its own part only
            found = by_global_name(trainer, lambda p: p.main_grad)
            gradients |= {f"step {trainer.step}: {name}": value for name, value in found.items()}
    return {
        "losses": losses,
        "metrics": metrics,
        "grad_norms": norms,
        "gradients": gradients,
        "weights": final_weights(trainer),
    }


def train_run(config: RunConfig) -> dict[str, Any]:
    """Train as `main.run` does, with metrics and checkpoints; returns this rank's weights by global name."""
    from megatron_conan.train import loop

    trainer = build_test_trainer(config)
    loop.train(trainer)
    return {"weights": final_weights(trainer)}


def final_weights(trainer: Any) -> dict[str, tuple[np.ndarray, int | None, int]]:
    """This rank's parameters by global name."""
    return by_global_name(trainer, lambda p: p.data)


def build_test_trainer(config: RunConfig) -> Any:
    """A trainer with all checks of `main.run`, in a process group that is there already."""
    from megatron_conan.config import check_config
    from megatron_conan.data.tokenizer import Tokenizer
    from megatron_conan.main import build_hooks
    from megatron_conan.parallel.context import build_context
    from megatron_conan.train import loop
    from megatron_conan.train.checkpoint import check_start
    from megatron_conan.train.run_folder import check_run_folder
    from megatron_conan.train.setup import Setup

    torch.manual_seed(torch.distributed.get_rank())  # nothing may depend on the global generator
    tokenizer = Tokenizer(config.tokenizer.model)
    check_config(config, torch.distributed.get_world_size())
    check_run_folder(config)
    check_start(config, tokenizer.sha256)
    setup = Setup(config, build_context(config.parallel), tokenizer)
    return loop.build_trainer(setup, build_hooks(setup))


def by_global_name(trainer: Any, value: Any) -> dict[str, tuple[np.ndarray, int | None, int]]:
    """global name -> (array, split dim or None, tp rank)."""
    from megatron_conan.model.conan import global_parameter_name
    from megatron_conan.train.checkpoint import unwrap

    found = {}
    for chunk in trainer.chunks:
        model = unwrap(chunk)
        for name, parameter in model.named_parameters():
            split = getattr(parameter, "tensor_model_parallel", False) and trainer.setup.context.tp_size > 1
            array = value(parameter).detach().float().clone().numpy()
            found[global_parameter_name(model, name)] = (
                array,
                parameter.partition_dim if split else None,
                trainer.setup.context.tp_rank,
            )
    return found


def assemble(ranks: list[dict[str, tuple[np.ndarray, int | None, int]]]) -> dict[str, np.ndarray]:
    """Whole tensors from the parts of all ranks; copies on several ranks must agree."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    dims: dict[str, int | None] = {}
    for rank in ranks:
        for name, (array, dim, tp_rank) in rank.items():
            dims[name] = dim
            key = 0 if dim is None else tp_rank
            if key in parts.setdefault(name, {}):
                np.testing.assert_allclose(parts[name][key], array, rtol=1e-5, atol=1e-7, err_msg=name)
            parts[name][key] = array
    whole = {}
    for name, by_rank in parts.items():
        ordered = [by_rank[i] for i in sorted(by_rank)]
        dim = dims[name]
        if dim is None:
            whole[name] = ordered[0]
        elif name.endswith("mlp.linear_fc1.weight"):  # a rank holds its part of [gate; up]
            halves = [np.split(array, 2, axis=dim) for array in ordered]
            whole[name] = np.concatenate([h[0] for h in halves] + [h[1] for h in halves], axis=dim)
        else:
            whole[name] = np.concatenate(ordered, axis=dim)
    return whole
