"""Sampling is a pure function of (seed, step), covers every row once an epoch, and matches megatron-core's slicing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_conan.data.sampler import SourceSchedule, dp_slice, sample_indices


@given(num_samples=st.integers(1, 40), seed=st.integers(0, 2**40), start=st.integers(0, 200), count=st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_any_window_equals_the_stream_read_from_the_start(num_samples, seed, start, count):
    stream = sample_indices(num_samples, seed, 0, start + count)
    window = sample_indices(num_samples, seed, start, count)
    assert window.dtype == np.int64
    np.testing.assert_array_equal(window, stream[start:])


def test_every_epoch_is_another_permutation():
    epochs = sample_indices(50, seed=3, start=0, count=150).reshape(3, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], sample_indices(50, seed=4, start=0, count=50))


@pytest.mark.parametrize(("num_samples", "seed", "start"), [(0, 0, 0), (5, -1, 0), (5, 0, -1)])
def test_impossible_samples_are_refused(num_samples, seed, start):
    with pytest.raises(ValueError, match=r"num_samples=|seed="):
        sample_indices(num_samples, seed, start, 1)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [0.98, 0.01, 0.01], [3.0]])
def test_schedule_counts_its_own_past_and_keeps_the_weights(weights):
    schedule = SourceSchedule([10] * len(weights), weights, seed=5)
    seen = [0] * len(weights)
    num_steps = 4096
    for step in range(num_steps):
        source = schedule.source_at(step)
        assert schedule.batches_before(step) == seen[source]
        seen[source] += 1
    expected = np.array(weights) / sum(weights) * num_steps
    # 128 blocks whose counts each deviate by less than one: 4 standard deviations of at most sqrt(128 / 4)
    assert np.abs(np.array(seen) - expected).max() < 4 * np.sqrt(128 / 4)


def test_schedule_holds_the_weights_in_every_block_and_needs_no_history():
    schedule = SourceSchedule([10, 10], [0.75, 0.25], seed=1)
    sources = [schedule.source_at(step) for step in range(320)]
    for block in range(10):
        assert sum(sources[32 * block : 32 * block + 32]) in (7, 8, 9)
    fresh = SourceSchedule([10, 10], [0.75, 0.25], seed=1)
    assert [fresh.source_at(step) for step in reversed(range(320))] == sources[::-1]
    late = SourceSchedule([10, 10], [0.75, 0.25], seed=1)
    assert late.batches_before(319) == sources[:319].count(sources[319])
    assert [SourceSchedule([10, 10], [0.75, 0.25], seed=2).source_at(step) for step in range(320)] != sources


def test_temperature_flattens_sizes():
    sizes = [100, 900]
    np.testing.assert_allclose(SourceSchedule(sizes).weights, [0.1, 0.9])
    np.testing.assert_allclose(SourceSchedule(sizes, temperature=2.0).weights, [0.25, 0.75])
    np.testing.assert_allclose(SourceSchedule(sizes, temperature=1e9).weights, [0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "weights", "temperature", "message"),
    [
        ([], None, None, "at least one row"),
        ([5, 0], None, None, "at least one row"),
        ([5, 5], [1.0], None, "one a source"),
        ([5, 5], [1.0, 0.0], None, "one a source"),
        ([5, 5], [1.0, 1.0], 2.0, "exclude each other"),
        ([5, 5], None, 0.0, "temperature=0.0 must be positive"),
    ],
)
def test_bad_schedules_are_refused(sizes, weights, temperature, message):
    with pytest.raises(ValueError, match=message):
        SourceSchedule(sizes, weights, temperature=temperature)


def test_dp_slices_follow_megatron_order_and_cover_the_batch():
    batch = np.arange(100, 124)
    parts = {rank: dp_slice(batch, rank, 3, 4) for rank in range(3)}
    assert [len(micro_batches) for micro_batches in parts.values()] == [2, 2, 2]
    np.testing.assert_array_equal(parts[1][0], [104, 105, 106, 107])
    np.testing.assert_array_equal(parts[1][1], [116, 117, 118, 119])
    in_order = [parts[rank][m] for m in range(2) for rank in range(3)]
    np.testing.assert_array_equal(np.concatenate(in_order), batch)


def test_dp_slice_refuses_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"global_batch_size=96 must be divisible by micro_batch_size=8 x dp=5 = 40"):
        dp_slice(np.arange(96), 0, 5, 8)
    with pytest.raises(ValueError, match="dp_rank=2"):
        dp_slice(np.arange(8), 2, 2, 1)
