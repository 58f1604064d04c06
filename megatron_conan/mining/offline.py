"""Hard negatives for rows in text files, by any model: what `conan mine` does, with the code of in-training mining.

Shapes: `u` distinct queries, `n` documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_conan.data.command_line import publish, staging_folder, write_json
from megatron_conan.data.format import TextKind
from megatron_conan.data.ragged import Ragged
from megatron_conan.mining.encode import Embed, EmbeddedTexts, encode_blocks, encode_corpus
from megatron_conan.mining.exchange import gather_counts
from megatron_conan.mining.local_search import SearchSettings, check_search
from megatron_conan.mining.pools import MiningSource, Pools, mine_pools, shortened
from megatron_conan.mining.row_files import NumberedRows, read_rows, write_mined_rows, write_short_queries
from megatron_conan.mining.rows import Scratch
from megatron_conan.mining.select import SelectionSettings
from megatron_conan.parallel.context import ParallelContext

OUTPUT_SUFFIXES = (".jsonl", ".short.jsonl", ".json")


@dataclass(frozen=True)
class PreparedTexts:
    """Texts that are ready to be embedded."""

    lengths: np.ndarray
    """[n] int64 tokens of each, known or estimated: texts of similar length form a batch."""
    embed: Embed
    """Batches of positions, 0 to n - 1, to embeddings."""


class TextModel(Protocol):
    """A model that every rank holds whole."""

    name: str
    """For the record."""
    width: int
    """Embedding dim."""
    context: ParallelContext
    """The grid of ranks, data-parallel only."""
    batch_tokens: int
    """Tokens of an encoding batch that suits the model and its device."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """Texts put before inputs, by name."""

    def prepare(self, texts: Sequence[str], kind: TextKind, prompt: str | None) -> PreparedTexts:
        """Texts of a kind, with the prompt of a name: the kind's own for None, none for ""."""

    def fingerprint(self) -> str:
        """What tells this model from all that give other embeddings."""


@dataclass(frozen=True)
class MineRequest:
    """What is to be mined, and how."""

    inputs: Sequence[Path]
    """Retrieval rows, .jsonl."""
    output_prefix: Path
    """P; P.jsonl, P.short.jsonl and P.json are written."""
    selection: SelectionSettings
    corpus: Sequence[Path] = ()
    """Further documents, .jsonl or .txt."""
    text_key: str = "text"
    """Key of the text in `corpus`."""
    query_prompt: str | None = None
    """Name of the prompt before queries; None for that of queries, "" for none."""
    document_prompt: str | None = None
    """Name of the prompt before documents; None for that of documents, "" for none."""
    max_tokens: int | None = None
    """Tokens of one encoding batch; what suits the model and its device if None."""
    search: SearchSettings = field(default_factory=SearchSettings)
    scratch_dir: Path | None = None
    """Folder for the embeddings, from which an interrupted mining goes on; None for memory."""
    with_scores: bool = False
    """Write the scores of positives and negatives into the rows."""

    def check(self) -> None:
        """Refuse what can't work, before anything is read. Raises ValueError."""
        selection, prefix = self.selection, self.output_prefix
        room = None if selection.window is None else selection.window - selection.skip_top
        if room is not None and room < selection.pool_size:
            raise ValueError(
                f"window={selection.window} leaves {room} documents behind skip_top={selection.skip_top}, too few for "
                f"{selection.pool_size} negatives; widen the window, or ask for fewer"
            )
        if prefix.name in ("", ".."):
            raise ValueError(f"--output-prefix {prefix} must end with a file name, e.g. {prefix / 'mined'}")
        if not prefix.parent.is_dir():
            raise ValueError(f"--output-prefix {prefix}: there is no folder {prefix.parent}; make it first")
        if not os.access(prefix.parent, os.W_OK):
            raise ValueError(f"--output-prefix {prefix}: the folder {prefix.parent} can't be written to")
        output = self._outputs()[0].resolve()
        if any(output == path.resolve() for path in (*self.inputs, *self.corpus)):
            raise ValueError(f"--output-prefix {prefix} would overwrite the input {output}; choose another")

    def _outputs(self) -> list[Path]:
        return [self.output_prefix.with_name(self.output_prefix.name + suffix) for suffix in OUTPUT_SUFFIXES]

    def record(self) -> dict[str, Any]:
        """The settings, for the summary."""
        return {
            "inputs": list(map(str, self.inputs)),
            "corpus": list(map(str, self.corpus)),
            "num_negatives": self.selection.pool_size,
            **{key: value for key, value in dataclasses.asdict(self.selection).items() if key != "pool_size"},
            "query_prompt": self.query_prompt,
            "document_prompt": self.document_prompt,
            "max_tokens": self.max_tokens,
            **dataclasses.asdict(self.search),
        }


