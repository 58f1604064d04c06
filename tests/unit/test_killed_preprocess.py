"""A data tool that is killed and started again ends with the bytes of one that was not. More of it: tests/full."""

import pytest
from killed_runs import Job, documents, pairs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """Documents of all forms, some of them twice, in some 60 chunks."""
    folder = tmp_path_factory.mktemp("corpus")
    inputs = documents(folder / "documents", 500, seed=1)
    options = ["--input", *map(str, inputs), "--append-eod", "--dedup", "--on-error", "skip"]
    job = Job("preprocess", options, tokenizer, folder, chunk_bytes=1000)
    job.make_expected()
    return job


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("rows")
    inputs = pairs(folder / "rows", 120, 2, "retrieval")
    more = documents(folder / "more", 100, seed=3)
    options = ["--task", "retrieval", "--input", *map(str, inputs), "--corpus", *map(str, more), "--on-error", "skip"]
    job = Job("preprocess_pairs", options, tokenizer, folder, chunk_bytes=1500)
    job.make_expected()
    return job


def test_documents_go_on_after_parent_and_group_were_killed(corpus, tmp_path):
    """In the middle of joining a part, by a parent whose workers then end by themselves; then once more, with them."""
    points = [("joining@12", "self"), ("flushed@8", "group")]
    runs = corpus.check_kill_and_go_on(tmp_path / "out", points, workers=(2, 1))
    assert len(runs[0].workers()) == 4  # of two passes
    assert runs[1].went_on
    assert runs[2].went_on
    assert 0 < runs[2].tokens < corpus.num_tokens


def test_pairs_go_on_while_they_get_their_names(rows, tmp_path):
    runs = rows.check_kill_and_go_on(tmp_path / "out", [("rename@4", "self"), ("parting@1", "self")], workers=(1,))
    assert [run.tokens > 0 for run in runs] == [True, False, False]


def test_a_killed_worker_is_told_in_one_line_and_the_next_run_goes_on(corpus, tmp_path):
    run = corpus.run(tmp_path / "out", "worker@12", "self")
    error = run.stderr.splitlines()[-1]
    assert run.code == 2
    assert error.startswith(
        "error: one of 2 tokenising processes was killed, often for lack of memory; use fewer --workers. "
    )
    assert error.endswith(
        f"What was done is kept in {tmp_path}/.out.partial: the same command goes on with it, --restart drops it."
    )
    run = corpus.run(tmp_path / "out", workers=1)
    assert run.went_on
    corpus.check_finished(run, tmp_path / "out")
