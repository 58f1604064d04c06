"""`conan`: everything but training, which starts from launch/."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_conan.parallel import hide_engine_warnings

RELATIVE_MARGIN = 0.95
VERIFY_TEXTS = (
    "open a zip file",
    "def add(a, b):\n    return a + b",
    "Grüße aus Köln, 北京, مرحبا",
    "a",
    "one two three four five six seven eight nine ten " * 40,
)
"""Texts an export is checked on: short, long beyond the limit, several scripts, white space."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, 2 after a user's mistake, told in one line (a node, under torchrun), 130 if interrupted."""
    arguments = _parser().parse_args(argv)
    hide_engine_warnings()
    try:
        arguments.run(arguments)
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            from megatron_conan.main import SECONDS_FOR_RANK_0

            time.sleep(SECONDS_FOR_RANK_0)  # local rank 0 tells the same
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="conan", description="Plan, evaluate, export and search trained embedders.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="what a config will train: parameters, batch, memory; starts nothing")
    plan.add_argument("--config", type=Path, required=True)
    plan.add_argument("--world-size", type=int, default=1, help="number of ranks (default: %(default)s)")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value")
    plan.set_defaults(run=_plan)

    evaluate = commands.add_parser("eval", help="score a run or an exported folder with mteb")
    evaluate.add_argument("model", type=Path, help="run folder, or SentenceTransformer folder")
    evaluate.add_argument("--task", nargs="+", required=True, help="BEIR folder, STS .jsonl, or name of an mteb task")
    evaluate.add_argument("--out", type=Path, help="folder for the JSON (default: MODEL/evaluation)")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="write a run as a SentenceTransformer folder")
    export.add_argument("run_dir", type=Path, metavar="RUN")
    export.add_argument("--out", type=Path, required=True)
    export.set_defaults(run=_export)

    search = commands.add_parser("search", help="search the functions that the demo indexed")
    search.add_argument("run_dir", type=Path, metavar="RUN", help="the demo's folder, runs/demo")
    search.add_argument("question")
    search.add_argument("--k", type=int, default=10, help="hits (default: %(default)s)")
    search.add_argument("--bm25", action="store_true", help="fuse with BM25 (reciprocal rank fusion)")
    search.add_argument("--raw", action="store_true", help="don't split identifiers in the question")
    search.set_defaults(run=_search)

    report = commands.add_parser("report", help="write report.html of one or more runs")
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN")
    report.add_argument("--out", type=Path, help="file (default: report.html in the first run)")
    report.set_defaults(run=_report)

    _add_mine(commands.add_parser("mine", help="hard negatives for rows of texts; in one process, or under torchrun"))
    return parser


def _add_mine(mine: argparse.ArgumentParser) -> None:
    mine.add_argument("model", type=Path, metavar="MODEL", help="run folder, or SentenceTransformer folder")
    mine.add_argument("--input", type=Path, nargs="+", required=True, metavar="ROWS.jsonl", help="retrieval rows")
    mine.add_argument(
        "--output-prefix", type=Path, required=True, metavar="P", help="writes P.jsonl, P.short.jsonl, P.json"
    )
    mine.add_argument(
        "--corpus", type=Path, nargs="+", default=[], metavar="FILE", help="further documents, .jsonl or .txt"
    )
    mine.add_argument("--text-key", default="text", help="key of the text in --corpus (default: %(default)s)")
    mine.add_argument("--num-negatives", type=int, default=7, help="a query (default: %(default)s)")
    mine.add_argument("--window", type=int, default=100, help="nearest documents looked at (default: %(default)s)")
    mine.add_argument("--skip-top", type=int, default=0, help="nearest documents passed over (default: %(default)s)")
    margin = mine.add_mutually_exclusive_group()
    margin.add_argument(
        "--margin",
        type=_finite,
        help=f"distance from the lowest positive's score (default: {RELATIVE_MARGIN}, relative)",
    )
    margin.add_argument("--no-margin", action="store_true")
    mine.add_argument(
        "--margin-kind",
        choices=("relative", "absolute"),
        default="relative",
        help="relative: a share of the positive's score; absolute: subtracted from it (default: %(default)s)",
    )
    mine.add_argument("--ceiling", type=_finite, help="highest score of a negative")
    mine.add_argument("--sample-seed", type=int, help="draw from all candidates instead of taking the nearest")
    mine.add_argument(
        "--query-prompt", metavar="NAME", help='prompt before queries (default: the model\'s; "" for none)'
    )
    mine.add_argument(
        "--document-prompt", metavar="NAME", help='prompt before documents (default: the model\'s; "" for none)'
    )
    mine.add_argument("--max-tokens", type=int, help="of one encoding batch (default: what suits model and device)")
    mine.add_argument("--scratch-dir", type=Path, help="embeddings on disk, from which an interrupted mining goes on")
    mine.add_argument("--gpu-memory-gib", type=_finite, help="GPU memory of the search (default: half of what is free)")
    mine.add_argument("--gpu-fp16", action="store_true", help="search in half precision on the GPU")
    mine.add_argument("--scores", action="store_true", help="add positive_scores and negative_scores to the rows")
    mine.set_defaults(run=_mine)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _plan(arguments: argparse.Namespace) -> None:
    from megatron_conan.config import check_config, load_config
    from megatron_conan.config.plan import format_plan

    config = load_config(arguments.config, arguments.overrides)
    check_config(config, arguments.world_size)
    print(format_plan(config, arguments.world_size))


