"""The configuration tree: one class a YAML section, one docstring a field, units included.

Required fields have no default. Cross-field checks that need the number of ranks are in `checks.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_conan.config.operation import CheckpointConfig, ProfileConfig, WatchdogConfig
from megatron_conan.config.section import Fraction, Positive, Section


class ModelConfig(Section):
    """The decoder's shape."""

    num_layers: Positive
    """Transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_attention_heads: Positive
    """Query heads."""
    num_query_groups: Positive
    """Key/value heads (GQA); equal to `num_attention_heads` for plain multi-head attention."""
    ffn_hidden_size: Positive
    """Inner width of the SwiGLU feed-forward block."""
    vocab_size: Positive
    """Rows of the (tied) embedding table; at least the tokenizer's size, divisible by `parallel.tensor`."""
    kv_channels: Positive | None = None
    """Size of one head; `hidden_size / num_attention_heads` if not given."""
    max_seq_length: Positive
    """Longest sequence in tokens."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-6
    """Epsilon of RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    embedding_init_std: float | None = None
    """Standard deviation of the initial embedding table; `init_std` if not given."""
    residual_init_scale: float | None = None
    """Factor on `init_std` for the projections that write to the residual stream; 1/sqrt(2 num_layers) if not given."""
    spec: Literal["local", "te"] = "local"
    """Layer implementation: `local` (plain torch) or `te` (transformer-engine linears, needs a GPU)."""

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


class TokenizerConfig(Section):
    """The SentencePiece model."""

    model: Path
    """File written by data_tools/train_tokenizer.py."""


class SourceConfig(Section):
    """One data source: an output prefix of data_tools/preprocess.py (LM) or preprocess_pairs.py (pairs, SFT)."""

    prefix: Path
    """Output prefix of the preprocessing tool."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in the training mix, relative to the other sources' weights (all sources give one, or none
    does). Without weights: language-model sources alike, pair sources by `data.source_temperature`."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """The run goes through this source so often at most; what it would take beyond that, the others take by weight. The
    shares then depend on `train.steps`, which a resumed run must keep."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """What the source is called in `mix/NAME` of the metrics; the prefix's last part if not given."""
    batch_size: Positive | None = None
    """Rows of a global batch from this source (contrastive stages); `train.global_batch_size` if not given."""
    query_prompt: str | None = None
    """Name of the prompt before queries; if not given, `query` for retrieval, else the task's name."""
    document_prompt: str | None = None
    """Name of the prompt before documents; if not given, `document` for retrieval, else the task's name."""

    @property
    def label(self) -> str:
        """What the source is called."""
        return self.name or self.prefix.name


class DataConfig(Section):
    """What the stage trains on."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    """The training mix."""
    seq_length: Positive | None = None
    """Tokens of one language-model or SFT sequence; `model.max_seq_length` if not given."""
    max_query_length: Positive | None = None
    """Longest query in tokens, prompt and EOS included; `model.max_seq_length` if not given."""
    max_document_length: Positive | None = None
    """Longest document in tokens, prompt and EOS included; `model.max_seq_length` if not given."""
    source_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Pair sources without weights are drawn in proportion to rows^(1/T): 1 by size, larger values closer to alike."""


