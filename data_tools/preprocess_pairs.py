"""Prepare text pairs: `python data_tools/preprocess_pairs.py --task T --input F --tokenizer-model M --output-prefix P`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_conan.data.command_line import INPUT_HELP, add_input_options, rejected_text, run_tool
from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.pair_rows import TASKS


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description="Tokenise every distinct text of pair data once (P.bin, P.idx) and write the table of ids beside "
        "it (P.*.npy), with a summary in P.json. Schemas: data_tools/README.md."
    )
    parser.add_argument("--task", choices=TASKS, required=True, help="what a row is")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="rows: .jsonl (also .gz or .zst) or .parquet; files, folders or 'patterns'",
    )
    parser.add_argument("--corpus", nargs="+", default=[], help=f"further documents: {INPUT_HELP}")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="the .model of train_tokenizer.py")
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.bin, .idx, .*.npy and .json")
    parser.add_argument("--text-key", default="text", help="key of the text in --corpus files (default: text)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    add_input_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Tokenise and write. Raises ValueError for a user's mistake; then nothing is written."""
    arguments = parse_arguments(argv)
    summary = preprocess_pairs(
        arguments.task,
        arguments.input,
        arguments.tokenizer_model,
        arguments.output_prefix,
        corpus=arguments.corpus,
        text_key=arguments.text_key,
        num_workers=arguments.workers,
        on_error=arguments.on_error,
        restart=arguments.restart,
    )
    print(
        f"wrote {arguments.output_prefix}.json: {summary['rows']:,} rows, {summary['texts']:,} distinct texts, "
        f"{summary['documents']:,} of them documents, {summary['tokens']:,} tokens"
    )
    if "classes" in summary:
        print(
            f"{summary['classes']:,} classes; dropped {summary['repeated_rows']:,} repeated rows, "
            f"{summary['conflicting_rows']:,} with a second label, {summary['single_rows']:,} alone in their class"
        )
    print(rejected_text(arguments.output_prefix, summary), end="")


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