def mine_files(request: MineRequest, load_model: Callable[[], TextModel]) -> dict[str, Any]:
    """Give every row of `request.inputs` the hard negatives that the model finds. All ranks of the world must call.

    Rows with the same query text share their negatives; the positives of all of them are known and never become some.

    Args:
        load_model: called once the rows are read; joins the ranks.

    Returns:
        The summary, as in P.json.

    Raises:
        ValueError: on all ranks, for bad input. Then no file is left and older ones stay.
    """
    seconds: dict[str, float] = {}
    request.check()
    with _timed(seconds, "read"):
        rows = read_rows(request.inputs, request.corpus, request.text_key)
        more = f" and {len(request.inputs) - 1} more" if len(request.inputs) > 1 else ""
        source = rows.source(f"{request.inputs[0]}{more}")
        source.check(request.selection.pool_size)
    with _timed(seconds, "load model"):
        model = load_model()
        check_search(request.selection.window, request.search, model.context)
        encoding = _Encoding(request, rows, source, model)
    with _timed(seconds, "encode documents"):
        documents = encoding.documents()
    with _timed(seconds, "encode and search queries"):
        pools = mine_pools(
            source,
            documents,
            encoding.queries(),
            model.context,
            request.selection,
            search=request.search,
            compared=_padded(source.positives) if request.with_scores else None,
        )
    if model.context.rank > 0:
        rows.texts.clear()  # rank 0 writes
    summary = _summary(request, model, rows, source, pools, seconds)
    _write_together(request, rows, source, pools, summary, model.context)
    encoding.remove_scratch()
    return summary


def format_summary(summary: Mapping[str, Any], prefix: Path) -> str:
    """The summary in words."""
    wanted = summary["settings"]["num_negatives"]
    mean = "" if summary["negatives"] == 0 else f", mean score {summary['mean_negative_score']:.4f}"
    lines = [
        f"wrote {prefix}.jsonl: {summary['rows']:,} rows, {summary['queries']:,} distinct queries, "
        f"{summary['documents']:,} documents",
        f"{summary['negatives']:,} negatives{mean} (positives {summary['mean_positive_score']:.4f})",
    ]
    if summary["short_queries"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary["short_queries"].items())
        number = sum(summary["short_queries"].values())
        lines.append(f"{number:,} queries have fewer than {wanted}, mainly by {reasons}: see {prefix}.short.jsonl")
    lines.append(", ".join(f"{phase} {time:.1f} s" for phase, time in summary["seconds"].items()))
    return "\n".join(lines)


