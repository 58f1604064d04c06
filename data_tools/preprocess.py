"""Tokenise text: `python data_tools/preprocess.py --input F [F ...] --tokenizer-model M --output-prefix P`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.command_line import INPUT_HELP, add_input_options, rejected_text, run_tool
from megatron_conan.data.documents import FORMATS


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description="Tokenise documents into Megatron files P.bin and P.idx, with a summary in P.json: one sequence a "
        "document in input order. The output is the same for any number of workers."
    )
    parser.add_argument("--input", nargs="+", required=True, help=INPUT_HELP)
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="the .model of train_tokenizer.py")
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.bin, .idx and .json")
    parser.add_argument("--text-key", default="text", help="key (column) of the text (default: text)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--append-eod", action="store_true", help="end every document with one EOS token")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="text: a document a row (default); bitext: rows of text1 and text2, two documents each, one in either order",
    )
    parser.add_argument(
        "--languages", nargs=2, metavar=("A", "B"), help="of text1 and text2, where neither rows nor file names tell"
    )
    parser.add_argument("--dedup", action="store_true", help="leave out documents whose text was there before")
    parser.add_argument("--min-tokens", type=int, default=0, help="leave out shorter documents (default: 0)")
    parser.add_argument("--max-tokens", type=int, help="leave out longer documents")
    add_input_options(parser)
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
        document_format=arguments.format,
        languages=arguments.languages and tuple(arguments.languages),
        min_tokens=arguments.min_tokens,
        max_tokens=arguments.max_tokens,
        dedup=arguments.dedup,
        on_error=arguments.on_error,
        restart=arguments.restart,
    )
    print(f"wrote {arguments.output_prefix}.bin: {summary['documents']:,} documents, {summary['tokens']:,} tokens")
    if summary["left_out"]:
        print(
            "left out: "
            + ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in summary["left_out"].items())
        )
    print(rejected_text(arguments.output_prefix, summary), end="")


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
