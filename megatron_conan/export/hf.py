"""Writes a trained model as a SentenceTransformer folder, reads it back with the stock libraries and compares vectors.

The folder needs nothing of this package: a Llama config and weights, a fast tokenizer, `modules.json` (Transformer,
Pooling, with a projection Dense, Normalize), the prompts, `verify.json` (texts and their trained vectors, without prompt and
with each) and a model card with a one-line check.
Legend: n texts, e embedding dim.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import LlamaConfig

from megatron_conan.data.format import check_prompts
from megatron_conan.export.mapping import PROJECTION, ModelShape, to_hf
from megatron_conan.export.model_card import write_model_card
from megatron_conan.export.tokenizer import convert_tokenizer, verify_tokenizer
from megatron_conan.model.pooling import PoolingMode

Reference = Callable[[list[str], str | None], np.ndarray]
"""The trained model: n texts and the name of the prompt before each (None: no prompt) -> [n, e], whole, of any length."""

MIN_COSINE = 0.99999
BIDIRECTIONAL_SINCE = "5.2.0"  # transformers before it ignores `is_causal=False` in a Llama config, silently
VERIFY_FILE = "verify.json"
DENSE_FOLDER = "2_Dense"
POOLING_KEYS: dict[PoolingMode, str] = {
    "mean": "pooling_mode_mean_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class ExportSettings:
    """What the exported folder states beside the weights."""

    tokenizer_path: str | Path
    """SentencePiece model the run was trained with."""
    alpha: float
    """Final opening of the soft mask: 0 (causal) or 1 (bidirectional); stock models have nothing between."""
    pooling: PoolingMode
    max_seq_length: int
    """Tokens, prompt and `</s>` included."""
    max_query_length: int | None = None
    """Tokens that queries were cut to in training, which the folder can't express; told in the model card."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prompt name -> text put before the input by `encode(..., prompt_name=name)`; each ends in a line break."""
    include_prompt: bool = True
    """Whether prompt tokens enter the pooling, as they did in training."""
    truncate_dim: int | None = None
    """Matryoshka dimension that `encode` cuts to by default; None keeps all."""
    matryoshka_dims: Sequence[int] = ()
    """Sizes that the embedding was also trained to be cut to."""
    name: str = "megatron_conan model"
    """Title of the model card."""


@dataclass(frozen=True)
class ExportReport:
    """Outcome of an export."""

    folder: Path
    min_cosine: float
    """Worst cosine between a trained vector and the stock libraries' vector over the verification texts."""
    num_parameters: int


