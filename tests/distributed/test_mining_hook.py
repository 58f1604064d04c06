"""Minings and replacements inside the training loop, against plain recomputation with the same weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from gloo_pool import WorkerPool
from layouts import build_test_trainer, tiny_config, train_run

from megatron_conan.config import RunConfig
from megatron_conan.data.format import TextKind
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.mining.table import NegativesTable
from megatron_conan.train.run_folder import check_run_folder

SWAPS = {"margin": None, "low_score": 0.0, "drop_ratio": 1.0001, "high_score": 1.1, "pool_size": 4, "window": 30}
BLOCKS = {**SWAPS, "rule": "v1", "rule_offset": 1, "rule_every": 5, "pool_size": 9}
PROMPTS = {"question": "abc\n", "passage": "def\n"}
PROMPTED = {"prompts": PROMPTS, "none": dict.fromkeys(PROMPTS, "")}
Told = list[tuple[tuple[int, int], float]]
"""((row, slot), similarity with the query) of negatives."""
MAX_LENGTH: dict[TextKind, int] = {"query": 24, "document": 48}


def _config(files: dict[str, Path], run: Path, *sources: str, **sections: Any) -> RunConfig:
    return tiny_config(
        "finetune",
        files,
        run,
        **{
            "data": {"sources": [{"prefix": str(files[source])} for source in sources or ("pairs",)]},
            "contrastive": {"temperature": 0.05, "num_hard_negatives": 2},
            "soft_mask": {"schedule": "constant", "alpha": 1.0},
            "train": {"steps": 4, "micro_batch_size": 4, "global_batch_size": 8},
            **sections,
        },
    )


@pytest.fixture(scope="module")
def files(tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny data and a second retrieval source, `other`."""
    folder = tmp_path_factory.mktemp("other")
    lines = tiny_data["pairs"].with_suffix(".jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "other.jsonl").write_text("".join(lines[:90]), encoding="utf-8")
    preprocess_pairs("retrieval", [folder / "other.jsonl"], tiny_data["tokenizer"], folder / "other")
    return {**tiny_data, "other": folder / "other"}


def _vectors(trainer: Any, source: str, ids: Any, kind: TextKind, prompt: str = "") -> dict[int, np.ndarray]:
    """Unit vectors of texts, one text a time, with the weights as they are."""
    import torch

    from megatron_conan.data.packing import pack_texts
    from megatron_conan.train.step import embed_texts, evaluating

    store, tokenizer = trainer.parts.data.by_name[source], trainer.setup.tokenizer
    before = tokenizer.encode(prompt)
    found = {}
    for text_id in sorted({int(i) for i in ids}):
        text = tokenizer.encode(store.text(text_id))[: MAX_LENGTH[kind] - 1 - len(before)]
        tokens = [np.array([*before, *text, tokenizer.eos_id], np.int32)]
        packed = pack_texts(range(1), tokens.__getitem__, np.array([len(before)]), pad_id=tokenizer.pad_id)
        with evaluating(trainer.chunks), torch.no_grad():
            found[text_id] = embed_texts(trainer.chunks, [packed], trainer.setup.context)[0].numpy().astype(np.float64)
    return found


def _mine_with_prompts(config: RunConfig) -> tuple[NegativesTable, dict[str, np.ndarray]]:
    """The table that the hook makes before step 1; on rank 0 every row's best scores by brute force, by prompts or none."""
    trainer = build_test_trainer(config)
    trainer.hooks["mining"].before_step(trainer, 1)
    data = trainer.parts.data
    table, store = data.negatives["other"], data.by_name["other"]
    expected = {}
    for name, prompts in PROMPTED.items() if trainer.setup.context.rank == 0 else ():
        queries = _vectors(trainer, "other", store.query_ids, "query", prompts["question"])
        documents = _vectors(trainer, "other", store.corpus_ids, "document", prompts["passage"])
        known: dict[int, set[int]] = {}
        for row in range(store.num_rows):
            known.setdefault(store.query(row), {store.query(row)}).update(store.positives(row).tolist())
        best = []
        for row in range(store.num_rows):
            query = store.query(row)
            scores = [queries[query] @ vector for i, vector in documents.items() if i not in known[query]]
            best.append(sorted(scores, reverse=True)[: table.pool_ids.shape[1]])
        expected[name] = np.array(best)
    return table, expected


def test_mining_reads_texts_with_the_prompts_of_the_source(
    workers: WorkerPool, files: dict[str, Path], tmp_path: Path
) -> None:
    """Pools hold the scores that brute force finds with the source's prompts; without them it finds others."""
    source = {"prefix": str(files["other"]), "query_prompt": "question", "document_prompt": "passage"}
    config = _config(files, tmp_path / "run", data={"sources": [source]}, prompts=PROMPTS, mining={"every": 9, **SWAPS})
    (table, best), (other, _) = workers.run(_mine_with_prompts, 2, config)
    np.testing.assert_allclose(table.pool_scores, best["prompts"], atol=1e-5)
    assert np.abs(table.pool_scores - best["none"]).max() > 1e-2
    assert table.content_hash() == other.content_hash()


def _follow_run(config: RunConfig, lifted: float = 0.0) -> list[dict[str, Any]]:
    """Of every step: metrics, the tables in use before and after it, its source, and its negatives' similarities.

    Args:
        lifted: by how much negatives come in with higher scores than they have, so that they are due; without it rank 0
            also computes the similarities plainly, with the weights the step began with.
    """
    from megatron_conan.train import loop

    trainer = build_test_trainer(config)
    data, hook = trainer.parts.data, trainer.hooks["mining"]
    mine, update = hook.before_step, data.update_negatives
    steps: list[dict[str, Any]] = []

    def before_step(trainer: Any, step: int) -> dict[str, float]:
        earlier = copy.deepcopy(data.negatives)
        values = mine(trainer, step)
        mined = [name for name, table in data.negatives.items() if table.step == step - 1]
        for name in mined:
            data.negatives[name].pool_scores += lifted
            data.negatives[name].initial_score += lifted
        source = data.batch(step).batches[0].store.name
        steps.append({"source": source, "earlier": earlier, "before": copy.deepcopy(data.negatives), "told": []})
        if source in data.negatives and not lifted and trainer.setup.context.rank == 0:
            steps[-1]["plain"] = _similarities(trainer, step)
            if mined and earlier:
                steps[-1]["rescored"] = _rescored(trainer, source, earlier[source])
        return values

    def update_negatives(source: str, rows: Any, slots: Any, similarities: Any, step: int) -> int:
        negatives = zip(rows.tolist(), slots.tolist(), strict=True)
        steps[-1]["told"] = list(zip(negatives, similarities.tolist(), strict=True))
        return update(source, rows, slots, similarities, step)

    hook.before_step, data.update_negatives = before_step, update_negatives
    while trainer.step < config.train.steps:
        values = loop.one_step(trainer)
        steps[-1] |= {"metrics": values, "after": copy.deepcopy(data.negatives)}
    return steps


def _similarities(trainer: Any, step: int) -> Told:
    """Of the negatives of a step's batch, with the weights as they are."""
    batch = trainer.parts.data.batch(step).batches[0]
    queries = _vectors(trainer, batch.store.name, batch.query_ids, "query")
    documents = _vectors(trainer, batch.store.name, batch.document_ids[batch.negative[1]], "document")
    return [
        (
            (int(batch.rows[row]), int(slot)),
            queries[int(batch.query_ids[batch.row_query[row]])] @ documents[int(batch.document_ids[document])],
        )
        for (row, document), slot in zip(batch.negative.T, batch.slots, strict=True)
    ]


def _rescored(trainer: Any, source: str, table: NegativesTable) -> list[float]:
    """Change of score since they came in of the negatives that each query's first row used."""
    store = trainer.parts.data.by_name[source]
    queries, first = np.unique(store.query_ids, return_index=True)
    used = table.current(first)
    vectors = _vectors(trainer, source, queries, "query")
    documents = _vectors(trainer, source, used[used >= 0], "document")
    return [
        vectors[int(query)] @ documents[int(text)] - table.initial_score[row, slot]
        for query, row, texts in zip(queries, first, used, strict=True)
        for slot, text in enumerate(texts)
        if text >= 0
    ]


def _swapped(table: NegativesTable, told: Told) -> tuple[NegativesTable, int, int]:
    """The table after a step, negatives replaced and replacements that found no candidate: v2 as it is written."""
    table = copy.deepcopy(table)
    replaced = dry = 0
    for (row, slot), now in sorted(dict(told).items()):  # a row twice in a batch says the same twice
        initial = float(table.initial_score[row, slot])
        if initial < SWAPS["low_score"] or (SWAPS["drop_ratio"] * now < initial and now < SWAPS["high_score"]):
            place = int(table.next_candidate[row])
            if place == (table.pool_ids[row] >= 0).sum():
                dry += 1
                continue
            table.pointer[row, slot], table.initial_score[row, slot] = place, table.pool_scores[row, place]
            table.next_candidate[row] += 1
            replaced += 1
    return table, replaced, dry


def test_metrics_and_minings_equal_plain_recomputation(
    workers: WorkerPool, files: dict[str, Path], tmp_path: Path
) -> None:
    """Mining before steps 3 and 7 of 10; before the first one the file's own negatives are used."""
    config = _config(
        files, tmp_path / "run", "other", mining={"at": [2, 6], **SWAPS}, optimizer={"lr": 3e-3},
        train={"steps": 10, "micro_batch_size": 12, "global_batch_size": 24},
    )  # fmt: skip
    steps = workers.run(_follow_run, 2, config)[0]
    assert [bool(step["before"]) for step in steps] == [False] * 2 + [True] * 8
    total_dry = total_replaced = 0
    for number, step in enumerate(steps, start=1):
        metrics = step["metrics"]
        if not step["before"]:
            assert (metrics["negatives_age"], metrics["negatives_dry"]) == (0.0, 0.0)
            assert not {"negatives_drift", "negatives_replaced"} & metrics.keys()
            continue
        table = step["before"]["other"]
        if number in (3, 7):
            total_dry = 0
        assert (table.version, table.step) == ((1, 2) if number < 7 else (2, 6))
        assert metrics["negatives_age"] == number - 1 - table.step
        assert metrics["negatives_dry"] == total_dry
        assert [key for key, _ in step["told"]] == [key for key, _ in step["plain"]] != []
        told, plain = ([similarity for _, similarity in step[which]] for which in ("told", "plain"))
        np.testing.assert_allclose(told, plain, atol=1e-5)
        drift = [similarity - table.initial_score[key] for key, similarity in step["plain"]]
        assert metrics["negatives_drift"] == pytest.approx(np.mean(drift), abs=1e-5)
        expected, replaced, dry = _swapped(table, step["told"])
        assert metrics["negatives_replaced"] == replaced
        total_dry, total_replaced = total_dry + dry, total_replaced + replaced
        for name in ("pointer", "initial_score", "next_candidate"):
            np.testing.assert_array_equal(getattr(step["after"]["other"], name), getattr(expected, name), err_msg=name)
    assert total_replaced > total_dry > 0
    lines = (config.run_dir / "negatives" / "mining.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line) for line in lines)
    assert (first["version"], first["step"], first["changed_share"], first["drift"]) == (1, 2, None, None)
    assert (second["version"], second["step"]) == (2, 6)
    rows = np.arange(len(steps[6]["before"]["other"].pointer))
    earlier, now = (steps[6][when]["other"].current(rows) for when in ("earlier", "before"))
    new = [text not in before for before, texts in zip(earlier, now, strict=True) for text in texts if text >= 0]
    assert 0 < np.mean(new) < 1
    assert second["changed_share"] == pytest.approx(np.mean(new))
    assert second["drift"] == pytest.approx(np.mean(steps[6]["rescored"]), abs=1e-5)
    assert abs(second["drift"]) > 1e-3


def _blocks_replaced(table: NegativesTable, told: Told, test: bool) -> NegativesTable:
    """The table after a step: v1 as it is written."""
    table = copy.deepcopy(table)
    for row in {row for (row, _), _ in told}:
        table.seen[row] = np.mean([similarity for (other, _), similarity in dict(told).items() if other == row])
    if test:
        num_slots = table.pointer.shape[1]
        for row in np.flatnonzero(~np.isnan(table.seen)):
            initial, now = float(np.nanmean(table.initial_score[row].astype(np.float64))), float(table.seen[row])
            places = np.arange(table.next_candidate[row], table.next_candidate[row] + num_slots)
            if (
                BLOCKS["drop_ratio"] * now < initial
                and abs(now) < BLOCKS["high_score"]
                and places[-1] < (table.pool_ids[row] >= 0).sum()
            ):
                table.pointer[row], table.initial_score[row] = places, table.pool_scores[row, places]
                table.next_candidate[row] += num_slots
            table.seen[row] = np.nan
    return table


def test_all_tables_are_tested_at_the_steps_of_rule_v1(
    workers: WorkerPool, files: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever source the step's batch is of: another one that is mined, or one that isn't."""
    config = _config(
        files, tmp_path / "run", "pairs", "other", "sts", mining={"every": 20, **BLOCKS},
        train={"steps": 20, "micro_batch_size": 4, "global_batch_size": 8},
    )  # fmt: skip
    steps = workers.run(_follow_run, 2, config, 0.5)[0]
    replaced_beside = set()
    for number, step in enumerate(steps, start=1):
        total = 0
        for name, table in step["before"].items():
            told = step["told"] if name == step["source"] else []
            expected, found = _blocks_replaced(table, told, test=number % 5 == 0), step["after"][name]
            np.testing.assert_array_equal(found.pointer, expected.pointer, err_msg=f"{name} after step {number}")
            np.testing.assert_array_equal(found.next_candidate, expected.next_candidate)
            np.testing.assert_allclose(found.seen, expected.seen, rtol=1e-6)
            changed = int((found.pointer != table.pointer).sum())
            total += changed
            if changed and name != step["source"]:
                replaced_beside.add(step["source"])
        assert step["metrics"]["negatives_replaced"] == total
    assert replaced_beside == {"pairs", "other", "sts"}


def _train_with_unequal_tables(config: RunConfig) -> str:
    """One element of one rank's table differs from the first step on."""
    from megatron_conan.train import loop

    trainer = build_test_trainer(config)
    hook = trainer.hooks["mining"]
    mine = hook.before_step

    def before_step(trainer: Any, step: int) -> dict[str, float]:
        values = mine(trainer, step)
        if step == 1 and trainer.setup.context.rank == 1:
            trainer.parts.data.negatives["pairs"].pool_ids[150, 3] += 1
        return values

    hook.before_step = before_step
    with pytest.raises(RuntimeError) as caught:
        loop.train(trainer)
    return f"after step {trainer.step}: {caught.value}"


def test_ranks_with_unequal_tables_all_stop(workers: WorkerPool, files: dict[str, Path], tmp_path: Path) -> None:
    config = _config(files, tmp_path / "run", mining={"every": 4, **SWAPS}, checkpoint={"every": 2})
    (told,) = set(workers.run(_train_with_unequal_tables, 2, config))
    assert told.startswith("after step 2: pairs: the ranks hold different negatives (hashes by rank: [")
    assert not (tmp_path / "run" / "checkpoints").exists()


def _resume_refused(config: RunConfig) -> str:
    with pytest.raises(ValueError, match=r"negatives/step_|data changed") as caught:
        train_run(config)
    return str(caught.value)


def test_resume_refuses_another_rule_other_data_and_damaged_negatives(
    workers: WorkerPool, files: dict[str, Path], tmp_path: Path
) -> None:
    """Another rule; data of the same sizes, but for one text, or for two rows' positives exchanged; files cut short, or gone.

    One message each, with file and remedy.
    """
    data, run = shutil.copytree(files["other"].parent, tmp_path / "data"), tmp_path / "run"
    config = _config({**files, "other": data / "other"}, run, "other", mining={"every": 4, **SWAPS})
    workers.run(train_run, 2, config)
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": 6})})
    table = run / "negatives" / "step_00000004" / "other"
    kept = shutil.copytree(data, tmp_path / "kept")

    assert more.mining is not None
    check_run_folder(more)
    with pytest.raises(ValueError, match=r"can't be resumed with this one: mining\.rule: 'v2' -> 'v1'"):
        check_run_folder(more.model_copy(update={"mining": more.mining.model_copy(update={"rule": "v1"})}))

    text = (data / "other.jsonl").read_text(encoding="utf-8")
    replaced = json.loads(text.splitlines()[7])["positive"]
    (data / "other.jsonl").write_text(text.replace(replaced, "a text that stood nowhere"), encoding="utf-8")
    preprocess_pairs("retrieval", [data / "other.jsonl"], files["tokenizer"], data / "other")
    (told,) = set(workers.run(_resume_refused, 2, more))  # all ranks say the same
    assert told.startswith("the data changed since the run began: data.sources.0: other.bin ")
    assert "other.corpus.npy" not in told
    assert told.endswith("Bring the old files back, or give another run_dir")

    shutil.copytree(kept, data, dirs_exist_ok=True)
    positives = np.load(data / "other.positives.npy")
    positives[[3, 4]] = positives[[4, 3]]
    np.save(data / "other.positives.npy", positives)
    (told,) = set(workers.run(_resume_refused, 2, more))
    changed = "data.sources.0: other.positives.npy has other content of the same size"
    assert told.startswith(f"the data changed since the run began: {changed}. ")

    shutil.copytree(kept, data, dirs_exist_ok=True)
    for name, size in (("pointer.npy", -8), ("pool_ids.npy", 0), ("table.json", -20)):
        whole = (table / name).read_bytes()
        (table / name).write_bytes(whole[:size])
        (told,) = set(workers.run(_resume_refused, 2, more))
        file = f"negatives/step_00000004/other/{name}"
        assert f"all checkpoints of {run} are damaged. step_00000004: {file} is not what was written" in told
        (table / name).write_bytes(whole)
    table.parent.rename(tmp_path / "away")
    (told,) = set(workers.run(_resume_refused, 2, more))
    assert "negatives/step_00000004/other/table.json is missing" in told
    (tmp_path / "away").rename(table.parent)
    workers.run(train_run, 2, more)  # all is as it was
    assert (run / "checkpoints" / "latest").read_text() == "step_00000006\n"


def _stop_in_checkpoint(config: RunConfig) -> None:
    """End after the tables are saved, before the checkpoint that names them is."""
    from megatron_conan.train import loop

    with patch.object(loop.Checkpointer, "save", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        train_run(config)


def test_negatives_stay_as_long_as_their_checkpoint(
    workers: WorkerPool, files: dict[str, Path], tmp_path: Path
) -> None:
    """Stopped in the checkpoint of step 5, gone on with other steps between checkpoints, stopped in that of step 6."""

    def config(steps: int, every: int) -> RunConfig:
        train = {"steps": steps, "micro_batch_size": 4, "global_batch_size": 8}
        mining = {"every": 20, **SWAPS}
        return _config(files, tmp_path / "run", train=train, mining=mining, checkpoint={"every": every, "keep_last": 1})

    workers.run(train_run, 1, config(4, 2))
    workers.run(_stop_in_checkpoint, 1, config(10, 5))
    workers.run(_stop_in_checkpoint, 1, config(10, 6))
    kept = sorted(path.name for path in (tmp_path / "run" / "negatives").glob("step_*"))
    assert kept == ["step_00000004", "step_00000006"]
    workers.run(train_run, 1, config(6, 6))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000006\n"