def _is_run(folder: Path) -> bool:
    """Whether this is a run folder, not a SentenceTransformer folder. Raises ValueError if it is neither."""
    if (folder / "config.yaml").exists():
        return True
    if not (folder / "modules.json").exists():
        raise ValueError(
            f"{folder} is neither a run folder (config.yaml) nor a SentenceTransformer folder (modules.json)"
        )
    return False


def _evaluate(arguments: argparse.Namespace) -> None:
    from megatron_conan.evaluation.encoder import EmbeddingEncoder
    from megatron_conan.evaluation.run import run_mteb

    model: EmbeddingEncoder | Path = arguments.model
    details = None
    if _is_run(arguments.model):
        from megatron_conan.export.trained import load_run

        run = load_run(arguments.model)
        model = EmbeddingEncoder(run.embed, name=f"megatron_conan/{arguments.model.name}", revision=f"step_{run.step}")
        details = {"step": run.step, "prompts": run.config.prompts}
    scores = run_mteb(model, arguments.task, arguments.out or arguments.model / "evaluation", details=details)
    print(json.dumps(scores, indent=2))


def _export(arguments: argparse.Namespace) -> None:
    from megatron_conan.export.trained import export_run, load_run

    report = export_run(load_run(arguments.run_dir), arguments.out, VERIFY_TEXTS)
    print(
        f"wrote {report.folder}: {report.num_parameters:,} parameters; stock sentence-transformers gives the trained "
        f"vectors (worst cosine {report.min_cosine:.7f})"
    )


def _search(arguments: argparse.Namespace) -> None:
    from megatron_conan.evaluation.search import run_search

    print(run_search(arguments.run_dir, arguments.question, k=arguments.k, bm25=arguments.bm25, raw=arguments.raw))


def _report(arguments: argparse.Namespace) -> None:
    from megatron_conan.evaluation.report import write_report

    for folder in arguments.run_dirs:
        if not (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder} is not a run folder: metrics.jsonl does not exist")
    out = arguments.out or arguments.run_dirs[0] / "report.html"
    write_report({folder.name: folder for folder in arguments.run_dirs}, {}, out)
    print(f"wrote {out}")


def _mine(arguments: argparse.Namespace) -> None:
    from megatron_conan.data.input_files import find_inputs

    # so that a terminated mining also removes its temporary folder
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if arguments.margin_kind == "absolute" and arguments.margin is None and not arguments.no_margin:
        raise ValueError("--margin-kind absolute has no default margin; name one with --margin")
    margin = RELATIVE_MARGIN if arguments.margin is None else arguments.margin
    is_run = _is_run(arguments.model)
    find_inputs(arguments.input, (".jsonl",))  # these before the heavy imports
    find_inputs(arguments.corpus)
    from megatron_conan.export.text_models import FolderModel, RunModel
    from megatron_conan.mining.local_search import SearchSettings
    from megatron_conan.mining.offline import MineRequest, format_summary, mine_files
    from megatron_conan.mining.select import SelectionSettings
    from megatron_conan.parallel.context import destroy_context

    request = MineRequest(
        arguments.input,
        arguments.output_prefix,
        SelectionSettings(
            arguments.num_negatives,
            arguments.window,
            arguments.skip_top,
            None if arguments.no_margin else margin,
            arguments.margin_kind,
            arguments.ceiling,
            arguments.sample_seed,
        ),
        corpus=arguments.corpus,
        text_key=arguments.text_key,
        query_prompt=arguments.query_prompt,
        document_prompt=arguments.document_prompt,
        max_tokens=arguments.max_tokens,
        search=SearchSettings(arguments.gpu_memory_gib, arguments.gpu_fp16),
        scratch_dir=arguments.scratch_dir,
        with_scores=arguments.scores,
    )
    try:
        summary = mine_files(request, lambda: (RunModel.load if is_run else FolderModel)(arguments.model))
        if os.environ.get("RANK", "0") == "0":
            print(format_summary(summary, arguments.output_prefix))
    finally:
        destroy_context()


if __name__ == "__main__":
    sys.exit(main())
