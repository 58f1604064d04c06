"""Train the tokenizer: `python data_tools/train_tokenizer.py --input F [F ...] --vocab-size N --output-prefix P`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_conan.data.command_line import INPUT_HELP, publish, run_tool, staging_folder, write_json
from megatron_conan.data.documents import FORMATS, DocumentFormat
from megatron_conan.data.input_files import find_inputs
from megatron_conan.data.passes import Inputs
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_sampling import (
    Corpus,
    FertilityText,
    language_shares,
    parse_weights,
    sampling_rates,
    write_sample,
)
from megatron_conan.data.trainer_process import train_on_file

COLUMNS = ("share", "characters", "tokens_per_word", "characters_per_token", "bytes_per_token", "byte_tokens")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description="Train a SentencePiece BPE tokenizer with byte fallback; writes P.model, and P.report.json with its "
        "fertility by language. Same input, same bytes."
    )
    parser.add_argument("--input", nargs="+", required=True, help=INPUT_HELP)
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, including special and byte pieces")
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.model and PREFIX.report.json")
    parser.add_argument("--text-key", default="text", help="key (column) of the text (default: text)")
    parser.add_argument("--format", choices=FORMATS, default="text", help="as in preprocess.py")
    parser.add_argument("--languages", nargs=2, metavar=("A", "B"), help="as in preprocess.py")
    parser.add_argument(
        "--language-key",
        default="lang",
        help="key of a row's language (default: lang); rows without have their file's name",
    )
    parser.add_argument(
        "--language-weights",
        nargs="+",
        default=[],
        metavar="L=W",
        help="shares of the text of some languages, e.g. zh=.3 en=.4; the others share the rest",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="languages without a weight by characters^(1/T): 1 as found (default), larger closer to alike",
    )
    parser.add_argument("--sample-characters", type=int, help="train on a sample of about so much text (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument(
        "--special-tokens", nargs="*", default=["<sep>"], help="control tokens, ids from 4 on (default: <sep>)"
    )
    parser.add_argument("--reserved", type=int, default=0, help="further control tokens to reserve (default: 0)")
    parser.add_argument(
        "--character-coverage", type=float, default=0.9995, help="share of characters with a piece (default: .9995)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that read (default: 1)")
    return parser.parse_args(argv)


def print_fertility(languages: Mapping[str, Mapping[str, Any]]) -> None:
    """A table, the languages with most text first."""
    rows = [("language", *COLUMNS)]
    for name, values in sorted(languages.items(), key=lambda item: -item[1]["characters"]):
        rows.append((name, *(f"{values[column]:,}" for column in COLUMNS)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def main(argv: Sequence[str]) -> None:
    """Train and write the model. Raises ValueError for a user's mistake; then nothing is written."""
    arguments = parse_arguments(argv)
    weights = parse_weights(arguments.language_weights)
    if arguments.sample_characters is not None and arguments.sample_characters < 1:
        raise ValueError(f"--sample-characters {arguments.sample_characters} must be at least 1")
    files = find_inputs(arguments.input)
    languages = arguments.languages and tuple(arguments.languages)
    source = DocumentFormat(arguments.format, arguments.text_key, languages, arguments.language_key)
    source.check(files)
    with staging_folder(arguments.output_prefix) as folder:
        corpus = Corpus(Inputs(files), source, arguments.workers)
        rates = {}
        if weights or arguments.temperature != 1 or arguments.sample_characters is not None:
            characters = corpus.characters()
            shares = language_shares(characters, weights, arguments.temperature)
            rates = sampling_rates(characters, shares, arguments.sample_characters)
        fertility = FertilityText()
        write_sample(folder / "sample", corpus.draw(rates, arguments.seed), fertility)
        settings = {
            "special_tokens": arguments.special_tokens,
            "num_reserved": arguments.reserved,
            "character_coverage": arguments.character_coverage,
        }
        train_on_file(folder / "sample", folder / "out.model", arguments.vocab_size, settings)
        tokenizer = Tokenizer(folder / "out.model")
        report = {
            "vocab_size": arguments.vocab_size,
            "tokenizer_sha256": tokenizer.sha256,
            **settings,
            "languages": fertility.report(tokenizer),
        }
        write_json(folder / "out.report.json", report)
        publish(folder, arguments.output_prefix, [".model", ".report.json"])
    print_fertility(report["languages"])
    print(f"wrote {arguments.output_prefix}.model: {arguments.vocab_size} pieces")


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
