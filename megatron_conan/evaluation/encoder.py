"""MTEB's encoder protocol around any function that embeds texts: a live model on all ranks, or an exported folder.

For a live model every rank calls mteb in the same way; `embed_texts` shards the texts and gathers the vectors inside.
Importing mteb seeds the global random generators: import this module before a run seeds its own.
"""

from pathlib import Path
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from megatron_conan.data.format import TextKind
from megatron_conan.evaluation.retrieval import EmbedTexts

TRAINED_TASKS = {"PairClassification": "sts", "MultilabelClassification": "classification"}
"""mteb's task types that take the prompt of another task that is trained."""


def task_prompt(task_type: str) -> str:
    """Name of the prompt before texts that are neither query nor document: mteb's task type in lower case (`sts`, ...)."""
    return TRAINED_TASKS.get(task_type, task_type.lower())


class EmbeddingEncoder(AbsEncoder):
    """Hands mteb's batches to `embed_texts`: queries and documents of retrieval with the prompt of their kind.

    Texts of other tasks (STS, classification, ...), which have no prompt type, count as documents and get the prompt that
    `task_prompt` names; none, if the model has no such prompt.
    """

    def __init__(self, embed_texts: EmbedTexts, *, name: str, revision: str = "local") -> None:
        """Args: name: `organisation/model`, written into results; a name without `/` becomes `local/name`."""
        self.embed_texts = embed_texts
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name if "/" in name else f"local/{name}",
                "revision": revision,
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeds all texts of a DataLoader of batches `{"text": [...]}` -> [number of texts, e] float32."""
        texts = [text for batch in inputs for text in batch["text"]]
        kind: TextKind = "query" if prompt_type == PromptType.query else "document"
        prompt = task_prompt(task_metadata.type) if prompt_type is None else None
        return np.asarray(self.embed_texts(texts, kind, prompt), dtype=np.float32)


def load_folder_encoder(folder: str | Path, *, device: str | None = None, batch_size: int = 32) -> EmbeddingEncoder:
    """Opens an exported folder with stock sentence-transformers, which applies the folder's own prompts.

    Args:
        device: as torch names it; None lets sentence-transformers choose.
    """
    folder = Path(folder)
    if not (folder / "modules.json").is_file():
        raise ValueError(f"{folder} is no SentenceTransformer folder (no modules.json); write one with `conan export`")
    model = SentenceTransformer(str(folder), device=device, local_files_only=True)

    def embed_texts(texts: list[str], kind: TextKind, prompt: str | None = None) -> np.ndarray:
        if prompt is not None:
            return model.encode(texts, batch_size=batch_size, prompt=model.prompts.get(prompt), show_progress_bar=False)
        encode = model.encode_query if kind == "query" else model.encode_document
        return encode(texts, batch_size=batch_size, show_progress_bar=False)

    return EmbeddingEncoder(embed_texts, name=folder.resolve().name)
