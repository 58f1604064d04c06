"""Live search on a real (tiny, random) SentenceTransformer folder over real standard library functions."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from megatron_conan.data.code_functions import SourceFile, read_functions
from megatron_conan.evaluation.search import (
    SearchIndex,
    build_search_index,
    fuse_rankings,
    hit_at_k,
    read_questions,
    run_search,
    weights_digest,
)

QUESTIONS = Path(__file__).parents[2] / "configs" / "demo" / "questions.yaml"
FILES = ["shutil.py", "textwrap.py", "calendar.py", "difflib.py", "random.py", "smtplib.py", "tempfile.py"]


def write_documents(path: Path) -> list[dict[str, object]]:
    root = sysconfig.get_paths()["stdlib"]
    rows = []
    for file in FILES:
        for f in read_functions(SourceFile("stdlib", root, file)) or []:
            package = "stdlib" if file != "tempfile.py" else "other"
            place = {"id": f"{package}:{file}:{f.line}", "title": f.name, "file": f.file, "line": f.line}
            rows.append({**place, "text": f.prepared_code, "code": f.code, "held_out": f.held_out})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_export(folder: Path, words: set[str], seed: int = 0) -> None:
    """A one-layer random model over whole words with mean pooling: texts that share words are near."""
    folder.mkdir(parents=True)
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, initializer_range=1.0)  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)]))  # fmt: skip
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True})
    )
    (folder / "2_Normalize").mkdir()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("demo")
    rows = write_documents(run / "documents.jsonl")
    write_export(run / "export", {word for row in rows for word in str(row["text"]).split()})
    assert build_search_index(run / "export", run / "documents.jsonl", run / "search") == len(rows)
    return run


@pytest.fixture(scope="module")
def index(run_dir: Path) -> SearchIndex:
    return SearchIndex(run_dir)


def test_a_function_finds_itself_first(index: SearchIndex) -> None:
    """The query of exactly a document's words has cosine 1 with it, up to half precision of the stored vectors."""
    row = next(row for row in index.documents if row["title"] == "shutil.copytree")
    for bm25 in (False, True):
        hit = index.search(row["text"], k=3, bm25=bm25)[0]
        assert (hit.title, hit.file, hit.line) == ("shutil.copytree", "shutil.py", row["line"])
        assert hit.snippet.startswith("def copytree(")
    assert index.search(row["text"])[0].score == pytest.approx(1, abs=2e-3)


def test_scores_equal_stock_sentence_transformers(index: SearchIndex, run_dir: Path) -> None:
    model = SentenceTransformer(str(run_dir / "export"), device="cpu")
    documents = model.encode([row["text"] for row in index.documents])
    expected = documents @ model.encode("copy tree dst")
    hits = index.search("copy tree dst", k=5)
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1][:5], atol=2e-3)


def test_identifiers_in_a_question_are_split_unless_raw(index: SearchIndex) -> None:
    assert index.search("copyTree(DST)") == index.search("copy tree dst")
    assert index.search("copyTree(DST)", raw=True) != index.search("copy tree dst")


def test_fusion() -> None:
    fused = fuse_rankings([[7, 3, 5], [3, 9]])
    assert [number for number, _ in fused] == [3, 7, 9, 5]
    assert fused[0][1] == pytest.approx(1 / 62 + 1 / 61)


def test_bm25_is_fused_in(index: SearchIndex) -> None:
    """A random model knows nothing of a rare word's weight; fused, the words count."""
    titles = [hit.title for hit in index.search("is this year a leap year", k=10, bm25=True)]
    assert "calendar.isleap" in titles


@pytest.mark.parametrize("bm25", [False, True])
def test_stdlib_only_is_a_sublist(index: SearchIndex, bm25: bool) -> None:
    """One file plays another package; without it the order of the rest is the same (by cosine: and so are the scores)."""
    everything = index.search("create a temporary directory", k=len(index.documents), bm25=bm25)
    only = index.search("create a temporary directory", k=len(index.documents), bm25=bm25, stdlib_only=True)
    assert any(hit.file == "tempfile.py" for hit in everything)
    assert {hit.title for hit in only} == {hit.title for hit in everything if hit.file != "tempfile.py"}
    if not bm25:
        assert only == [hit for hit in everything if hit.file != "tempfile.py"]


def test_every_demo_question_has_an_indexed_answer() -> None:
    root = sysconfig.get_paths()["stdlib"]
    files = {"zipfile": ("zipfile.py", "zipfile/__init__.py"), "json": ("json/__init__.py", "json/encoder.py")}
    questions = read_questions(QUESTIONS)
    assert len(questions) == 10
    for question, expected in questions.items():
        for title in expected:
            module = title.partition(".")[0]
            paths = [file for file in files.get(module, (f"{module}.py",)) if Path(root, file).exists()]
            functions = [f for file in paths for f in read_functions(SourceFile("stdlib", root, file)) or []]
            assert title in {f.name for f in functions if f.prepared_code}, f"{question}: {title}"


def test_hit_at_k(index: SearchIndex, tmp_path: Path) -> None:
    copytree = next(row for row in index.documents if row["title"] == "shutil.copytree")
    questions = [
        {"question": copytree["text"], "expected": ["shutil.copytree"]},
        {"question": copytree["text"] + " x", "expected": ["calendar.isleap"]},
    ]
    path = tmp_path / "questions.yaml"
    path.write_text(json.dumps({"questions": questions}))
    report = hit_at_k(index, path, k=2)
    assert list(report.ranks.values()) == [1, None]
    assert report.rate == 0.5
    path.write_text(json.dumps({"questions": [{"question": "x", "expected": ["no.such.function"]}]}))
    with pytest.raises(ValueError, match=r"no\.such\.function"):
        hit_at_k(index, path)


def test_output_names_everything(run_dir: Path) -> None:
    text = run_search(run_dir, "copy a whole directory tree", k=4)
    assert text.count("\n      ") >= 4
    assert "held out of training or not" in text
    assert " 4. " in text


def test_missing_parts_name_the_command(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make demo"):
        SearchIndex(tmp_path / "nothing")
    (tmp_path / "export").mkdir()
    with pytest.raises(ValueError, match=r"summary\.json.*make demo"):
        SearchIndex(tmp_path)
    with pytest.raises(ValueError, match="make demo"):
        weights_digest(tmp_path)
    with pytest.raises(ValueError, match="make demo"):
        build_search_index(run_dir / "export", tmp_path / "none.jsonl", tmp_path / "search")


def test_index_of_other_weights_is_refused(run_dir: Path, tmp_path: Path) -> None:
    write_export(tmp_path / "export", {"copy"}, seed=1)
    (tmp_path / "search").symlink_to(run_dir / "search")
    with pytest.raises(ValueError, match="other weights"):
        SearchIndex(tmp_path)


def test_empty_questions_are_refused(index: SearchIndex) -> None:
    with pytest.raises(ValueError, match="no words"):
        index.search("???")
    with pytest.raises(ValueError, match="k=0"):
        index.search("copy", k=0)
