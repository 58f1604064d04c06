"""The exported folder gives the trained model's vectors, whatever layout the model was trained in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gloo_pool import WorkerPool
from layouts import tiny_config, train_run

TEXTS = ["abc def", "a", "padding " * 60, "Größe 北京 \n\t x", "mno pab cde fgh"]

ENCODE = """
import sys, json
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_conan", "megatron"):
            raise ImportError(name + " is not installed in this test")
sys.meta_path.insert(0, Block())
import numpy as np
from sentence_transformers import SentenceTransformer
texts = json.loads(sys.argv[2])
np.save(sys.argv[3], SentenceTransformer(sys.argv[1], device="cpu").encode(texts, batch_size=3))
"""


def _export_and_embed(run: Path, out: Path) -> Any:
    from megatron_conan.export.trained import export_run, load_run

    trained = load_run(run)
    report = export_run(trained, out, TEXTS)
    assert report.min_cosine > 0.99999
    return trained.embed(TEXTS)


def _live_vectors(config: Any) -> Any:
    """Train, then embed with the live model of all ranks."""
    from layouts import build_test_trainer

    from megatron_conan.evaluation.live import live_embedder
    from megatron_conan.train import loop

    trainer = build_test_trainer(config)
    loop.train(trainer)
    return live_embedder(trainer, 512)(TEXTS, "document")


def test_exported_equals_trained(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(
        "weak", tiny_data, tmp_path / "run", parallel={"tensor": 2}, soft_mask={"form": "row", "schedule": "linear"},
        contrastive={"temperature": 0.05},
    )  # fmt: skip
    live = workers.run(_live_vectors, 2, config)
    (loaded,) = workers.run(_export_and_embed, 1, tmp_path / "run", tmp_path / "export")
    np.testing.assert_array_equal(live[0], live[1])
    np.testing.assert_allclose(loaded, live[0], atol=2e-6)  # one process sums in another order than two
    out = tmp_path / "vectors.npy"

    subprocess.run(
        [sys.executable, "-I", "-c", ENCODE, str(tmp_path / "export"), json.dumps(TEXTS), str(out)], check=True
    )
    exported = np.load(out)
    cosine = (exported * live[0]).sum(axis=1) / np.linalg.norm(exported, axis=1) / np.linalg.norm(live[0], axis=1)
    assert cosine.min() > 0.99999


def _refused(run: Path, out: Path) -> str:
    from megatron_conan.export.trained import export_run, load_run

    try:
        export_run(load_run(run), out, TEXTS)
    except ValueError as error:
        return str(error)
    return ""


def test_a_half_open_mask_is_refused(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    mask = {"form": "constant", "schedule": "constant", "alpha": 0.5}
    workers.run(train_run, 1, tiny_config("weak", tiny_data, tmp_path / "run", soft_mask=mask))
    (message,) = workers.run(_refused, 1, tmp_path / "run", tmp_path / "export")
    assert "0.5" in message
    assert not (tmp_path / "export").exists()


def test_a_bf16_run_is_exported(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """Trained in bf16, loaded and exported in fp32: bf16 rounds to 3 digits, and the positions must not be rounded at all."""
    train = {"steps": 1, "micro_batch_size": 8, "global_batch_size": 8, "precision": "bf16"}
    opened = {"schedule": "constant", "alpha": 1.0}
    (live,) = workers.run(
        _live_vectors, 1, tiny_config("weak", tiny_data, tmp_path / "run", train=train, soft_mask=opened)
    )
    (loaded,) = workers.run(_export_and_embed, 1, tmp_path / "run", tmp_path / "export")
    np.testing.assert_allclose(loaded, live, atol=1e-2)


def _load_twice(run: Path) -> bool:
    from megatron_conan.export.trained import load_run

    first, second = load_run(run), load_run(run)
    return bool((first.embed(TEXTS) == second.embed(TEXTS)).all())


def test_a_run_is_loaded_twice_in_one_process(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    workers.run(train_run, 1, tiny_config("weak", tiny_data, tmp_path / "run", soft_mask={"schedule": "linear"}))
    assert workers.run(_load_twice, 1, tmp_path / "run") == [True]


def _load_and_embed(run: Path) -> Any:
    from megatron_conan.export.trained import load_run

    return load_run(run).embed(TEXTS)


def test_live_vectors_through_the_pipeline_equal_one_process(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """Texts go through mcore's schedule and the last stage's vectors come back to every rank."""
    config = tiny_config("pretrain", tiny_data, tmp_path / "run", parallel={"pipeline": 2})
    live = workers.run(_live_vectors, 2, config)
    (loaded,) = workers.run(_load_and_embed, 1, tmp_path / "run")
    np.testing.assert_array_equal(live[0], live[1])
    np.testing.assert_allclose(loaded, live[0], atol=2e-6)
