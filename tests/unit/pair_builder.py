"""Sources of every task and the data of a stage made of them, for tests of steps and of their loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import TINY_MODEL, tiny_config
from pair_stores import write_store

from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.pair_data import Pairs
from megatron_conan.train.setup import Setup

PROMPTS = {
    "query": "find\n",
    "document": "",
    "sts": "same?\n",
    "classification": "which class?\n",
    "own": "own words\n",
}
LENGTHS = {"query": 24, "document": 40}
GLOBAL_BATCH = 12


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, PairStore]:
    """Sources of every task and of different sizes; texts of 1 to 60 tokens, so that some are cut."""
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(f"{word}" for word in rng.integers(0, 100, rng.integers(1, 25)))

    small = [{"query": f"q{i} {text()}", "pos": [text() for _ in range(1 + i % 3)], "neg": [text()]} for i in range(40)]
    large = [{"query": f"r{i} {text()}", "pos": [text()], "neg": [text(), text()]} for i in range(160)]
    scored = [{"text1": text(), "text2": text(), "score": i % 5} for i in range(30)]
    labelled = [{"text": f"{i} {text()}", "label": f"c{i % 3}"} for i in range(30)]
    tables = {"small": ("retrieval", small), "large": ("retrieval", large), "scored": ("sts", scored)}
    tables["labelled"] = ("classification", labelled)
    return {name: write_store(folder, name, tokenizer, *table) for name, table in tables.items()}


def context(dp_rank: int = 0, dp_size: int = 1, pp_rank: int = 0, pp_size: int = 1) -> ParallelContext:
    """A place in a grid, without processes."""
    return ParallelContext(
        device=torch.device("cpu"),
        rank=pp_rank * dp_size + dp_rank,
        world_size=dp_size * pp_size,
        tp_rank=0,
        tp_size=1,
        tp_group=None,
        pp_rank=pp_rank,
        pp_size=pp_size,
        pp_group=None,
        dp_rank=dp_rank,
        dp_size=dp_size,
        dp_group=None,
        world_group=None,
    )


class Builder:
    """Makes `Pairs` of some of the stores."""

    def __init__(self, stores: dict[str, PairStore], tokenizer: Tokenizer, folder: Path) -> None:
        self.stores, self.tokenizer, self.folder = stores, tokenizer, folder

    def setup(self, sources: dict[str, dict[str, Any]], place: ParallelContext | None = None, **sections: Any) -> Setup:
        """`sources`: name -> settings of the source."""
        data = {
            "sources": [{"prefix": str(self.stores[name].prefix), **more} for name, more in sources.items()],
            "max_query_length": LENGTHS["query"],
            "max_document_length": LENGTHS["document"],
        }
        train = {"micro_batch_size": None, "micro_batch_tokens": 200, "global_batch_size": GLOBAL_BATCH}
        contrastive = {"num_positives": 2, "num_hard_negatives": 1}
        defaults = {"train": train, "contrastive": contrastive, "data": data}
        merged = {key: {**value, **sections.pop(key, {})} for key, value in defaults.items()}
        files = {"pairs": Path("unused"), "tokenizer": self.tokenizer.path}
        config = tiny_config(
            "weak",
            files,
            self.folder / "run",
            model=dict(TINY_MODEL, vocab_size=600),
            prompts=PROMPTS,
            **merged,
            **sections,
        )
        return Setup(config, place or context(), self.tokenizer)

    def pairs(self, sources: dict[str, dict[str, Any]], place: ParallelContext | None = None, **sections: Any) -> Pairs:
        return Pairs(self.setup(sources, place, **sections))


@pytest.fixture
def builder(stores: dict[str, PairStore], tokenizer: Tokenizer, tmp_path: Path) -> Builder:
    return Builder(stores, tokenizer, tmp_path)
