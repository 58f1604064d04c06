"""Look at tokenised files: `python data_tools/inspect_dataset.py --prefix P [P ...] [--tokenizer-model M]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_conan.data.command_line import run_tool
from megatron_conan.data.dataset_checks import Dataset, check_tokens, open_dataset
from megatron_conan.data.inspection import (
    PLURAL,
    class_lines,
    contents_lines,
    duplicate_lines,
    histogram_lines,
    item_lines,
    measure_lengths,
    mix_lines,
    part_lines,
)
from megatron_conan.data.length_counts import LengthCounts
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.evaluation.svg import BarChart, draw_bars, picture


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description="Check the files of preprocess.py, preprocess_pairs.py or Megatron-LM for damage, and show what they "
        "hold. Exit code: 0 if they are whole, 1 if anything is damaged, 2 for a mistake in the command."
    )
    parser.add_argument(
        "--prefix",
        nargs="+",
        type=Path,
        required=True,
        help="the --output-prefix of the files: PREFIX.bin and PREFIX.idx",
    )
    parser.add_argument(
        "--tokenizer-model", type=Path, help="the .model they were written with; documents are shown with it"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--documents", type=int, default=3, help="documents or rows to show from the start (default: 3)")
    shown.add_argument("--ids", nargs="+", type=int, help="numbers of documents or rows to show instead")
    parser.add_argument("--histogram", type=Path, metavar="FILE.svg", help="draw the lengths")
    parser.add_argument(
        "--duplicates", action="store_true", help="count exact copies (41 bytes of temporary disk a document)"
    )
    parser.add_argument("--quick", action="store_true", help="don't read the tokens: no check of token ids and SHA-256")
    arguments = parser.parse_args(argv)
    if arguments.documents < 0:
        raise ValueError(f"--documents {arguments.documents} must be 0 or more")
    if len(set(arguments.prefix)) < len(arguments.prefix):
        raise ValueError("--prefix names the same files twice; name each once")
    if arguments.histogram is not None and arguments.histogram.suffix != ".svg":
        raise ValueError(f"--histogram {arguments.histogram} must end with .svg")
    return arguments


def show(title: str, lines: Sequence[str]) -> None:
    """Print a section; nothing if it is empty."""
    if lines:
        print(f"\n{title}")
        for line in lines:
            print(f"  {line}".rstrip())


def show_damage(dataset: Dataset, *, quick: bool) -> None:
    """Check the tokens too, and print what is damaged."""
    findings, notes = dataset.findings, []
    if findings.is_unsafe:
        notes.append("the rest cannot be read safely: nothing more is checked or shown of these files")
    elif quick:
        notes.append("tokens not read (--quick): their ids and SHA-256 are not checked")
    else:
        scan = check_tokens(dataset)
        if dataset.vocab_size is None and scan.highest >= 0:
            notes.append(
                f"highest token id {scan.highest:,}; no vocabulary is known to check it, --tokenizer-model tells"
            )
    more = findings.total - len(findings.shown)
    told = [f"damaged: {finding}" for finding in findings.shown] + ([f"... and {more:,} more"] if more else [])
    show("Damage", [*(told or ["none found"]), *notes])


def show_contents(
    dataset: Dataset, arguments: argparse.Namespace, pieces: Sequence[str] | None
) -> dict[str, LengthCounts]:
    """Print what the files hold. Returns the lengths, by what they are of."""
    lengths = measure_lengths(dataset)
    show("Contents", contents_lines(dataset, lengths))
    for name, counts in lengths.items():
        show(f"Tokens a {name}", histogram_lines(name, counts))
    show("Inputs", part_lines(dataset))
    show("Classes", class_lines(dataset))
    title = dataset.unit.capitalize()
    if pieces is None:
        show(title, ["not shown: that needs --tokenizer-model"])
    else:
        numbers = arguments.ids or range(min(arguments.documents, dataset.num_items))
        show(title, [line for number in numbers for line in item_lines(dataset, number, pieces)])
    if arguments.duplicates:
        show("Duplicates", duplicate_lines(dataset, pieces))
    return lengths


def draw_lengths(prefix: Path, lengths: dict[str, LengthCounts]) -> list[str]:
    """One chart of bars for each kind of text."""
    return [
        draw_bars(
            BarChart(
                title=f"{prefix.name}: tokens a {name}",
                x_label=f"tokens, from the number under a bar to below the next one ({len(counts):,} {PLURAL[name]})",
                y_label=PLURAL[name],
                bars=[(short_number(bucket), number) for bucket, number in counts.buckets()],
            )
        )
        for name, counts in lengths.items()
    ]


def short_number(bucket: int) -> str:
    """The smallest length of a bucket: 0, 1, 2, 4 .. 512, 1k (1024), 2k .. 1M."""
    exponent = max(bucket - 1, 0)
    return f"{(1 << exponent % 10) if bucket else 0}{'kMG'[exponent // 10 - 1] if exponent >= 10 else ''}"


def check_ids(dataset: Dataset, ids: Sequence[int]) -> None:
    """Raise ValueError for ids that are none, before anything long is begun."""
    outside = [number for number in ids if not 0 <= number < dataset.num_items]
    if outside:
        raise ValueError(
            f"--ids {outside[0]}: {dataset.prefix} has {dataset.num_items:,} {dataset.unit}, numbered from 0"
        )


def main(argv: Sequence[str]) -> None:
    """Check and show. Raises ValueError for a user's mistake, SystemExit(1) where files are damaged."""
    arguments = parse_arguments(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # for what a terminal can't show
    tokenizer = Tokenizer(arguments.tokenizer_model) if arguments.tokenizer_model else None
    datasets = [open_dataset(prefix, tokenizer) for prefix in arguments.prefix]
    readable = [dataset for dataset in datasets if not dataset.findings.is_unsafe]
    for dataset in readable:
        check_ids(dataset, arguments.ids or ())
    pieces = tokenizer.pieces() if tokenizer else None
    charts: list[str] = []
    for number, dataset in enumerate(datasets):
        print(f"{chr(10) if number else ''}{dataset.prefix}: {dataset.kind}")
        show_damage(dataset, quick=arguments.quick)
        if dataset in readable:
            charts += draw_lengths(dataset.prefix, show_contents(dataset, arguments, pieces))
    if len(datasets) > 1 and readable:
        show("Mix", mix_lines(readable))
    if arguments.histogram is not None and charts:
        arguments.histogram.parent.mkdir(parents=True, exist_ok=True)
        arguments.histogram.write_text(picture(charts), encoding="utf-8")
        print(f"\nwrote {arguments.histogram}")
    elif arguments.histogram is not None:
        print(f"\n{arguments.histogram} was not written: there are no lengths to draw")
    sys.stdout.flush()
    if any(dataset.findings.total for dataset in datasets):
        sys.exit(1)


def main_to_pipe(argv: Sequence[str]) -> None:
    """`main`, ended quietly where the reader of a pipe has seen enough."""
    try:
        main(argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


if __name__ == "__main__":
    raise SystemExit(run_tool(main_to_pipe))
