"""Train the tokenizer: `python data_tools/train_tokenizer.py --input F [F ...] --vocab-size N --output-prefix P`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_conan.data.command_line import publish, run_tool, staging_folder
from megatron_conan.data.documents import DocumentFormat
from megatron_conan.data.input_files import InputFile, find_inputs
from megatron_conan.data.text_files import read_all
from megatron_conan.data.tokenizer_training import train_tokenizer


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description="Train a SentencePiece BPE tokenizer with byte fallback; writes P.model. Same input, same bytes."
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help=".jsonl or .txt (one document a line)")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, including special and byte pieces")
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.model")
    parser.add_argument("--text-key", default="text", help="key of the text in .jsonl (default: text)")
    parser.add_argument("--reserved", type=int, default=0, help="control tokens to reserve (default: 0)")
    parser.add_argument(
        "--character-coverage", type=float, default=0.9995, help="share of characters with a piece (default: .9995)"
    )
    return parser.parse_args(argv)


def read_documents(files: Sequence[InputFile], text_key: str) -> Iterator[str]:
    """Texts of all files in order. Raises ValueError with file and line."""
    source = DocumentFormat(text_key=text_key)
    for file in files:
        for texts in read_all(file, partial(source.texts, file), source.columns):
            yield from texts


def main(argv: Sequence[str]) -> None:
    """Train and write the model. Raises ValueError for a user's mistake; then nothing is written."""
    arguments = parse_arguments(argv)
    files = find_inputs(arguments.input)
    with staging_folder(arguments.output_prefix) as folder:
        model = train_tokenizer(
            read_documents(files, arguments.text_key),
            arguments.vocab_size,
            num_reserved=arguments.reserved,
            character_coverage=arguments.character_coverage,
        )
        (folder / "out.model").write_bytes(model)
        publish(folder, arguments.output_prefix, [".model"])
    print(f"wrote {arguments.output_prefix}.model: {arguments.vocab_size} pieces")


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
