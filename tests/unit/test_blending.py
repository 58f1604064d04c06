"""Shares of sources: by weight, within limits on epochs; what is asked for in vain is explained; names and resume."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_conan.config import check_config, load_config, resume_differences
from megatron_conan.data.blending import Source, blend_sources, mix_metrics
from megatron_conan.data.sampler import SCHEDULE_BLOCK, SourceSchedule

ROOT = Path(__file__).resolve().parents[2]


def test_without_limits_the_weights_stay_as_they_are():
    weights = [0.1, 0.7, 3.0]
    blend = blend_sources([Source(f"s{i}", weight, 10) for i, weight in enumerate(weights)], 1000)
    assert blend.weights == weights
    np.testing.assert_allclose(blend.shares, np.array(weights) / 3.8)


def test_a_limited_source_gets_what_its_epochs_allow_and_the_others_the_rest_by_weight():
    sources = [Source("a", 5, 400, max_epochs=0.5), Source("b", 3, 10), Source("c", 2, 10)]
    blend = blend_sources(sources, 1000)
    np.testing.assert_allclose(blend.shares, [0.2, 0.48, 0.32])
    lines = blend.describe()
    assert "max_epochs=0.5 lowers it" in lines[1]
    assert lines[1].split()[:6] == ["a", "50.0%", "20.0%", "400", "200", "0.50"]
    assert "lowers" not in "".join(lines[2:])


def test_a_limit_that_is_reached_only_because_of_another_counts_too():
    sources = [Source("a", 8, 100, max_epochs=1), Source("b", 1, 150, max_epochs=1), Source("c", 1, 1)]
    np.testing.assert_allclose(blend_sources(sources, 1000).shares, [0.1, 0.15, 0.75])


def test_rows_of_a_batch_count():
    """100 batches: of 8 rows, a gives 40 x 8 / 160 = 2 epochs if it is half the batches."""
    sources = [Source("a", 1, 160, draw_size=8, max_epochs=2), Source("b", 1, 160, draw_size=16)]
    np.testing.assert_allclose(blend_sources(sources, 100).shares, [0.4, 0.6])


def test_too_little_of_everything_is_explained():
    sources = [Source("a", 1, 100, max_epochs=2), Source("b", 1, 50, max_epochs=1)]
    with pytest.raises(
        ValueError, match=r"hold 25\.0% of what the run takes .*a 100 x 2, b 50 x 1\); raise or remove max_epochs"
    ):
        blend_sources(sources, 1000)
    np.testing.assert_allclose(blend_sources(sources, 250).shares, [0.8, 0.2])


@given(
    st.lists(
        st.tuples(st.floats(0.01, 100), st.integers(1, 10**6), st.one_of(st.none(), st.floats(0.01, 50))),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 10**6),
)
def test_shares_are_within_limits_and_otherwise_in_proportion(rows, num_draws):
    sources = [Source(str(i), weight, size, max_epochs=most) for i, (weight, size, most) in enumerate(rows)]
    limits = np.array([np.inf if most is None else most * size / num_draws for _, size, most in rows])
    if limits.sum() < 1 - 1e-9:
        with pytest.raises(ValueError, match="max_epochs"):
            blend_sources(sources, num_draws)
        return
    if limits.sum() < 1 + 1e-9:
        return
    shares, weights = blend_sources(sources, num_draws).shares, np.array([weight for weight, _, _ in rows])
    assert shares.sum() == pytest.approx(1)
    assert (shares <= limits * (1 + 1e-6)).all()
    free = shares < limits * (1 - 1e-6)
    if free.any():
        factor = (shares / weights)[free]
        np.testing.assert_allclose(factor, factor[0], rtol=1e-6)
        assert (shares[~free] <= weights[~free] * factor[0] * (1 + 1e-6)).all()


def test_batches_of_counts_what_source_at_says():
    schedule = SourceSchedule([10, 20, 30], [0.2, 0.5, 0.3], seed=3)
    sources = [schedule.source_at(step) for step in range(3 * SCHEDULE_BLOCK + 5)]
    for steps in (0, 1, SCHEDULE_BLOCK - 1, SCHEDULE_BLOCK, 2 * SCHEDULE_BLOCK + 7, len(sources)):
        assert schedule.batches_of(steps).tolist() == [sources[:steps].count(source) for source in range(3)]


def test_a_single_source_has_no_mix():
    assert mix_metrics({"a": 8}) == {}
    assert mix_metrics({"a": 6, "b": 2}) == {"mix/a": 0.75, "mix/b": 0.25}


def demo(*overrides):
    return load_config(ROOT / "configs" / "demo" / "pretrain.yaml", overrides)


def test_sources_of_one_name_are_refused():
    two = "data.sources=[{prefix: a/lm}, {prefix: b/lm}]"
    with pytest.raises(
        ValueError, match=r"data\.sources\.0 and data\.sources\.1 are both called 'lm'; give one a name"
    ):
        check_config(demo(two), 1)
    check_config(demo(two, "data.sources.1.name=other"), 1)


def test_other_steps_are_refused_on_resume_where_shares_depend_on_them():
    sources = "data.sources=[{prefix: a, weight: 1, max_epochs: 2}, {prefix: b, weight: 1}]"
    before, after = demo(sources), demo(sources, "train.steps=60")
    assert resume_differences(before, demo(sources)) == []
    assert resume_differences(before, after) == [
        "train.steps: 50 -> 60, on which the shares of sources depend with max_epochs (data.sources.0)"
    ]
    free = "data.sources=[{prefix: a, weight: 1}, {prefix: b, weight: 1}]"
    assert resume_differences(demo(free), demo(free, "train.steps=60")) == []
    with pytest.raises(ValueError, match=r"max_epochs"):
        demo("data.sources.0.max_epochs=0")
