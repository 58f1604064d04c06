"""Chinese, English, news and parallel rows from external data, blended by weight into a pretraining run of the demo's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {"chinese": 3.0, "english": 4.0, "news": 2.0, "bitext": 1.0}
STEPS = 50


def prepare(data: Path, folder: Path) -> dict[str, str]:
    """A tokenizer of 8,192 pieces and the four sources. Returns their prefixes by name."""
    lm = data / "lm"
    inputs = {
        "chinese": [lm / "wiki_zh_cmrc_drcd.jsonl", lm / "zh_sentences.jsonl"],
        "english": [lm / "wiki_passages_en.jsonl", lm / "msmarco_passages.jsonl"],
        "news": [lm / "agnews.jsonl", lm / "argus_news_sents.jsonl", lm / "thucnews_titles.jsonl"],
        "bitext": [data / "bitext"],
    }
    tokenizer = f"{folder}/tokenizer"
    tool(
        "train_tokenizer",
        "--input",
        lm,
        "--vocab-size",
        8192,
        "--output-prefix",
        tokenizer,
        "--temperature",
        2,
        "--workers",
        2,
    )
    for name, files in inputs.items():
        options = ["--format", "bitext"] if name == "bitext" else ["--dedup"]
        model = ["--tokenizer-model", f"{tokenizer}.model", "--append-eod", "--workers", 2]
        tool("preprocess", "--input", *files, *model, *options, "--output-prefix", folder / name)
    return {name: str(folder / name) for name in inputs}


def tool(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, f"{ROOT}/data_tools/{name}.py", *map(str, arguments)], check=True)


@pytest.mark.full
def test_the_logged_mix_is_that_of_the_weights(real_data: Path, tmp_path: Path) -> None:
    prefixes = prepare(real_data, tmp_path)
    config = {
        "base": str(ROOT / "configs" / "demo" / "pretrain.yaml"),
        "run_dir": str(tmp_path / "run"),
        "tokenizer": {"model": str(tmp_path / "tokenizer.model")},
        "data": {"sources": [{"prefix": prefixes[name], "weight": weight} for name, weight in WEIGHTS.items()]},
        "train": {"steps": STEPS},
        "evaluation": None,
    }
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["bash", "launch/pretrain.sh", "--config", str(tmp_path / "blend.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["step"] == STEPS
    shares = {key.removeprefix("mix/"): value for key, value in lines[-1].items() if key.startswith("mix/")}
    total = sum(WEIGHTS.values())
    assert shares == pytest.approx({name: weight / total for name, weight in WEIGHTS.items()}, abs=0.01)
    assert lines[-1]["loss"] < lines[0]["loss"]
    print(shares, lines[0]["loss"], lines[-1]["loss"], done.stderr[-500:])
