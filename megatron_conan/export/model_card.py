"""The README.md of an exported folder: what the model is, how to use it, and the line that checks it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_conan.export.mapping import ModelShape

if TYPE_CHECKING:
    from megatron_conan.export.hf import ExportSettings

CHECK_COMMAND = (
    "python -c \"import json, numpy, sentence_transformers as s; v = json.load(open('verify.json', encoding='utf-8')); "
    "m = s.SentenceTransformer('.', device='cpu'); print(min((m.encode(v['texts'], prompt_name=p, "
    "normalize_embeddings=True) * numpy.array(x)).sum(1).min() for p, x in "
    "{None: v['vectors'], **v['vectors_by_prompt']}.items()))\""
)
"""Vectors without prompt and with each; the worst cosine to the trained model's."""

PROMPT_COUNTED_SINCE = "5.4"
"""Before it, sentence-transformers counts the tokens of a prompt without its line break."""


def write_model_card(
    folder: Path, shape: ModelShape, settings: ExportSettings, *, bidirectional: bool, num_parameters: int
) -> None:
    """Writes `folder`/README.md."""
    rows = _facts(shape, settings, bidirectional, num_parameters)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    (folder / "README.md").write_text(
        f"""---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags:
- sentence-transformers
- sentence-similarity
---

# {settings.name}

A text-embedding model trained from scratch with megatron_conan.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OF_THIS_FOLDER")
{_usage(settings)}
```

| | |
|---|---|
{table}

{_describe_prompts(settings)}

## Check the installation

Versions of transformers that are too old ignore the attention direction of `config.json` without a word. In this folder,
run this; it must print a number above 0.99999:

```bash
{CHECK_COMMAND}
```

Written with transformers {version("transformers")} and sentence-transformers {version("sentence-transformers")}.
""",
        encoding="utf-8",
    )


def _facts(shape: ModelShape, settings: ExportSettings, bidirectional: bool, num_parameters: int) -> dict[str, str]:
    """The rows of the table."""
    projected = "" if shape.projection_dim is None else f", projected from {shape.hidden_size}"
    rows = {
        "parameters": f"{num_parameters:,}",
        "layers / hidden / FFN": f"{shape.num_layers} / {shape.hidden_size} / {shape.ffn_hidden_size}",
        "heads / KV heads / head dim": f"{shape.num_attention_heads} / {shape.num_query_groups} / {shape.kv_channels}",
        "attention": "bidirectional" if bidirectional else "causal",
        "pooling": f"{settings.pooling}, prompt tokens {'included' if settings.include_prompt else 'left out'}, normalised",
        "embedding dimension": f"{settings.truncate_dim or shape.embedding_dim}{projected}",
    }
    if settings.matryoshka_dims:
        sizes = ", ".join(map(str, sorted(settings.matryoshka_dims)))
        rows["Matryoshka sizes"] = f"{sizes} (`SentenceTransformer(..., truncate_dim=SIZE)`)"
    rows["longest input"] = f"{settings.max_seq_length} tokens, prompt and closing `</s>` included"
    queries = settings.max_query_length
    if queries is not None and queries != settings.max_seq_length:
        rows["longest query"] = (
            f"{queries} tokens in training, but {settings.max_seq_length} here: queries of up to "
            f"{min(queries, settings.max_seq_length)} tokens get the trained model's vectors, longer ones are cut elsewhere"
        )
    rows["vocabulary"] = f"{shape.vocab_size:,} SentencePiece BPE pieces with byte fallback"
    return rows


def _usage(settings: ExportSettings) -> str:
    """Lines of Python."""
    prompts = {name: text for name, text in settings.prompts.items() if text}
    if not prompts:
        return 'embeddings = model.encode(["a text", "another text"])'
    lines = ['queries = model.encode_query(["a question"])', 'documents = model.encode_document(["a text", "another"])']
    others = [name for name in prompts if name not in ("query", "document")]
    lines += [f'others = model.encode(["a text", "another"], prompt_name="{name}")' for name in others[:1]]
    return "\n".join(lines)


def _describe_prompts(settings: ExportSettings) -> str:
    """The texts put before inputs."""
    prompts = {name: text for name, text in settings.prompts.items() if text}
    if not prompts:
        return "The model was trained without prompts."
    lines = [f"- `{name}`: `{text!r}`" for name, text in prompts.items()]
    text = "\n".join(["Prompts, put before the text as it is:", "", *lines])
    if not settings.include_prompt and settings.pooling != "last":
        text += (
            f"\n\nPrompt tokens are left out of pooling, which takes sentence-transformers {PROMPT_COUNTED_SINCE} or newer: "
            "older ones miscount them."
        )
    return text
