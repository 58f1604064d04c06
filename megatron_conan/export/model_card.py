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
    "e = s.SentenceTransformer('.', device='cpu').encode(v['texts'], normalize_embeddings=True); "
    "print((e * numpy.array(v['vectors'])).sum(1).min())\""
)


def write_model_card(
    folder: Path, shape: ModelShape, settings: ExportSettings, *, bidirectional: bool, num_parameters: int
) -> None:
    """Writes `folder`/README.md."""
    rows = {
        "parameters": f"{num_parameters:,}",
        "layers / hidden / FFN": f"{shape.num_layers} / {shape.hidden_size} / {shape.ffn_hidden_size}",
        "heads / KV heads / head dim": f"{shape.num_attention_heads} / {shape.num_query_groups} / {shape.kv_channels}",
        "attention": "bidirectional" if bidirectional else "causal",
        "pooling": f"{settings.pooling}, prompt tokens {'included' if settings.include_prompt else 'left out'}, normalised",
        "embedding dimension": str(settings.truncate_dim or shape.hidden_size),
        "longest input": f"{settings.max_seq_length} tokens, the closing `</s>` included",
        "vocabulary": f"{shape.vocab_size:,} SentencePiece BPE pieces with byte fallback",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    prompts = "".join(f"- `{name}`: `{text!r}`\n" for name, text in settings.prompts.items())
    usage = ', prompt_name="' + next(iter(settings.prompts)) + '"' if settings.prompts else ""
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
embeddings = model.encode(["a text", "another text"]{usage})
```

| | |
|---|---|
{table}

{"Prompts:" + chr(10) + chr(10) + prompts if prompts else "The model was trained without prompts."}

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