class TrainConfig(Section):
    """Length and batch of the run."""

    steps: Positive
    """Optimizer steps; schedules (learning rate, soft mask) end here."""
    micro_batch_size: Positive | None = None
    """Sequences, or pair rows with all their texts, that a data-parallel rank processes at once."""
    micro_batch_tokens: Positive | None = None
    """Contrastive stages, instead of `micro_batch_size`: tokens a data-parallel rank processes at once."""
    global_batch_size: Positive
    """Samples of one optimizer step over all ranks; a multiple of micro_batch_size x dp where that is given. Contrastive losses
    are those of the whole global batch, however many micro-batches it takes."""
    seed: Annotated[int, Field(ge=0)] = 1234
    """Seed of initialisation, shuffling and sampling."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision; bf16 keeps fp32 master weights."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Steps in a row whose loss or gradient is not finite: they are skipped and counted, and one more ends the run."""
    dry_run: bool | None = None
    """Run the largest batch there can be before step 1, so that too little memory shows there; null: on GPUs."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """The chip's dense peak in bf16, for `mfu`; null: known for common GPUs, and no `mfu` on others."""


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    decoupled_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the embedding table (as Megatron-LM's --decoupled-lr); `lr` if not given."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the last step."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    decay: Literal["linear", "cosine", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.001
    """Decoupled weight decay (matrices only)."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


class ParallelConfig(Section):
    """How the model is split; the data-parallel size is what remains of the ranks."""

    tensor: Positive = 1
    """Tensor-parallel size."""
    pipeline: Positive = 1
    """Pipeline-parallel size."""
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    """Model chunks a pipeline rank holds (interleaved 1F1B)."""
    sequence: bool = False
    """Sequence parallelism: activations between the tensor-parallel blocks are split along the sequence."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""


class AttentionConfig(Section):
    """Which implementation computes soft-mask attention."""

    backend: Literal["auto", "kernel", "two_pass", "sdpa", "reference"] = "auto"
    """Our fused CUDA kernel, two stock flash calls merged, torch's attention with a dense bias, or the plain definition; `auto`
    picks the fastest that supports the case, one asked for by name fails if it can't."""


class SoftMaskConfig(Section):
    """How causal attention opens into bidirectional attention (Conan-embedding-v2, section on the soft mask)."""

    form: Literal["row", "column", "constant", "learned"] = "row"
    """Weight above the diagonal: row min(alpha l/i, 1), column min(alpha l/j, 1), constant alpha, learned per head."""
    schedule: Literal["linear", "square", "inverse_square", "constant"] = "constant"
    """alpha(t): t/tau, (t/tau)^2, 1-(1-t/tau)^2, or `alpha` throughout; tau = `train.steps`."""
    alpha: Fraction = 0.0
    """alpha of the constant schedule: 0 is causal, 1 is bidirectional."""


class PoolingConfig(Section):
    """From token vectors to one embedding."""

    mode: Literal["mean", "weighted_mean", "last"] = "mean"
    """Mean over the sequence's tokens, mean weighted by position (1, 2, .. l), or the vector of its last token (EOS)."""
    include_prompt: bool = True
    """Whether the prompt's tokens enter the mean."""
    projection_dim: Positive | None = None
    """Size of the embedding, by a linear map behind pooling; the model's width if not given."""


InBatchNegatives = Literal["documents", "queries", "same_side"]


class TaskWeights(Section):
    """Factors on the losses, by task."""

    retrieval: Annotated[float, Field(gt=0)] = 1.0
    """InfoNCE on retrieval rows."""
    classification: Annotated[float, Field(gt=0)] = 1.0
    """InfoNCE on classification rows."""
    sts: Annotated[float, Field(gt=0)] = 1.0
    """CoSENT on scored pairs."""


class BatchBalanceConfig(Section):
    """Two tasks in every step (Conan-embedding v1, cross-GPU batch balance): InfoNCE plus weight x CoSENT."""

    scored_batch_size: Positive
    """Scored pairs of a step over all ranks, drawn from the sts sources."""
    weight: Annotated[float, Field(gt=0)] = 0.8
    """beta, the factor on CoSENT."""


class ContrastiveConfig(Section):
    """InfoNCE over the global batch, and CoSENT for scored pairs."""

    temperature: Annotated[float, Field(gt=0)] = 0.02
    """Divisor of the cosine similarities."""
    symmetric: bool = False
    """Add the document-to-query direction; the loss is the mean of both."""
    num_positives: Positive = 1
    """Most positives a query brings along; its loss is the mean over them."""
    num_hard_negatives: Annotated[int, Field(ge=0)] = 0
    """Hard negatives a query brings along (mined, those of the file, or texts of other classes)."""
    in_batch_negatives: list[InBatchNegatives] = ["documents"]
    """What else of the global batch is a negative: the documents of other queries, the other queries, and the documents
    seen from the query's positive (same_side). Empty: its own hard negatives only."""
    false_negative_margin: float | None = None
    """A candidate scoring above the (lowest) positive by more than this is no negative; off if not given."""
    matryoshka_dims: Annotated[list[Positive], Field(min_length=1)] | None = None
    """The loss is summed over embeddings cut to each of these sizes; the whole embedding alone if not given."""
    matryoshka_weights: list[Annotated[float, Field(gt=0)]] | None = None
    """Factor on the loss at each of `matryoshka_dims`; all 1 if not given."""
    cosent_temperature: Annotated[float, Field(gt=0)] = 0.05
    """Divisor of the cosine differences in CoSENT."""
    task_weights: TaskWeights = TaskWeights()
    """Factors on the losses, by task."""
    batch_balance: BatchBalanceConfig | None = None
    """Scored pairs beside every retrieval or classification batch; one source a step if absent."""


class MiningConfig(Section):
    """Hard negatives, re-mined from the whole corpus with the live weights."""

    every: Positive | None = None
    """Steps between two minings; the first is before step 1. Give this or `at`."""
    at: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of steps after which is mined; 0 is before step 1. Until the first mining the file's own negatives are used."""
    pool_size: Positive = 32
    """Candidates kept a query; replacements come from here until the next mining."""
    window: Positive = 100
    """Nearest documents looked at a query."""
    skip_top: Annotated[int, Field(ge=0)] = 0
    """Nearest candidates passed over as likely false negatives."""
    margin: float | None = 0.95
    """relative: a candidate must not score above this share of the (lowest) positive's score (0 to 1);
    absolute: it must score at least this much less. null for no test."""
    margin_kind: Literal["relative", "absolute"] = "relative"
    """What `margin` is."""
    ceiling: Annotated[float, Field(ge=-1.0, le=1.0)] | None = None
    """Highest cosine similarity of a candidate; null for no test."""
    sample: bool = False
    """Draw the pool evenly from all candidates of the window (by `train.seed` and step) instead of taking the nearest."""
    max_tokens: Positive = 16384
    """Tokens of one encoding batch."""
    scratch_dir: Path | None = None
    """Folder for a mining's embeddings, as memory-mapped files, best on a local disk: they need not fit into memory, and a
    mining that was interrupted goes on where it was. null keeps them in memory."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """GPU memory a mining may take for the search, in GiB a rank; half of what is free if null."""
    gpu_fp16: bool = False
    """Keep the searched copy of the embeddings on the GPU in fp16: half the memory, scores to about three digits."""
    rule: Literal["v2", "v1", "none"] = "v2"
    """How negatives that became easy are replaced between minings: v2 singly, v1 all of a query at once, none not at all."""
    low_score: float = 0.4
    """v2: a negative that came in below this score is replaced."""
    drop_ratio: Annotated[float, Field(gt=1.0)] | None = None
    """Replaced when drop_ratio x S < S0 ...; 1.2 (v2) or 1.15 (v1) if null."""
    high_score: float | None = None
    """... and S < high_score (v1: |S|); 0.7 (v2) or 0.8 (v1) if null."""
    rule_every: Positive = 100
    """v1: steps between two tests of the rule."""
    rule_offset: Annotated[int, Field(ge=0)] = 10
    """v1: place in the pool from which the first replacement takes its candidates."""

    def is_due(self, steps_done: int) -> bool:
        """Whether to mine between step `steps_done` and the next."""
        return steps_done in self.at if self.at is not None else steps_done % (self.every or 1) == 0

    def count(self, steps: int) -> int:
        """Number of minings in a run of `steps` steps."""
        return sum(self.is_due(done) for done in range(steps))


class EvaluationConfig(Section):
    """Retrieval quality on a held-out BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv)."""

    data: Path
    """The folder."""
    at_start: bool = False
    """Also evaluate before step 1."""
    max_tokens: Positive = 16384
    """Padded tokens of one encoding batch."""


class RunConfig(Section):
    """One training run."""

    stage: Literal["pretrain", "sft", "weak", "finetune"]
    """Which stage of the recipe."""
    run_dir: Path
    """The run's folder."""
    model: ModelConfig
    """The decoder's shape."""
    tokenizer: TokenizerConfig
    """The SentencePiece model."""
    prompts: dict[str, str] = {}
    """Text put before inputs of the contrastive stages, by name (`query`, `document`, `sts`, ...); each ends in a line
    break. Training, mining, evaluation and export use the same."""
    data: DataConfig
    """What the stage trains on."""
    train: TrainConfig
    """Length and batch."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is split."""
    attention: AttentionConfig = AttentionConfig()
    """Attention implementation."""
    soft_mask: SoftMaskConfig = SoftMaskConfig()
    """The soft mask."""
    pooling: PoolingConfig = PoolingConfig()
    """Pooling of the contrastive stages."""
    contrastive: ContrastiveConfig = ContrastiveConfig()
    """Losses of the contrastive stages."""
    mining: MiningConfig | None = None
    """Hard-negative mining; off if absent."""
    evaluation: EvaluationConfig | None = None
    """Held-out retrieval evaluation at the end of the run; off if absent."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """What happens when nothing happens."""
    profile: ProfileConfig | None = None
    """A profiler window; off if absent."""

    @property
    def is_contrastive(self) -> bool:
        """Whether the stage trains embeddings (weak, finetune) rather than next tokens (pretrain, sft)."""
        return self.stage in ("weak", "finetune")

    @property
    def embedding_dim(self) -> int:
        """Size of the embedding."""
        return self.pooling.projection_dim or self.model.hidden_size

    @property
    def seq_length(self) -> int:
        """Tokens of one LM or SFT sequence."""
        return self.data.seq_length or self.model.max_seq_length

    @property
    def max_query_length(self) -> int:
        """Longest query in tokens, prompt and EOS included."""
        return self.data.max_query_length or self.model.max_seq_length

    @property
    def max_document_length(self) -> int:
        """Longest document in tokens, prompt and EOS included."""
        return self.data.max_document_length or self.model.max_seq_length
