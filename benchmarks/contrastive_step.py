"""Our contrastive training step beside sentence-transformers' CachedMultipleNegativesRankingLoss, in one run on a CPU.

Both sides hold the same weights (ours are exported), see the same rows, take mini-batches of as many texts or tokens, make the
same AdamW update in fp32, and give the same losses before and after it; that is checked. Rows with a text that stands in
another row are left out: to us it is no negative, to the peer it is. The peer is timed with each way of cutting mini-batches
that it has, also with rows sorted by length, and its fastest counts.

Figures are CPU-seconds on one thread, of the fastest of some runs that take turns. A step is forward, backward and update of a
batch that lies ready: packed micro-batches, or the peer's padded ids. "With data" adds making that batch: for us reading token
ids and packing them, for the peer tokenising, sorting and padding.

    python benchmarks/contrastive_step.py --output contrastive_step.json      # `make demo`'s data; below 15 minutes
    python benchmarks/contrastive_step.py --quick                             # below 2 minutes
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import recording
import torch
from recording import Row, gemm_flops_per_second, least_cpu_seconds
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from megatron_conan.config import RunConfig, check_config, load_config
from megatron_conan.data.command_line import run_tool
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.export.trained import TrainedRun, export_run
from megatron_conan.parallel import hide_engine_warnings
from megatron_conan.parallel.context import build_context, initialize_distributed
from megatron_conan.train.loop import build_trainer
from megatron_conan.train.pair_data import Pairs, PairStep
from megatron_conan.train.setup import Setup
from megatron_conan.train.step import train_step

CONFIG = Path(__file__).resolve().parents[1] / "configs/demo/weak.yaml"
DATA = Path(__file__).resolve().parents[1] / "runs/demo/data"
OVERRIDES = [
    "checkpoint.init_from=null",
    "evaluation=null",
    "contrastive.symmetric=false",
    "soft_mask={form: constant, schedule: constant, alpha: 1.0}",  # bidirectional: what a stock model can be
    "optimizer.warmup_fraction=0",
    "optimizer.decay=constant",
    "optimizer.decoupled_lr=null",
]
SMALL = {"num_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 64}
MODELS = {"demo": [], "small": [f"model.{key}={value}" for key, value in {**SMALL, "ffn_hidden_size": 1536}.items()]}
RAGGED_LENGTHS = (8, 512)
"""Documents of the ragged case: tokens, uniform in the logarithm."""
RAGGED = [f"{key}={RAGGED_LENGTHS[1]}" for key in ("model.max_seq_length", "data.max_document_length")]
TOLERANCE = 1e-4
"""Of the difference between both sides' losses, before and after the first update."""
TINY_BATCH = 8
"""Rows of the step that warms up."""
LIVE_COPIES = 6.5
"""Of the embeddings [texts, e], alive in our loss's backward pass: as they came, together, in order (3); of queries those of
the rows (twice), scaled and weighted, of documents the positives (5 halves); gradients of both (2 halves)."""
TITLES = {
    "steps": "A training step: ours and the peer's fastest",
    "plans": "The peer, by how it cuts mini-batches",
    "memory": f"Peak memory of a step beside the batch; our embeddings take {LIVE_COPIES} x texts x e x 4 bytes",
    "passes": "One pass and two; share of what matrix products alone allow",
}


