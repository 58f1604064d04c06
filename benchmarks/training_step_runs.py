"""Runs of ours for the benchmark of the training step, and their plain counterparts with the same weights and batches."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from training_step_plain import Form, PlainDecoder, PlainTraining, Shape, Update

from megatron_conan.config import RunConfig, check_config, load_config
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.main import build_hooks
from megatron_conan.parallel.context import build_context, initialize_distributed
from megatron_conan.train.checkpoint import unwrap
from megatron_conan.train.flops import step_flops
from megatron_conan.train.loop import Trainer, build_trainer
from megatron_conan.train.pair_data import PairStep
from megatron_conan.train.setup import Setup
from megatron_conan.train.step import train_step

CONFIGS = Path(__file__).resolve().parents[1] / "configs/demo"
STEPS = 1000
"""`train.steps` of runs that aren't run to their end."""
CONSTANT = ["optimizer.warmup_fraction=0", "optimizer.decay=constant", "optimizer.decoupled_lr=null"]
OF_STAGE = {
    "pretrain": [],
    "finetune": [
        "checkpoint.init_from=null",
        "mining=null",
        "contrastive.num_hard_negatives=0",
        "contrastive.symmetric=true",
    ],
}
LLAMA_LIKE = ["norm_epsilon=1.0e-5", "embedding_init_std=0.02", "residual_init_scale=null"]


@dataclass(frozen=True)
class Model:
    """A model, and batches that take a second or so on one thread."""

    overrides: tuple[str, ...]
    sequences: tuple[int, int]
    """Of a micro-batch and of a global batch, in pretraining."""
    pairs: int
    """Of a batch, which is one micro-batch, in finetuning."""


def _model(layers: int, width: int, heads: tuple[int, int, int], ffn: int) -> tuple[str, ...]:
    """`heads`: number, groups, dim."""
    sizes = {"num_layers": layers, "hidden_size": width, "ffn_hidden_size": ffn}
    sizes |= dict(zip(("num_attention_heads", "num_query_groups", "kv_channels"), heads, strict=True))
    return tuple(f"model.{word}" for word in [*LLAMA_LIKE, *(f"{key}={value}" for key, value in sizes.items())])


MODELS = {
    "tiny": Model(_model(2, 32, (2, 1, 16), 64), (2, 4), 8),
    "demo": Model((), (16, 32), 256),
    "deep": Model(_model(12, 256, (8, 4, 32), 512), (8, 8), 32),
    "small": Model(_model(4, 512, (8, 4, 64), 1536), (8, 8), 32),
    "large": Model(_model(8, 768, (12, 6, 64), 2304), (4, 4), 16),
}
"""tiny: for tests; demo: 2 layers, width 256; deep: 12 layers, width 256; small: 4 layers, width 512; large: 8 layers, 768."""


@dataclass(frozen=True)
class Files:
    """What runs are made from."""

    lm: Path
    """Prefix of a language-model corpus."""
    pairs: Path
    """Prefix of pairs."""
    tokenizer_model: Path
    folder: Path
    """For what is written."""

    def overrides(self, stage: str, model: str, run_dir: Path) -> list[str]:
        """Words for the demo's config of a stage."""
        m = MODELS[model]
        micro, whole = m.sequences if stage == "pretrain" else (m.pairs, m.pairs)
        words = [*CONSTANT, *OF_STAGE[stage], *m.overrides, "evaluation=null", f"train.steps={STEPS}"]
        words += [f"train.micro_batch_size={micro}", f"train.global_batch_size={whole}", "train.dry_run=false"]
        if torch.cuda.is_available():
            words.append("train.precision=bf16")
        words += [f"tokenizer.model={self.tokenizer_model}", f"run_dir={run_dir}"]
        words.append(f"model.vocab_size={Tokenizer(self.tokenizer_model).size}")
        prefix = self.lm if stage == "pretrain" else self.folder / "distinct"
        return [*words, f"data.sources=[{{prefix: {prefix}}}]"]

    def config(self, stage: str, model: str, name: str, more: Sequence[str] = ()) -> RunConfig:
        """Of a run whose folder is called `name`."""
        words = self.overrides(stage, model, self.folder / name)
        config = load_config(CONFIGS / f"{stage}.yaml", [*words, *more])
        check_config(config, 1)
        return config

    def write_distinct_pairs(self, num_rows: int) -> None:
        """Write pairs whose texts all differ: only then is every other document of a batch a negative.

        Raises:
            ValueError: there are fewer than `num_rows`.
        """
        store = PairStore(self.pairs, Tokenizer(self.tokenizer_model))
        seen: set[str] = set()
        rows = []
        for row in np.random.default_rng(0).permutation(store.num_rows):
            query, document = store.text(store.query(row)), store.text(store.positives(row)[0])
            if query.strip() and document.strip() and query != document and not seen & {query, document}:
                rows.append({"query": query, "positive": document})
                seen |= {query, document}
            if len(rows) == num_rows:
                break
        else:
            raise ValueError(f"{self.pairs} has {len(rows)} pairs with texts of their own; {num_rows} are asked for")
        file = self.folder / "distinct.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        preprocess_pairs("retrieval", [file], self.tokenizer_model, self.folder / "distinct", num_workers=1)