def export_sentence_transformer(
    state_dict: Mapping[str, Tensor],
    shape: ModelShape,
    settings: ExportSettings,
    out_dir: str | Path,
    *,
    verify_texts: Sequence[str],
    reference: Reference,
) -> ExportReport:
    """Writes the folder under a temporary name, checks it with stock sentence-transformers, then renames it to `out_dir`.

    One process calls it (rank 0), with the gathered weights. An earlier export at `out_dir` is replaced.

    Args:
        state_dict: full, unsharded weights under megatron names; the embedding may have padding rows.
        verify_texts: n texts that go into `verify.json`.
        reference: the trained model, cutting to `settings.max_seq_length` tokens.

    Raises:
        ValueError: settings or weights that a stock model cannot express, or a folder at `out_dir` that is no export.
        RuntimeError: the stock libraries' vectors differ from the trained model's; nothing is left at `out_dir`.
    """
    out_dir, texts = Path(out_dir), list(verify_texts)
    _check_settings(settings, shape, texts)
    _require_replaceable(out_dir)
    names = [name for name, text in settings.prompts.items() if text]
    vectors = {name: _embed(reference, texts, name, shape, settings.truncate_dim) for name in (None, *names)}
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        folder.chmod(0o755)
        num_parameters = _write_model(folder, state_dict, shape, settings)
        _write_tokenizer(folder, settings, shape, texts)
        _write_modules(folder, shape, settings)
        write_json(
            folder / VERIFY_FILE,
            {
                "texts": texts,
                "vectors": vectors[None],
                "vectors_by_prompt": {name: vectors[name] for name in names},
                "min_cosine": MIN_COSINE,
                "versions": library_versions(),
            },
        )
        write_model_card(folder, shape, settings, bidirectional=bool(settings.alpha), num_parameters=num_parameters)
        min_cosine = verify_export(folder)
        _replace_folder(folder, out_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ExportReport(out_dir, min_cosine, num_parameters)


def verify_export(folder: str | Path) -> float:
    """Encodes the texts of `verify.json` with stock sentence-transformers (CPU), without prompt and with each.

    Returns the worst cosine to the vectors that stand there.

    Raises:
        RuntimeError: a vector is off by more than the stored tolerance (an old transformers, changed files).
    """
    folder = Path(folder)
    record = json.loads((folder / VERIFY_FILE).read_text(encoding="utf-8"))
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    lowest = 1.0
    for prompt, vectors in {None: record["vectors"], **record.get("vectors_by_prompt", {})}.items():
        expected = np.asarray(vectors)
        found = model.encode(
            record["texts"], prompt_name=prompt, normalize_embeddings=True, show_progress_bar=False
        ).astype(np.float64)
        if found.shape != expected.shape:
            raise RuntimeError(f"{folder} gives vectors of shape {found.shape}, {VERIFY_FILE} holds {expected.shape}")
        cosines = (found * expected).sum(axis=1)
        worst = int(np.argmin(np.nan_to_num(cosines, nan=-1.0)))
        if not cosines[worst] > record["min_cosine"]:
            raise RuntimeError(
                f"{folder} does not give the trained model's vectors: cosine {cosines[worst]:.6f} (must exceed "
                f"{record['min_cosine']}) on text {record['texts'][worst][:100]!r} "
                f"{'without prompt' if prompt is None else f'with prompt {prompt!r}'}; written with {record['versions']}, "
                f"read with {library_versions()}"
            )
        lowest = min(lowest, float(cosines[worst]))
    return lowest


def library_versions() -> dict[str, str]:
    """Versions of the libraries that the vectors depend on."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "sentence-transformers")}


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON, one line at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_settings(settings: ExportSettings, shape: ModelShape, texts: list[str]) -> None:
    if settings.alpha not in (0, 1):
        raise ValueError(
            f"alpha={settings.alpha}: a stock Llama is causal (alpha 0) or bidirectional (alpha 1) and cannot "
            "express a half-open mask; train until the schedule ends at 1, or use a schedule that does"
        )
    if settings.alpha and Version(version("transformers")) < Version(BIDIRECTIONAL_SINCE):
        raise ValueError(
            f"transformers {version('transformers')} ignores is_causal=False in a Llama config; install "
            f"transformers >= {BIDIRECTIONAL_SINCE}"
        )
    if settings.pooling not in POOLING_KEYS:
        raise ValueError(f"pooling={settings.pooling!r} must be one of {sorted(POOLING_KEYS)}")
    check_prompts(settings.prompts)
    if settings.max_seq_length < 2:
        raise ValueError(f"max_seq_length={settings.max_seq_length} must be at least 2: one token and </s>")
    if settings.truncate_dim is not None and not 0 < settings.truncate_dim <= shape.embedding_dim:
        raise ValueError(f"truncate_dim={settings.truncate_dim} must lie in 1 .. embedding dim={shape.embedding_dim}")
    if not texts:
        raise ValueError("verify_texts is empty: an export is checked on at least one text")


def _require_replaceable(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or (any(out_dir.iterdir()) and not (out_dir / VERIFY_FILE).exists())):
        raise ValueError(f"{out_dir} exists and is no earlier export (no {VERIFY_FILE}); choose another output folder")


def _write_model(folder: Path, state_dict: Mapping[str, Tensor], shape: ModelShape, settings: ExportSettings) -> int:
    """Writes config.json and model.safetensors (float32, which the check needs), and those of a projection.

    Returns the number of parameters.
    """
    config = LlamaConfig(
        architectures=["LlamaModel"],
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        hidden_act="silu",
        max_position_embeddings=settings.max_seq_length,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rotary_base},
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        use_cache=False,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        dtype=torch.float32,
    )
    config.is_causal = not settings.alpha
    config.save_pretrained(folder)
    rest = dict(state_dict)
    projection = rest.pop(PROJECTION, None)
    num_parameters = _save_weights(folder, to_hf(rest, shape))
    if projection is not None or shape.projection_dim is not None:
        num_parameters += _write_projection(folder / DENSE_FOLDER, projection, shape)
    return num_parameters


def _write_projection(folder: Path, weight: Tensor | None, shape: ModelShape) -> int:
    """Writes sentence-transformers' Dense module with the four keys that all its releases from 5.0 on know."""
    expected = (shape.projection_dim, shape.hidden_size)
    if weight is None or tuple(weight.shape) != expected:
        found = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
        raise ValueError(f"{PROJECTION} is {found}; the model shape asks for {expected}")
    folder.mkdir()
    config = {"in_features": shape.hidden_size, "out_features": shape.projection_dim, "bias": False}
    write_json(folder / "config.json", {**config, "activation_function": "torch.nn.modules.linear.Identity"})
    return _save_weights(folder, {"linear.weight": weight})


def _save_weights(folder: Path, weights: Mapping[str, Tensor]) -> int:
    """Writes model.safetensors in float32; returns the number of parameters."""
    single = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in weights.items()}
    save_file(single, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in single.values())


