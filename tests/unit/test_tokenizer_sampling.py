"""Training a tokenizer on chosen shares of languages: rates, samples, fertility, special tokens, mistakes."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_texts import load_tool, run_script

from megatron_conan.data.documents import DocumentFormat
from megatron_conan.data.input_files import find_inputs
from megatron_conan.data.passes import Inputs
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_sampling import Corpus, FertilityText, language_shares, parse_weights, sampling_rates

SOURCE = DocumentFormat(language_key="lang")


@pytest.fixture
def corpus_file(tmp_path):
    rows = [{"text": f"an English sentence, number {i}", "lang": "en"} for i in range(3000)]
    rows += [{"text": f"这是第{i}句中文", "lang": "zh"} for i in range(1500)]
    rows += [{"text": f"без языка {i}"} for i in range(300)]
    path = tmp_path / "news.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_languages_come_from_rows_or_the_files_name(corpus_file):
    characters = Corpus(Inputs(find_inputs([corpus_file])), SOURCE).characters()
    rows = [json.loads(line) for line in corpus_file.read_text(encoding="utf-8").splitlines()]
    expected = Counter()
    for row in rows:
        expected[row.get("lang", "news")] += len(row["text"])
    assert characters == expected
    assert list(characters) == ["en", "zh", "news"]


def test_shares_are_as_asked_and_the_sample_does_not_depend_on_workers(corpus_file):
    inputs = Inputs(find_inputs([corpus_file]))
    inputs.size = 1 << 14  # many chunks
    characters = Corpus(inputs, SOURCE).characters()
    shares = language_shares(characters, {"zh": 0.5}, temperature=1e9)
    assert shares == pytest.approx({"en": 0.25, "zh": 0.5, "news": 0.25})
    rates = sampling_rates(characters, shares, 60_000)
    assert rates["zh"] > 1 > rates["en"]  # Chinese is there more than once, English in part
    samples = [list(Corpus(inputs, SOURCE, workers).draw(rates, seed=3)) for workers in (1, 2)]
    assert samples[0] == samples[1]
    drawn = Counter()
    for language, text in samples[0]:
        drawn[language] += len(text)
    assert drawn.total() == pytest.approx(60_000, rel=0.05)
    assert {language: count / drawn.total() for language, count in drawn.items()} == pytest.approx(shares, abs=0.03)
    assert samples[0] != list(Corpus(inputs, SOURCE).draw(rates, seed=4))
    copies = Counter(text for language, text in samples[0] if language == "zh")
    assert min(copies.values()) >= int(rates["zh"])
    assert max(copies.values()) <= int(rates["zh"]) + 1


@given(
    counts=st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 10**9), min_size=1),
    temperature=st.floats(0.3, 1e3),
    data=st.data(),
)
def test_shares_sum_to_one_and_keep_the_weights(counts, temperature, data):
    named = data.draw(st.lists(st.sampled_from(sorted(counts)), unique=True, max_size=len(counts) - 1))
    weights = {language: 0.9 / len(named) for language in named}
    shares = language_shares(counts, weights, temperature)
    assert sum(shares.values()) == pytest.approx(1)
    assert {language: shares[language] for language in named} == pytest.approx(weights)
    others = [language for language in counts if language not in named]
    for one in others:
        for other in others:
            assert shares[one] / shares[other] == pytest.approx(
                (counts[one] / counts[other]) ** (1 / temperature), rel=1e-6
            )


def test_impossible_shares_are_explained():
    counts = {"en": 10, "zh": 20, "empty": 0}
    for weights, temperature, message in [
        ({"fr": 0.5}, 1, "language 'fr' has a weight, but no text; there are en, zh"),
        ({"empty": 0.5}, 1, "language 'empty' has a weight, but no text"),
        ({"en": 1.5}, 1, "leave nothing for zh"),
        ({}, 0, "must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            language_shares(counts, weights, temperature)
    assert language_shares(counts, {"en": 3, "zh": 1}) == pytest.approx({"en": 0.75, "zh": 0.25})
    for word in ("en", "en=x", "=1", "en=-1", "en=nan"):
        with pytest.raises(ValueError, match="LANGUAGE=NUMBER"):
            parse_weights([word])
    with pytest.raises(ValueError, match="once a language"):
        parse_weights(["en=1", "en=2"])


def test_fertility_is_that_of_the_tokens(tokenizer):
    text = FertilityText()
    texts = {"a": ["one two", "three"], "b": ["词表 Ж"]}
    for language, documents in texts.items():
        for document in documents:
            text.add(language, document)
    report = text.report(tokenizer)
    for language, documents in texts.items():
        ids = [i for document in documents for i in tokenizer.encode(document)]
        whole, row = " ".join(documents), report[language]
        assert row["documents"] == len(documents)
        assert row["characters"] == sum(map(len, documents))
        assert row["tokens_per_word"] == pytest.approx(len(ids) / len(whole.split()), abs=1e-3)
        assert row["characters_per_token"] == pytest.approx(row["characters"] / len(ids), abs=1e-3)
        assert row["bytes_per_token"] == pytest.approx(sum(len(d.encode()) for d in documents) / len(ids), abs=1e-3)
        assert row["byte_tokens"] == pytest.approx(
            sum(tokenizer.pieces()[i].startswith("<0x") for i in ids) / len(ids), abs=1e-4
        )
    assert report["b"]["byte_tokens"] > 0
    assert sum(row["share"] for row in report.values()) == pytest.approx(1, abs=1e-3)


def test_tool_writes_model_and_report(tmp_path, corpus_file, capsys):
    arguments = ["--input", str(corpus_file), "--vocab-size", "350", "--language-weights", "zh=.6", "--reserved", "2"]
    special = ["--special-tokens", "<sep>", "<cls>"]
    for name in ("a", "b"):
        load_tool("train_tokenizer").main([*arguments, *special, "--output-prefix", str(tmp_path / name)])
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    tokenizer = Tokenizer(tmp_path / "a.model")
    assert tokenizer.pieces()[:8] == ["<pad>", "<unk>", "<s>", "</s>", "<sep>", "<cls>", "<reserved_0>", "<reserved_1>"]
    assert (tokenizer.special_id("<sep>"), tokenizer.special_id("<cls>"), tokenizer.size) == (4, 5, 350)
    assert tokenizer.decode(tokenizer.encode("<sep> is text")) == "<sep> is text"
    assert 4 not in tokenizer.encode("<sep> is text")
    with pytest.raises(ValueError, match="has no special token <mask>; train it with --special-tokens <mask>"):
        tokenizer.special_id("<mask>")
    report = json.loads((tmp_path / "a.report.json").read_text(encoding="utf-8"))
    assert report["languages"]["zh"]["share"] == pytest.approx(0.6, abs=0.03)
    assert report["tokenizer_sha256"] == tokenizer.sha256
    shown = capsys.readouterr()
    assert "tokens_per_word" in shown.out
    assert "zh" in shown.out
    assert "training: 350 pieces" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--special-tokens", "<s>"], "special token '<s>' is there already"),
        (["--special-tokens", "<a>", "<a>"], "special token '<a>' is there already"),
        (["--special-tokens", "<0x41>"], "special token '<0x41>' is there already"),
        (["--special-tokens", "a b"], "must be of visible characters"),
        (["--language-weights", "fr=.2"], "language 'fr' has a weight, but no text"),
        (["--vocab-size", "90000"], "use at most"),
        (["--sample-characters", "0"], "must be at least 1"),
        (["--languages", "en", "zh"], "they need --format bitext"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, corpus_file, options, message):
    arguments = [
        "--input",
        str(corpus_file),
        "--output-prefix",
        str(tmp_path / "new" / "t"),
        "--vocab-size",
        "500",
        *options,
    ]
    with pytest.raises(ValueError, match=message) as error:
        load_tool("train_tokenizer").main(arguments)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["news.jsonl"]


def test_parallel_rows_train_a_tokenizer(tmp_path):
    rows = [{"text1": f"ein Satz {i}", "text2": f"a sentence {i}"} for i in range(200)]
    path = tmp_path / "pairs_deu-eng.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--input", path, "--format", "bitext", "--vocab-size", 300, "--output-prefix", tmp_path / "t"]
    result = run_script("train_tokenizer", *arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "t.report.json").read_text(encoding="utf-8"))
    assert list(report["languages"]) == ["deu-eng"]
    assert report["languages"]["deu-eng"]["documents"] == 400