def build(config: RunConfig) -> Trainer:
    """As `main.run` does, in place of an earlier one."""
    device = initialize_distributed()
    setup = Setup(config, build_context(config.parallel, device), Tokenizer(config.tokenizer.model))
    return build_trainer(setup, build_hooks(setup))


def our_step(trainer: Trainer, batch: object) -> dict[str, float]:
    """Forward, backward and update on a batch that lies ready; returns the step's metrics."""
    forward_backward = partial(trainer.parts.forward_backward, trainer.chunks, batch)
    return train_step(trainer.chunks, trainer.optimizer, forward_backward, trainer.setup.context, trainer.phases)


def model_flops(trainer: Trainer, batch: object) -> float:
    """What `mfu` counts of a step on the batch, which is made."""
    values, config = our_step(trainer, batch), trainer.setup.config
    return step_flops(config, values["tokens"], values["attended_pairs"], causal=not config.is_contrastive)


def plain_counterpart(trainer: Trainer, form: Form) -> PlainTraining:
    """The same model with the same weights."""
    m, o = trainer.setup.config.model, trainer.setup.config.optimizer
    shape = Shape(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        head_dim=m.head_dim,
        ffn_hidden_size=m.ffn_hidden_size,
        vocab_size=m.vocab_size,
        max_seq_length=m.max_seq_length,
        rotary_base=m.rotary_base,
        norm_epsilon=m.norm_epsilon,
    )
    device = trainer.setup.context.device
    decoder = PlainDecoder(shape).to(device)
    decoder.take(dict(unwrap(trainer.chunks[0]).named_parameters()))
    return PlainTraining(decoder, Update(o.lr, (o.beta1, o.beta2), o.epsilon, o.weight_decay, o.clip_grad), form)


class PlainData:
    """The batches of a run of ours as plain tensors, from rows that lie ready: a packed file, or token lists."""

    def __init__(self, trainer: Trainer, num_steps: int) -> None:
        self.device, self.stage = trainer.setup.context.device, trainer.setup.config.stage
        self.temperature = trainer.setup.config.contrastive.temperature
        steps = [trainer.parts.data.batch(step) for step in range(1, num_steps + 1)]
        if self.stage == "pretrain":
            self.micro_batches, self.size = len(steps[0]), len(steps[0][0].tokens)
            rows = [torch.cat([b.tokens, b.labels[:, -1:]], dim=1) for step in steps for b in step]  # [b, s + 1]
            file = trainer.setup.config.run_dir / "packed.npy"
            np.save(file, torch.cat(rows).cpu().numpy().astype(np.int32))
            self.packed = np.load(file, mmap_mode="r")
        else:
            self.pairs = [_texts(step) for step in steps]

    def language(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, labels) of the micro-batches of step `step` (from 1)."""
        first = (step - 1) * self.micro_batches
        parts = [self.packed[i * self.size : (i + 1) * self.size] for i in range(first, first + self.micro_batches)]
        rows = [torch.from_numpy(part.astype(np.int64)).to(self.device) for part in parts]
        return [(row[:, :-1], row[:, 1:]) for row in rows]

    def contrastive(self, step: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, lengths) of the queries of step `step` and of their documents."""
        queries, documents = self.pairs[step - 1]
        return _padded(queries, self.device), _padded(documents, self.device)

    def batch(self, step: int) -> tuple:
        """Arguments of the plain step."""
        return (self.language(step),) if self.stage == "pretrain" else (*self.contrastive(step), self.temperature)


def _texts(step: PairStep) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tokens of the queries of a step's rows, and of their documents."""
    packed = [
        m.tokens[0][: int(m.sequences.lengths.sum())].split(m.sequences.lengths.tolist()) for m in step.micro_batches
    ]
    texts = dict(zip(step.gathered.tolist(), [text.cpu() for part in packed for text in part], strict=True))
    batch = step.batches[0]
    num_rows, num_queries = len(batch.rows), len(batch.query_ids)
    assert num_queries == len(batch.document_ids) == num_rows, "pairs have texts in common"
    queries = [texts[int(place)] for place in batch.row_query]
    return queries, [texts[num_queries + int(document)] for document in batch.positive[1]]


def _padded(texts: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, s] tokens, padded on the right, and [b] lengths."""
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return tokens.to(device), torch.tensor([len(text) for text in texts]).to(device)


def take_turns(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call's runs: of the CPU, or by the clock where there is a GPU. The calls take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    on_gpu = torch.cuda.is_available()
    now = time.perf_counter if on_gpu else time.process_time
    for _ in range(repetitions):
        for name, call in calls.items():
            if on_gpu:
                torch.cuda.synchronize()
            began = now()
            call()
            if on_gpu:
                torch.cuda.synchronize()
            seconds[name].append(now() - began)
    return seconds


def ratio_of_medians(seconds: dict[str, list[float]], name: str, other: str) -> float:
    """Median of one call's seconds over another's."""
    return statistics.median(seconds[name]) / statistics.median(seconds[other])
