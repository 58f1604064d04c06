"""The exported folder gives the trained model's vectors, whatever layout the model was trained in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gloo_pool import WorkerPool
from layouts import tiny_config, train_run

TEXTS = ["abc def", "a", "Größe 北京 \n\t x", "mno pab cde fgh", "padding " * 60]
PROMPTS = {"query": "find:\n", "document": "text\n", "sts": "same?\n"}
INPUTS = {
    "query": ("query", None),
    "document": ("document", None),
    "sts": ("document", "sts"),
    "plain": ("document", ""),
}
"""Kind and name of the prompt, for the live model, and what the export calls it."""

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
model = SentenceTransformer(sys.argv[1], device="cpu")
vectors = {"plain": model.encode(texts, batch_size=3), "query": model.encode_query(texts, batch_size=3),
           "document": model.encode_document(texts, batch_size=3)}
if "sts" in model.prompts:
    vectors["sts"] = model.encode(texts, prompt_name="sts", batch_size=3)
np.savez(sys.argv[3], **vectors)
"""


def _export_and_embed(run: Path, out: Path) -> Any:
    from megatron_conan.export.trained import export_run, load_run

    trained = load_run(run)
    report = export_run(trained, out, TEXTS)
    assert report.min_cosine > 0.99999
    return _all_inputs(trained.embed)


def _all_inputs(embed: Any) -> dict[str, Any]:
    return {name: embed(TEXTS, kind, prompt) for name, (kind, prompt) in INPUTS.items()}


def _live_vectors(config: Any) -> Any:
    """Train, then embed with the live model of all ranks."""
    from layouts import build_test_trainer

    from megatron_conan.evaluation.live import live_embedder
    from megatron_conan.train import loop

    trainer = build_test_trainer(config)
    loop.train(trainer)
    return _all_inputs(live_embedder(trainer, 512))


@pytest.mark.parametrize(
    ("parallel", "pooling", "contrastive", "prompts"),
    [
        pytest.param({"tensor": 2}, {}, {}, {}, marks=pytest.mark.full),
        ({"tensor": 2, "sequence": True}, {"mode": "mean", "include_prompt": False}, {}, PROMPTS),
        (
            {},
            {"mode": "weighted_mean", "include_prompt": False, "projection_dim": 24},
            {"matryoshka_dims": [8, 24]},
            PROMPTS,
        ),
        ({"pipeline": 2}, {"mode": "last", "projection_dim": 24}, {}, PROMPTS),
    ],
    ids=["mean", "mean without prompt", "weighted mean projected", "last projected"],
)
def test_exported_equals_trained(
    workers: WorkerPool,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    parallel: dict[str, Any],
    pooling: dict[str, Any],
    contrastive: dict[str, Any],
    prompts: dict[str, str],
) -> None:
    config = tiny_config(
        "weak", tiny_data, tmp_path / "run", parallel=parallel, soft_mask={"form": "row", "schedule": "linear"},
        contrastive={"temperature": 0.05, **contrastive}, pooling=pooling, prompts=prompts,
        data={"max_query_length": 32}, train={"micro_batch_size": 4},
    )  # fmt: skip
    live = workers.run(_live_vectors, 2, config)
    (loaded,) = workers.run(_export_and_embed, 1, tmp_path / "run", tmp_path / "export")
    for name in INPUTS:
        assert loaded[name].shape == (len(TEXTS), config.embedding_dim)
        np.testing.assert_array_equal(live[0][name], live[1][name])
        np.testing.assert_allclose(loaded[name], live[0][name], atol=2e-6)  # one process sums in another order
    out = tmp_path / "vectors.npz"
    subprocess.run(
        [sys.executable, "-I", "-c", ENCODE, str(tmp_path / "export"), json.dumps(TEXTS), str(out)], check=True
    )
    for name, exported in np.load(out).items():
        cosine = (exported * live[0][name]).sum(axis=1)
        if name == "query":  # the last text is longer than max_query_length, which an export doesn't know
            assert cosine[-1] < 0.9999
            cosine = cosine[:-1]
        assert cosine.min() > 0.99999, name
        changed = (exported * live[0]["plain"]).sum(axis=1)[:-1]
        assert bool(changed.max() < 0.9999) == (bool(prompts) and name != "plain"), name
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "| longest query | 32 tokens in training, but 48 here" in card
    assert ("Matryoshka sizes | 8, 24" in card) == ("matryoshka_dims" in contrastive)


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
    for name in INPUTS:
        np.testing.assert_allclose(loaded[name], live[name], atol=1e-2)


def _load_twice(run: Path) -> bool:
    from megatron_conan.export.trained import load_run

    first, second = load_run(run), load_run(run)
    return bool((first.embed(TEXTS) == second.embed(TEXTS)).all())


def test_a_run_is_loaded_twice_in_one_process(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    workers.run(train_run, 1, tiny_config("weak", tiny_data, tmp_path / "run", soft_mask={"schedule": "linear"}))
    assert workers.run(_load_twice, 1, tmp_path / "run") == [True]


def _load_and_embed(run: Path) -> Any:
    from megatron_conan.export.trained import load_run

    return _all_inputs(load_run(run).embed)


def test_live_vectors_through_the_pipeline_equal_one_process(
    workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """Texts go through mcore's schedule and the last stage's vectors come back to every rank."""
    config = tiny_config("pretrain", tiny_data, tmp_path / "run", parallel={"pipeline": 2})
    live = workers.run(_live_vectors, 2, config)
    (loaded,) = workers.run(_load_and_embed, 1, tmp_path / "run")
    for name in INPUTS:
        np.testing.assert_array_equal(live[0][name], live[1][name])
        np.testing.assert_allclose(loaded[name], live[0][name], atol=2e-6)
