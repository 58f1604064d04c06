"""`conan`: everything but training, which starts from launch/."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_conan.parallel import hide_engine_warnings

VERIFY_TEXTS = (
    "open a zip file",
    "def add(a, b):\n    return a + b",
    "Grüße aus Köln, 北京, مرحبا",
    "a",
    "one two three four five six seven eight nine ten " * 40,
)
"""Texts an export is checked on: short, long beyond the limit, several scripts, white space."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after a user's mistake, told in one line."""
    arguments = _parser().parse_args(argv)
    hide_engine_warnings()
    try:
        arguments.run(arguments)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
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
    return parser


def _plan(arguments: argparse.Namespace) -> None:
    from megatron_conan.config import check_config, load_config
    from megatron_conan.config.plan import format_plan

    config = load_config(arguments.config, arguments.overrides)
    check_config(config, arguments.world_size)
    print(format_plan(config, arguments.world_size))


def _evaluate(arguments: argparse.Namespace) -> None:
    from megatron_conan.evaluation.encoder import EmbeddingEncoder
    from megatron_conan.evaluation.run import run_mteb

    model: EmbeddingEncoder | Path = arguments.model
    details = None
    if (arguments.model / "config.yaml").exists():
        from megatron_conan.export.trained import load_run

        run = load_run(arguments.model)
        model = EmbeddingEncoder(run.embed, name=f"megatron_conan/{arguments.model.name}", revision=f"step_{run.step}")
        details = {"step": run.step, "prompts": run.config.prompts}
    elif not (arguments.model / "modules.json").exists():
        raise ValueError(
            f"{arguments.model} is neither a run folder (config.yaml) nor a SentenceTransformer folder (modules.json)"
        )
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


if __name__ == "__main__":
    sys.exit(main())