@dataclass(frozen=True)
class _Encoding:
    """The texts on their way to embeddings."""

    request: MineRequest
    rows: NumberedRows
    source: MiningSource
    model: TextModel

    def __post_init__(self) -> None:
        for kind in ("query", "document"):
            name = self._prompt(kind)
            if name and name not in self.model.prompts:
                known = ", ".join(map(repr, self.model.prompts)) or "it has none"
                raise ValueError(f"--{kind}-prompt {name!r} is no prompt of {self.model.name}: {known}")

    def documents(self) -> EmbeddedTexts:
        """Embed all documents; this rank's rows."""
        ids = self.source.document_ids
        texts, settings = self._prepared("document", ids)
        return _renamed(encode_corpus(**settings, scratch=self._scratch(texts)), ids)

    def queries(self) -> Iterator[EmbeddedTexts]:
        """Embed the queries block by block; this rank's rows."""
        ids = self.source.query_ids
        _, settings = self._prepared("query", ids)
        for part in encode_blocks(**settings):
            yield _renamed(part, ids)

    def remove_scratch(self) -> None:
        """Delete what the documents' embeddings left on disk."""
        if self.request.scratch_dir is not None:
            Scratch(self._scratch_file(), "").remove(self.model.context)

    def _prompt(self, kind: TextKind) -> str | None:
        return self.request.query_prompt if kind == "query" else self.request.document_prompt

    def _prepared(self, kind: TextKind, ids: np.ndarray) -> tuple[list[str], dict[str, Any]]:
        """The texts, and how they are encoded, known by their places among them."""
        texts = [self.rows.texts[i] for i in ids.tolist()]
        prepared = self.model.prepare(texts, kind, self._prompt(kind))
        max_tokens = self.request.max_tokens
        if max_tokens is None:
            max_tokens = max(self.model.batch_tokens, int(prepared.lengths.max(initial=1)))
        return texts, {
            "embed": prepared.embed,
            "ids": np.arange(len(ids)),
            "lengths": prepared.lengths,
            "context": self.model.context,
            "width": self.model.width,
            "max_tokens": max_tokens,
            "progress": "documents" if kind == "document" else "queries, encoded and searched",
            "describe": lambda place: shortened(texts[place]),
        }

    def _scratch(self, texts: Sequence[str]) -> Scratch | None:
        """Where the documents' embeddings lie, and all that they depend on; None for memory."""
        if self.request.scratch_dir is None:
            return None
        digest = hashlib.sha256()
        for text in texts:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        depends_on = {
            "model": self.model.fingerprint(),
            "texts": digest.hexdigest(),
            "prompt": self.request.document_prompt,
            "max_tokens": [self.request.max_tokens, self.model.batch_tokens],
            "ranks": self.model.context.world_size,
        }
        return Scratch(self._scratch_file(), json.dumps(depends_on))

    def _scratch_file(self) -> Path:
        """Named after the output, so that minings at the same time don't meet."""
        assert self.request.scratch_dir is not None
        place = hashlib.sha256(str(self.request.output_prefix.resolve()).encode()).hexdigest()[:8]
        return self.request.scratch_dir / f"{self.request.output_prefix.name}.{place}"


def _renamed(part: EmbeddedTexts, ids: np.ndarray) -> EmbeddedTexts:
    """The same embeddings, known by ids (rising) instead of places among them."""
    return EmbeddedTexts(ids[part.ids], part.embeddings)


def _padded(lists: Ragged) -> np.ndarray:
    """[k, longest] int64: the lists, padded with -1."""
    result = np.full((len(lists), int(lists.counts.max(initial=0))), -1, np.int64)
    result[np.arange(result.shape[1]) < lists.counts[:, None]] = lists.values
    return result


def _summary(
    request: MineRequest,
    model: TextModel,
    rows: NumberedRows,
    source: MiningSource,
    pools: Pools,
    seconds: dict[str, float],
) -> dict[str, Any]:
    found = pools.ids >= 0
    return {
        "model": model.name,
        "rows": len(rows.row_query),
        "queries": len(source.query_ids),
        "documents": len(source.document_ids),
        "negatives": int(found.sum()),
        "mean_positive_score": float(pools.positive_scores.mean(dtype=np.float64)),
        "mean_negative_score": float(pools.scores[found].mean(dtype=np.float64)) if found.any() else None,
        "short_queries": pools.count_short(),
        "settings": request.record(),
        "ranks": model.context.world_size,
        "seconds": seconds,
    }


def _write_together(
    request: MineRequest,
    rows: NumberedRows,
    source: MiningSource,
    pools: Pools,
    summary: dict[str, Any],
    context: ParallelContext,
) -> None:
    """Rank 0 writes; a failure there ends all ranks."""
    failure: ValueError | OSError | None = None
    if context.rank == 0:
        try:
            with staging_folder(request.output_prefix) as folder:
                with _timed(summary["seconds"], "write"):
                    write_mined_rows(
                        folder / "out.jsonl", request.inputs, rows, source, pools, with_scores=request.with_scores
                    )
                    write_short_queries(folder / "out.short.jsonl", rows, source, pools)
                write_json(folder / "out.json", summary)
                publish(folder, request.output_prefix, OUTPUT_SUFFIXES)
        except (ValueError, OSError) as error:
            failure = error
    failed = gather_counts([failure is not None], context.world_group, context.world_size, context.device).any()
    if failure is not None:
        raise failure
    if failed:
        raise ValueError("rank 0 could not write the result")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[phase] = round(time.monotonic() - start, 3)