def _write_tokenizer(folder: Path, settings: ExportSettings, shape: ModelShape, texts: list[str]) -> None:
    tokenizer = convert_tokenizer(settings.tokenizer_path, settings.max_seq_length)
    if len(tokenizer) != shape.vocab_size:
        raise ValueError(
            f"vocab_size={shape.vocab_size} of the model differs from the {len(tokenizer)} pieces of "
            f"{settings.tokenizer_path}; pass the tokenizer the run was trained with"
        )
    prompts = ["", *settings.prompts.values()]
    verify_tokenizer(settings.tokenizer_path, tokenizer, [prompt + text for prompt in prompts for text in texts])
    tokenizer.save_pretrained(folder)


def _write_modules(folder: Path, shape: ModelShape, settings: ExportSettings) -> None:
    """Writes the files that sentence-transformers reads, in the form that its releases from 5.0 on share."""
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if shape.projection_dim is not None:
        parts.append((DENSE_FOLDER, "Dense"))
    parts.append((f"{len(parts)}_Normalize", "Normalize"))
    write_json(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(parts)
        ],
    )
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": settings.max_seq_length, "do_lower_case": False}
    )
    (folder / "1_Pooling").mkdir()
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": shape.hidden_size,
            "include_prompt": settings.include_prompt,
            "pooling_mode_cls_token": False,
            **{key: settings.pooling == name for name, key in POOLING_KEYS.items()},
        },
    )
    (folder / parts[-1][0]).mkdir()
    versions = library_versions()
    top: dict[str, Any] = {
        "__version__": {
            "sentence_transformers": versions["sentence-transformers"],
            "transformers": versions["transformers"],
            "pytorch": versions["torch"],
        },
        "prompts": {"query": "", "document": "", **settings.prompts},  # what encode_query and encode_document look for
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    if settings.truncate_dim is not None:
        top["truncate_dim"] = settings.truncate_dim
    write_json(folder / "config_sentence_transformers.json", top)


def _replace_folder(folder: Path, out_dir: Path) -> None:
    """Renames `folder` to `out_dir`; an earlier export there is moved aside first, and removed last."""
    if not out_dir.exists():
        folder.rename(out_dir)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.old.", dir=out_dir.parent))
    out_dir.rename(aside / out_dir.name)
    folder.rename(out_dir)
    shutil.rmtree(aside)


def _embed(
    reference: Reference, texts: list[str], prompt: str | None, shape: ModelShape, truncate_dim: int | None
) -> list[list[float]]:
    """The trained model's vectors, cut and scaled to length 1, as `verify.json` holds them."""
    vectors = np.asarray(reference(texts, prompt), dtype=np.float64)
    if vectors.shape != (len(texts), shape.embedding_dim):
        raise ValueError(
            f"reference vectors have shape {vectors.shape}, expected one row of embedding dim={shape.embedding_dim} for "
            f"each of the {len(texts)} verify_texts"
        )
    vectors = vectors[:, :truncate_dim]
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return [[float(f"{x:.8g}") for x in row] for row in vectors]
