"""Train the tokenizer: `python data_tools/train_tokenizer.py --input F [F ...] --vocab-size N --output-prefix P`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_conan.data.command_line import publish, run_tool, staging_folder
from megatron_conan.data.text_files import LineError, check_inputs, line_error, read_texts, whole_file
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


def read_documents(paths: Sequence[Path], text_key: str) -> Iterator[str]:
    """Texts of all files in order. Raises ValueError with file and line."""
    for path in paths:
        try:
            yield from read_texts(whole_file(path), text_key)
        except LineError as error:
            raise line_error(path, error) from None


def main(argv: Sequence[str]) -> None:
    """Train and write the model. Raises ValueError for a user's mistake; then nothing is written."""
    arguments = parse_arguments(argv)
    check_inputs(arguments.input)
    with staging_folder(arguments.output_prefix) as folder:
        model = train_tokenizer(
            read_documents(arguments.input, arguments.text_key),
            arguments.vocab_size,
            num_reserved=arguments.reserved,
            character_coverage=arguments.character_coverage,
        )
        (folder / "out.model").write_bytes(model)
        publish(folder, arguments.output_prefix, [".model"])
    print(f"wrote {arguments.output_prefix}.model: {arguments.vocab_size} pieces")


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
