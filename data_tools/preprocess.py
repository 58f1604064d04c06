"""Tokenise text: `python data_tools/preprocess.py --input F [F ...] --tokenizer-model M --output-prefix P`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.command_line import run_tool


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description="Tokenise documents into Megatron files P.bin and P.idx, with a summary in P.json: one sequence a "
        "document in input order. The output is the same for any number of workers."
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help=".jsonl or .txt (one document a line)")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="the .model of train_tokenizer.py")
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.bin, .idx and .json")
    parser.add_argument("--text-key", default="text", help="key of the text in .jsonl (default: text)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--append-eod", action="store_true", help="end every document with one EOS token")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Tokenise and write. Raises ValueError for a user's mistake; then nothing is written."""
    arguments = parse_arguments(argv)
    summary = preprocess_documents(
        arguments.input,
        arguments.tokenizer_model,
        arguments.output_prefix,
        text_key=arguments.text_key,
        num_workers=arguments.workers,
        append_eod=arguments.append_eod,
    )
    print(f"wrote {arguments.output_prefix}.bin: {summary['documents']:,} documents, {summary['tokens']:,} tokens")


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
