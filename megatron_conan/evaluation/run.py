"""Runs mteb on an encoder or an exported folder and writes the scores as JSON."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks import AbsTask

from megatron_conan.evaluation.encoder import EmbeddingEncoder, load_folder_encoder
from megatron_conan.evaluation.random_state import keep_random_state
from megatron_conan.evaluation.tasks import load_task
from megatron_conan.train.run_folder import write_atomically


def run_mteb(
    encoder: EmbeddingEncoder | str | Path,
    tasks: Sequence[AbsTask | str | Path],
    out_dir: str | Path | None,
    *,
    details: dict[str, Any] | None = None,
    write: bool = True,
) -> dict[str, float]:
    """Scores the encoder on each task with mteb.

    All ranks of a live model must call this with the same tasks. The global random generators are left as they were.

    Args:
        encoder: an `EmbeddingEncoder` or an exported folder.
        tasks: mteb tasks, or what `load_task` takes (BEIR folder, STS jsonl, mteb task name).
        out_dir: where `TASK.json` goes, usually RUN/evaluation; None writes nothing.
        details: put into each JSON beside the scores: step, prompts, maximum lengths.
        write: False on all ranks but the first.

    Returns:
        Task name -> main score (nDCG@10 for retrieval, Spearman for STS), between 0 and 1.
    """
    with keep_random_state():
        if not isinstance(encoder, EmbeddingEncoder):
            encoder = load_folder_encoder(encoder)
        scores: dict[str, float] = {}
        for source in tasks:
            task = source if isinstance(source, AbsTask) else load_task(source)
            name = task.metadata.name
            if name in scores:
                raise ValueError(f"two tasks are called {name!r}: their results would overwrite each other; rename one")
            result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results[
                0
            ]
            scores[name] = float(result.get_score())
            if write and out_dir is not None:
                Path(out_dir).mkdir(parents=True, exist_ok=True)
                record = {
                    "task": name,
                    "main_score_name": task.metadata.main_score,
                    "main_score": scores[name],
                    "model": encoder.mteb_model_meta.name,
                    "revision": encoder.mteb_model_meta.revision,
                    "mteb_version": version("mteb"),
                    **(details or {}),
                    "scores": result.scores,
                }
                write_atomically(
                    Path(out_dir) / f"{name}.json",
                    json.dumps(record, indent=2, ensure_ascii=False, default=float) + "\n",
                )
    return scores
