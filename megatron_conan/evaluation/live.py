"""Evaluation of the live model inside a run, on all ranks together."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_conan.data.format import TextKind
from megatron_conan.evaluation.retrieval import EmbedTexts, RetrievalResult, evaluate_retrieval
from megatron_conan.mining.encode import encode_texts
from megatron_conan.train.loop import Trainer
from megatron_conan.train.pair_data import pad_multiple
from megatron_conan.train.run_folder import write_atomically
from megatron_conan.train.step import evaluating


def live_embedder(trainer: Trainer, max_tokens: int) -> EmbedTexts:
    """A function from strings to vectors by the live model, formatted as in training.

    All ranks must call it with the same texts; all get all vectors.
    """
    config, context = trainer.setup.config, trainer.setup.context
    tokenizer, formatter = trainer.setup.tokenizer, trainer.setup.formatter

    def embed(texts: list[str], kind: TextKind, prompt: str | None = None) -> np.ndarray:
        name = kind if prompt is None else prompt
        sequences = [formatter.format(ids, kind, name) for ids in tokenizer.encode_batch(texts)]
        with evaluating(trainer.chunks):
            return encode_texts(
                trainer.embed,
                sequences,
                context,
                width=config.embedding_dim,
                max_tokens=max_tokens,
                pad_id=tokenizer.pad_id,
                pad_multiple=pad_multiple(config.parallel.tensor),
                prompt_length=len(formatter.prompt_tokens(name)),
            )

    return embed


class EvaluationHook:
    """Scores retrieval on `evaluation.data` after the last step (and before the first, if asked)."""

    def before_step(self, trainer: Trainer, step: int) -> dict[str, float]:
        """Evaluate the start, if configured."""
        evaluation = trainer.setup.config.evaluation
        assert evaluation is not None
        if step == 1 and evaluation.at_start:
            self._evaluate(trainer, 0)
        return {}

    def after_training(self, trainer: Trainer) -> None:
        """Evaluate the end, unless that was done before."""
        context = trainer.setup.context
        # rank 0 decides: what another node sees of a shared folder may be older
        done = torch.tensor(int(self._file(trainer, trainer.step).exists()), device=context.device)
        dist.broadcast(done, 0, group=context.world_group)
        if not done.item():
            self._evaluate(trainer, trainer.step)

    def state(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def restore(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Nothing to take over."""

    def _evaluate(self, trainer: Trainer, step: int) -> None:
        evaluation = trainer.setup.config.evaluation
        assert evaluation is not None
        started = time.monotonic()
        result = evaluate_retrieval(live_embedder(trainer, evaluation.max_tokens), evaluation.data)
        if trainer.setup.context.rank == 0:
            summary = summarise(result)
            file = self._file(trainer, step)
            file.parent.mkdir(parents=True, exist_ok=True)
            seconds = time.monotonic() - started
            write_atomically(file, json.dumps({"step": step, "seconds": seconds, **summary}) + "\n")
            low, high = summary["ndcg_interval"]
            print(
                f"nDCG@{result.k} on {result.name} after step {step}: {result.mean_ndcg:.4f} [{low:.4f}, {high:.4f}], "
                f"recall@{result.k} {result.mean_recall:.4f}, {len(result.query_ids):,} queries over "
                f"{result.num_documents:,} documents, {seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )

    def _file(self, trainer: Trainer, step: int) -> Any:
        return trainer.setup.config.run_dir / "evaluation" / f"step_{step:08d}.json"


def summarise(result: RetrievalResult) -> dict[str, Any]:
    """The result as JSON values: means, bootstrap interval, and every query's score."""
    return {
        "name": result.name,
        "k": result.k,
        "num_documents": result.num_documents,
        "ndcg": result.mean_ndcg,
        "ndcg_interval": list(result.ndcg_interval()),
        "recall": result.mean_recall,
        "queries": dict(zip(result.query_ids, result.ndcg.tolist(), strict=True)),
    }