@dataclass(frozen=True)
class Case:
    """Rows of text, prepared for both sides: rows.jsonl, the same as a pair store, and the peer's model."""

    name: str
    folder: Path
    tokenizer_model: Path
    overrides: tuple[str, ...]

    def config(self) -> RunConfig:
        """Of a run on these rows."""
        files = [f"run_dir={self.folder / 'run'}", f"data.sources=[{{prefix: {self.folder / 'rows'}}}]"]
        config = load_config(CONFIG, [*OVERRIDES, *self.overrides, *files, f"tokenizer.model={self.tokenizer_model}"])
        check_config(config, 1)
        return config

    def texts(self) -> list[tuple[str, str]]:
        """(query, document) of all rows."""
        lines = (self.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        return [(row["query"], row["positive"]) for row in map(json.loads, lines)]


@dataclass(frozen=True)
class Plan:
    """How the peer cuts a batch into mini-batches."""

    name: str
    by_length: bool = True
    """Rows sorted by their documents' lengths."""
    by_tokens: bool = True
    """`mini_batch_num_tokens`, as many as ours have; else `mini_batch_size` texts."""
    loss_rows: int | None = None
    """Rows of the loss at a time, which can differ from the texts of a mini-batch with `by_tokens` only."""


PLANS = (
    Plan("texts", by_length=False, by_tokens=False),
    Plan("texts, sorted", by_tokens=False),
    Plan("tokens, sorted"),
    Plan("tokens, sorted, loss by 256 rows", loss_rows=256),
)


class Ours:
    """Our trainer in this process."""

    def __init__(self, case: Case) -> None:
        config = case.config()
        context = build_context(config.parallel, initialize_distributed())
        self.setup = Setup(config, context, Tokenizer(case.tokenizer_model))
        self.trainer = build_trainer(self.setup, {})
        self.trainer.soft_mask.at_step(1)
        self.trainer.scheduler.step(1)
        self.model = self.trainer.chunks[0].get_submodule("module")

    def data(self, num_rows: int, chunk: int) -> Pairs:
        """Batches of `num_rows` rows in micro-batches of about `chunk` texts; one micro-batch, and so one pass, if all."""
        sizes = {"global_batch_size": num_rows, "micro_batch_size": min(chunk // 2, num_rows)}
        train = self.setup.config.train.model_copy(update=sizes)
        return Pairs(replace(self.setup, config=self.setup.config.model_copy(update={"train": train})))

    def step(self, batch: PairStep) -> float:
        """Forward, backward and update; returns the loss."""
        trainer = self.trainer
        forward_backward = partial(trainer.parts.forward_backward, trainer.chunks, batch)
        return train_step(trainer.chunks, trainer.optimizer, forward_backward, self.setup.context)["loss"]

    def export(self, folder: Path, texts: Sequence[str]) -> None:
        """Write the weights as a SentenceTransformer folder."""
        config = self.setup.config
        checkpoint = config.run_dir / "checkpoints/step_0"
        run = TrainedRun(config, checkpoint, 0, 1.0, self.model, self.setup.tokenizer, self.setup.context)
        export_run(run, folder, texts)

    def forward_flops(self, batch: PairStep) -> float:
        """Operations of one forward pass in linear layers and attention, over real tokens."""
        m = self.setup.config.model
        weights = sum(p.numel() for p in self.model.decoder.parameters() if p.dim() == 2)
        lengths = torch.cat([micro_batch.sequences.lengths for micro_batch in batch.micro_batches]).double()
        pairs = float(lengths.square().sum())  # of a query's and a key's token
        return 2 * weights * float(lengths.sum()) + 4 * m.num_layers * m.num_attention_heads * m.head_dim * pairs


class Peer:
    """The same model in sentence-transformers, trained as its trainer would on one CPU."""

    def __init__(self, case: Case) -> None:
        disable_progress_bar()
        logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
        self.model = SentenceTransformer(str(case.folder / "export"), device="cpu", local_files_only=True).train()
        assert all(p.dtype == torch.float32 for p in self.model.parameters())
        self.config = case.config()
        o = self.config.optimizer
        matrices, vectors = (
            [p for p in self.model.parameters() if (p.dim() == 2) is wanted] for wanted in (True, False)
        )
        groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.epsilon, fused=True)

    def loss(self, plan: Plan, chunk: int, chunk_tokens: int) -> torch.nn.Module:
        """The loss with mini-batches of `chunk` texts, or of `chunk_tokens` tokens."""
        scale, tokens = 1 / self.config.contrastive.temperature, chunk_tokens if plan.by_tokens else None
        return CachedMultipleNegativesRankingLoss(
            self.model, scale=scale, mini_batch_size=plan.loss_rows or chunk, mini_batch_num_tokens=tokens
        )

    def batch(self, rows: Sequence[tuple[str, str]], by_length: bool) -> list[dict[str, Tensor]]:
        """The columns of some rows as its collator makes them."""
        limits = (self.config.max_query_length, self.config.max_document_length)
        texts = zip(zip(*rows, strict=True), limits, strict=True)
        columns = [self.model.preprocess(list(column), max_length=limit) for column, limit in texts]
        if by_length:
            order = columns[1]["attention_mask"].sum(dim=1).argsort(descending=True)
            columns = [{name: x[order] if isinstance(x, Tensor) else x for name, x in c.items()} for c in columns]
        return columns

    def step(self, loss: torch.nn.Module, batch: list[dict[str, Tensor]]) -> float:
        """Forward, backward and update; returns the loss."""
        self.optimizer.zero_grad()
        value = loss(batch, None)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
        self.optimizer.step()
        return value.item()


def prepare_case(case: Case, prefix: Path, num_rows: int) -> None:
    """Write distinct rows of a pair store as texts and as a store of their own, and export our model for the peer.

    Raises:
        ValueError: there are fewer than `num_rows`.
    """
    tokenizer = Tokenizer(case.tokenizer_model)
    store = PairStore(prefix, tokenizer)
    order = np.random.default_rng(0).permutation(store.num_rows)
    documents: Iterator[str] = (store.text(store.positives(row)[0]) for row in order)
    if case.name == "ragged":
        documents = _ragged_documents(store, tokenizer, order)
    seen, rows = set(), []
    for row, document in zip(order, documents, strict=False):
        query = store.text(store.query(row))
        if query.strip() and document.strip() and query != document and not seen & {query, document}:
            rows.append({"query": query, "positive": document})
            seen |= {query, document}
        if len(rows) == num_rows:
            break
    else:
        raise ValueError(f"{prefix} has {len(rows)} rows with texts of their own; {num_rows} are asked for")
    case.folder.mkdir(parents=True)
    file = case.folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    preprocess_pairs("retrieval", [file], case.tokenizer_model, case.folder / "rows", num_workers=1)
    Ours(case).export(case.folder / "export", [row["query"] for row in rows[:8]])


def _ragged_documents(store: PairStore, tokenizer: Tokenizer, order: np.ndarray) -> Iterator[str]:
    """The store's documents on end, cut at lengths of RAGGED_LENGTHS."""
    low, high = RAGGED_LENGTHS
    rng, tokens = np.random.default_rng(0), np.empty(0, np.int32)
    for row in order:
        tokens = np.concatenate([tokens, store.tokens(store.positives(row)[0])])
        if len(tokens) >= high:
            length = int(np.exp(rng.uniform(np.log(low), np.log(high))))
            yield tokenizer.decode(tokens[:length].tolist())
            tokens = tokens[length:]


def compare(
    case: Case, num_rows: int, chunk: int, repetitions: int, plans: Sequence[Plan]
) -> tuple[Row, list[Row], list[Plan]]:
    """Time both sides on one batch, the peer by each of `plans`.

    Returns:
        The line of table "steps", those of "plans", and the plans from the fastest on.
    """
    ours, peer, texts = Ours(case), Peer(case), case.texts()
    data = ours.data(num_rows, chunk)
    batch = data.batch(1)
    rows = [texts[row] for row in batch.batches[0].rows]
    prepared = {by_length: peer.batch(rows, by_length) for by_length in (False, True)}
    num_tokens = sum(int(column["attention_mask"].sum()) for column in prepared[True])
    assert num_tokens == batch.num_tokens, f"the peer sees {num_tokens} tokens, we {batch.num_tokens}"
    calls: dict[str, Callable[[], float]] = {"ours": partial(ours.step, batch)}
    for plan in plans:
        loss = peer.loss(plan, chunk, chunk_tokens(batch))
        calls[plan.name] = partial(peer.step, loss, prepared[plan.by_length])
    differences = [abs(calls["ours"]() - calls[plans[-1].name]()) for _ in range(2)]
    assert max(differences) < TOLERANCE, f"both sides' losses differ by {differences} before and after the first update"
    seconds = least_cpu_seconds(calls, repetitions)
    ranked = sorted(plans, key=lambda plan: seconds[plan.name])
    best = ranked[0]
    making = {"ours": lambda: data.batch(1), "peer": lambda: peer.batch(rows, best.by_length)}
    data_seconds = least_cpu_seconds(making, repetitions)
    step = {"ours": seconds["ours"], "peer": seconds[best.name]}
    whole = {side: step[side] + data_seconds[side] for side in step}
    where = {"case": case.name, "batch": num_rows, "tokens": num_tokens}
    line: Row = {
        **where,
        "ours, pairs/CPU-s": num_rows / step["ours"],
        "peer, pairs/CPU-s": num_rows / step["peer"],
        "ours / peer": step["peer"] / step["ours"],
        "ours with data": num_rows / whole["ours"],
        "peer with data": num_rows / whole["peer"],
        "ours / peer with data": whole["peer"] / whole["ours"],
        "peer's mini-batches": best.name,
        "difference of losses": max(differences),
    }
    by_plan: list[Row] = [
        {**where, "mini-batches": p.name, "CPU-s": seconds[p.name], "pairs/CPU-s": num_rows / seconds[p.name]}
        for p in plans
    ]
    return line, by_plan, ranked


def compare_passes(case: Case, num_rows: int, chunks: Sequence[int], repetitions: int) -> list[Row]:
    """Time of our step in one pass and in two, and each one's share of what its matrix products alone allow."""
    ours = Ours(case)
    batches = {chunk: ours.data(num_rows, chunk).batch(1) for chunk in (2 * num_rows, *chunks)}
    calls = {str(chunk): partial(ours.step, batch) for chunk, batch in batches.items()}
    least_cpu_seconds(calls, 1)
    seconds = least_cpu_seconds(calls, repetitions)
    flops_per_second = gemm_flops_per_second()
    lines: list[Row] = []
    for chunk, batch in batches.items():
        num_forwards = 3 if len(batch.micro_batches) == 1 else 4  # a backward pass is two
        flops, spent = num_forwards * ours.forward_flops(batch), seconds[str(chunk)]
        line: Row = {"case": case.name, "batch": num_rows, "micro-batches": len(batch.micro_batches)}
        line |= {"passes": num_forwards - 2, "CPU-s": spent, "of one pass": spent / seconds[str(2 * num_rows)]}
        line |= {"GFLOP": flops / 1e9, "GEMM GFLOP/s": flops_per_second / 1e9}
        lines.append({**line, "limit, CPU-s": flops / flops_per_second, "share": flops / flops_per_second / spent})
    return lines


def chunk_tokens(batch: PairStep) -> int:
    """Tokens of our mean micro-batch."""
    return math.ceil(batch.num_tokens / len(batch.micro_batches))


def measure_memory(keeping: bool, side: str, case: Case, num_rows: int, chunk: int, plan: Plan, tokens: int) -> Row:
    """What one step takes beside its batch; for a process of its own. `keeping`: see `memory_growth`."""
    torch.set_num_threads(1)
    hide_engine_warnings()
    if side == "ours":
        ours = Ours(case)
        ours.step(ours.data(TINY_BATCH, chunk).batch(1))
        return recording.memory_growth(partial(ours.step, ours.data(num_rows, chunk).batch(1)), keeping)
    peer, texts = Peer(case), case.texts()
    loss = peer.loss(plan, chunk, tokens)
    peer.step(loss, peer.batch(texts[:TINY_BATCH], plan.by_length))
    return recording.memory_growth(partial(peer.step, loss, peer.batch(texts[:num_rows], plan.by_length)), keeping)


def compare_memory(case: Case, num_rows: int, plan: Plan, tokens: int, arguments: argparse.Namespace) -> Row:
    """Line of table "memory"; where a process fails, the reason in place of its figures."""
    embeddings = 2 * num_rows * case.config().embedding_dim * 4 / 1e6
    line: Row = {"batch": num_rows, "embeddings, MB": embeddings}
    for keeping in (False,) if arguments.quick else (False, True):
        for side in ("ours", "peer"):
            call = (measure_memory, keeping, side, case, num_rows, arguments.chunk, plan, tokens)
            found = recording.in_fresh_process(arguments.limit, *call)
            figures = dict.fromkeys(("mb", "cpu_seconds"), found) if isinstance(found, str) else found
            line[f"{side}, {'resident' if keeping else 'live'} MB"] = figures["mb"]
            if keeping:
                line[f"{side}, CPU-s"] = figures["cpu_seconds"]
            elif side == "ours":
                rest = found if isinstance(found, str) else found["mb"] - LIVE_COPIES * embeddings
                line["ours without embeddings"] = rest
    return line


def main(argv: Sequence[str]) -> None:
    """Measure, print and write. Raises ValueError for a user's mistake."""
    arguments = _parse(argv)
    torch.set_num_threads(1)
    hide_engine_warnings()
    if not arguments.data.with_name(f"{arguments.data.name}.json").is_file():
        raise ValueError(f"no pair data at {arguments.data}; run `make demo`, or name other data with --data PREFIX")
    quick, chunk = arguments.quick, arguments.chunk
    batches = arguments.batch_sizes or ([256] if quick else [256, 1024])
    memory_batches = [256, 1024] if quick else [256, 1024, 4096, 16384]
    repetitions = arguments.repetitions or (2 if quick else 4)
    overrides = [*MODELS[arguments.model], f"model.vocab_size={Tokenizer(arguments.tokenizer_model).size}"]
    tables: dict[str, list[Row]] = {name: [] for name in TITLES}
    with tempfile.TemporaryDirectory() as folder:
        for name, more in (("demo", []), ("ragged", RAGGED)):
            case = Case(name, Path(folder) / name, arguments.tokenizer_model, (*overrides, *more))
            prepare_case(case, arguments.data, max(*batches, *(memory_batches if name == "demo" else [0])))
            plans = list(PLANS[1:3] if quick else PLANS)
            for num_rows in batches:
                line, by_plan, ranked = compare(case, num_rows, chunk, repetitions, plans)
                tables["steps"].append(line)
                tables["plans"] += by_plan
                plans = ranked[:2]  # the others are no faster at a larger batch
            tables["passes"] += compare_passes(case, batches[0], [chunk, 4 * chunk], repetitions)
            if name == "demo":
                tokens = chunk_tokens(Ours(case).data(batches[0], chunk).batch(1))
                tables["memory"] = [compare_memory(case, n, plans[0], tokens, arguments) for n in memory_batches]
    for name, title in TITLES.items():
        recording.print_table(title, tables[name])
    if arguments.output is not None:
        recording.write_record(arguments.output, vars(arguments), tables)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare our contrastive step with sentence-transformers' on a CPU.")
    add = parser.add_argument
    add("--data", type=Path, default=DATA / "weak", metavar="PREFIX", help="pair data (default: the demo's)")
    add("--tokenizer-model", type=Path, default=DATA / "tokenizer.model", help="its tokenizer (default: the demo's)")
    add("--model", choices=MODELS, default="demo", help="demo: 2 layers, width 256; small: 4 layers, width 512")
    add("--batch-sizes", type=int, nargs="+", help="pairs of a step (default: 256 1024)")
    add("--chunk", type=int, default=64, help="texts of a mini-batch (default: 64)")
    add("--repetitions", type=int, help="runs of each call, of which the fastest counts (default: 4)")
    add("--limit", type=float, default=400, help="seconds a process of the memory table may take (default: 400)")
    add("--quick", action="store_true", help="batch 256, and memory at 256 and 1024, in two minutes")
    add("--output", type=Path, help="JSON file for the record")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
