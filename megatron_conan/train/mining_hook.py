"""Re-mining inside the loop, on a fixed step schedule."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_conan.config import RunConfig
from megatron_conan.config.tree import MiningConfig
from megatron_conan.data.format import prompt_name
from megatron_conan.data.pairs import PairStore
from megatron_conan.mining.local_search import SearchSettings, check_window
from megatron_conan.mining.pools import MiningSource
from megatron_conan.mining.refresh import MiningReport, MiningSettings, check_identical, fingerprint, remine
from megatron_conan.mining.rows import weights_fingerprint
from megatron_conan.mining.rules import QueryRule, Rule, SwapRule
from megatron_conan.mining.select import SelectionSettings
from megatron_conan.mining.table import NegativesTable
from megatron_conan.train.checkpoint_files import NAME, checkpoint_name, file_sum, temporary_folder
from megatron_conan.train.loop import Trainer
from megatron_conan.train.pair_data import Pairs
from megatron_conan.train.run_folder import write_atomically, writing
from megatron_conan.train.setup import Setup
from megatron_conan.train.step import evaluating


class MiningHook:
    """Mines before step 1, and again every `mining.every` steps; the tables live in the stage's `Pairs`.

    A checkpoint writes them, as they stand with the swaps since the mining, to negatives/step_*/SOURCE; what every mining
    did is a line of negatives/mining.jsonl.
    """

    def __init__(self, setup: Setup) -> None:
        """`setup.config.mining` must be there.

        Raises:
            ValueError: what can't be mined, before anything is trained.
            ImportError: without faiss.
        """
        assert setup.config.mining is not None
        self.setup, self.mining = setup, setup.config.mining
        check_window(self.mining.window, setup.context.device)
        stores = [PairStore(source.prefix, setup.tokenizer) for source in setup.config.data.sources]
        retrieval = [store for store in stores if store.task == "retrieval"]
        if not retrieval:
            raise ValueError(
                "section mining: none of data.sources holds retrieval rows, so there is nothing to mine; remove the section"
            )
        for store in retrieval:
            MiningSource.of_store(store).check(setup.config.contrastive.num_hard_negatives)

    def before_step(self, trainer: Trainer, step: int) -> dict[str, float]:
        """Mine if due; steps since the last mining, and replacements that found no candidate since then, are metrics."""
        data = trainer.parts.data
        assert isinstance(data, Pairs)
        if self.mining.is_due(step - 1):
            self._mine(trainer, data, step)
        tables = data.negatives.values()
        return {
            "negatives_age": float(max((step - 1 - table.step for table in tables), default=0)),
            "negatives_dry": float(sum(table.num_dry for table in tables)),
        }

    def after_training(self, trainer: Trainer) -> None:
        """Nothing: negatives are for training only."""

    def state(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """Write the tables as they stand and remember the folder; rank 0 knows the files' sums.

        Raises:
            RuntimeError: if the ranks' tables differ.
        """
        data = trainer.parts.data
        assert isinstance(data, Pairs)
        for source in sorted(data.negatives):
            check_identical(data.negatives[source], self.setup.context, source)
        name, run_dir = checkpoint_name(step), self.setup.config.run_dir
        sums: dict[str, str] = {}
        if self.setup.context.rank == 0:
            for source, table in data.negatives.items():
                folder = self._folder() / name / source
                with writing(folder):
                    table.save(folder)
                sums |= {str(file.relative_to(run_dir)): file_sum(file) for file in sorted(folder.iterdir())}
            checkpoints = run_dir / "checkpoints"
            for folder in filter(lambda path: NAME.fullmatch(path.name), self._folder().glob("step_*")):
                checkpoint = checkpoints / folder.name
                # the one before may still be being written
                if folder.name != name and not checkpoint.is_dir() and not temporary_folder(checkpoint).is_dir():
                    shutil.rmtree(folder)
        return {"folder": name, "sources": sorted(data.negatives), "sums": sums}

    def restore(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Read the tables of the checkpoint that the run resumes from."""
        data = trainer.parts.data
        assert isinstance(data, Pairs)
        for source in state.get("sources", []):
            expected = fingerprint(data.by_name[source], self.setup.tokenizer)
            folder = self._folder() / state["folder"] / source
            data.negatives[source] = NegativesTable.load(folder, expected, replacement_rule(self.mining))

    def _mine(self, trainer: Trainer, data: Pairs, step: int) -> None:
        config, context, mining = self.setup.config, self.setup.context, self.mining
        state = f"alpha {trainer.soft_mask.value!r}, attention {config.attention.backend}"
        settings = MiningSettings(
            selection=SelectionSettings(
                pool_size=mining.pool_size,
                window=mining.window,
                skip_top=mining.skip_top,
                margin=mining.margin,
                margin_kind=mining.margin_kind,
                ceiling=mining.ceiling,
                sample_seed=config.train.seed + step if mining.sample else None,
            ),
            formatter=self.setup.formatter,
            num_negatives=config.contrastive.num_hard_negatives,
            max_tokens=mining.max_tokens,
            width=config.embedding_dim,
            pad_multiple=data.pad_multiple,
            rule=replacement_rule(mining),
            search=SearchSettings(mining.gpu_memory_gib, mining.gpu_fp16),
            scratch_dir=scratch_folder(config),
            weights=weights_fingerprint(trainer.chunks, state) if mining.scratch_dir else "",
        )
        for store in data.stores:
            if store.task != "retrieval":
                continue
            source = data.sources[store.name]
            settings = replace(
                settings,
                query_prompt=prompt_name(store.task, "query", source.query_prompt),
                document_prompt=prompt_name(store.task, "document", source.document_prompt),
            )
            with evaluating(trainer.chunks):
                result = remine(
                    store,
                    trainer.embed,
                    context,
                    self.setup.tokenizer,
                    settings,
                    step=step - 1,
                    previous=data.negatives.get(store.name),
                )
            data.negatives[store.name] = result.table
            if context.rank == 0:
                self._record(store.name, result.report)

    def _record(self, source: str, report: MiningReport) -> None:
        """One line for people, one JSON line for programs."""
        changed = "" if report.changed_share is None else f", {report.changed_share:.1%} of the negatives changed"
        print(
            f"mined {source} before step {report.step + 1}: {report.num_documents:,} documents in shards of "
            f"{' + '.join(f'{size:,}' for size in report.shard_sizes)}, {report.num_queries:,} queries{changed}, "
            f"mean negative {report.mean_negative_score:.3f}, mean positive {report.mean_positive_score:.3f}, "
            f"{report.seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
        file = self._folder() / "mining.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        earlier = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        # a run that was killed and resumed mines again what it had mined after its last checkpoint
        kept = [
            line
            for line in earlier
            if line["step"] < report.step or (line["step"] == report.step and line["source"] != source)
        ]
        lines = [*kept, {"source": source, **asdict(report)}]
        write_atomically(file, "".join(json.dumps(line) + "\n" for line in lines))

    def _folder(self) -> Path:
        return self.setup.config.run_dir / "negatives"


def replacement_rule(mining: MiningConfig) -> Rule:
    """The rule of the config, with its published thresholds where none are given."""
    given = {"drop_ratio": mining.drop_ratio, "high_score": mining.high_score}
    thresholds = {name: value for name, value in given.items() if value is not None}
    if mining.rule == "v1":
        return QueryRule(every=mining.rule_every, offset=mining.rule_offset, **thresholds)
    return SwapRule(low_score=mining.low_score, **thresholds)


def scratch_folder(config: RunConfig) -> Path | None:
    """This run's folder under `mining.scratch_dir`; None for memory."""
    if config.mining is None or config.mining.scratch_dir is None:
        return None
    path = hashlib.sha256(str(config.run_dir.resolve()).encode()).hexdigest()[:8]
    return config.mining.scratch_dir / f"{config.run_dir.name}-{path}"
