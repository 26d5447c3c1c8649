"""The loader: a pure function of (seed, step), fair to examples and streams; the k-shot choice."""

import threading

import numpy as np
import pytest
from caches import write_cache
from scipy import stats

from mpt_jax.data.cache import TokenCache
from mpt_jax.data.sampling import Loader, StreamData, k_shot_rows, scarce_classes, stream_data
from mpt_jax.errors import UserError
from mpt_jax.shapes import BATCH_SHAPES

LENGTHS = {"inputs": 6, "targets": 4}


@pytest.fixture
def make_cache(tmp_path, vocabulary):
    """make_cache(task, size, targets) writes a cache; example i's inputs are [i + 2, EOS], or longer from `long_after` on."""

    def make(task: str, size: int, targets: list[str] | None = None, long_after: int = 10**9) -> TokenCache:
        inputs = [[i + 2, *[9] * (3 * (i >= long_after)), 1] for i in range(size)]
        outputs = [[7] * (i % 3) + [1] for i in range(size)]
        return write_cache(tmp_path / task, task, inputs, outputs, LENGTHS, targets, vocabulary)

    return make


@pytest.fixture
def streams(make_cache):
    sizes = {"a": 30, "b": 7, "c": 100, "d": 12, "e": 51, "f": 20}
    return [stream_data(make_cache(name, size), rate=size) for name, size in sizes.items()]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("sampling", ["bank", "proportional", "mpt"])
def test_batch_depends_on_seed_and_step_alone(streams, sampling):
    loader = Loader(streams, sampling, 12, LENGTHS, seed=3)
    ahead = {step: loader.batch(step) for step in (100, 7, 0)}  # any order
    for step, batch in ahead.items():
        assert same(batch, Loader(streams, sampling, 12, LENGTHS, seed=3).batch(step))
    assert not same(ahead[7], loader.batch(8))
    assert not same(ahead[7], Loader(streams, sampling, 12, LENGTHS, seed=4).batch(7))


@pytest.mark.parametrize("sampling", ["bank", "proportional"])
def test_every_epoch_holds_every_example_once(streams, sampling):
    loader = Loader(streams, sampling, 12, LENGTHS)
    drawn = [loader.draw(step) for step in range(400)]
    tasks, rows = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    for number, stream in enumerate(streams):
        own, size = rows[tasks == number], len(stream.rows)
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(np.array_equal(np.sort(epoch), stream.rows) for epoch in epochs)
        assert not np.array_equal(epochs[0], epochs[1])


def test_bank_gives_equal_shares(streams):
    for step in range(5):
        tasks, _ = Loader(streams, "bank", 18, LENGTHS).draw(step)
        assert np.array_equal(np.bincount(tasks), [3] * 6)


def test_proportional_keeps_to_the_rates_at_all_times(streams):
    loader = Loader(streams, "proportional", 8, LENGTHS)
    rates = np.array([stream.rate for stream in streams])
    counts = np.zeros(len(streams))
    for step in range(1000):
        counts += np.bincount(loader.draw(step)[0], minlength=len(streams))
        assert np.abs(counts - rates / rates.sum() * counts.sum()).max() < len(streams)


def test_proportional_is_exact_over_a_period_and_starves_no_task(make_cache):
    streams = [stream_data(make_cache("big", 9), rate=1e9), stream_data(make_cache("small", 3), rate=1.0)]
    loader = Loader(streams, "proportional", 1 << 10, LENGTHS)
    counts = sum(np.bincount(loader.draw(step)[0], minlength=2) for step in range(128))  # two periods
    assert counts.tolist() == [2 * (2**16 - 1), 2]


def test_a_stream_is_the_same_wherever_it_stands(streams, make_cache):
    few = [StreamData(make_cache(f"x{n}", 40), np.arange(40), seed=n) for n in range(2)]
    alone = Loader(few[1:], "bank", 4, LENGTHS, seed=5)
    beside = Loader([*streams, few[0], few[1]], "bank", 32, LENGTHS, seed=5)
    for step in (0, 3, 11):
        tasks, rows = beside.draw(step)
        assert np.array_equal(rows[tasks == 7], alone.draw(step)[1])
    other_seed = Loader([StreamData(few[1].cache, few[1].rows, seed=9)], "bank", 4, LENGTHS, seed=5)
    assert not np.array_equal(alone.draw(0)[1], other_seed.draw(0)[1])


def test_mpt_draws_k_uniformly_and_tasks_evenly(streams):
    loader = Loader(streams, "mpt", 32, LENGTHS, seed=1)
    chosen = [np.unique(loader.draw(step)[0]) for step in range(3000)]
    k = np.bincount([len(tasks) for tasks in chosen], minlength=7)
    assert k[:2].sum() == 0
    assert stats.chisquare(k[2:]).pvalue > 0.01
    # Given K, every task is in the draw with probability K / 6.
    for size in range(2, 6):
        members = np.bincount(np.concatenate([tasks for tasks in chosen if len(tasks) == size]), minlength=6)
        total = members.sum()
        variance = total / 6 * (1 - size / 6)  # of one count; counts of a draw without replacement are correlated by -1/5
        statistic = ((members - total / 6) ** 2).sum() / variance * 5 / 6
        assert stats.chi2(5).sf(statistic) > 0.01


def test_mpt_splits_the_batch_evenly_and_gives_the_rest_to_one(streams):
    loader = Loader(streams, "mpt", 32, LENGTHS)
    receivers = set()
    for step in range(300):
        tasks, rows = loader.draw(step)
        counts = np.bincount(tasks, minlength=6)
        k = (counts > 0).sum()
        rest = np.sort(counts[counts > 0] - 32 // k)
        assert rest.tolist() == [0] * (k - 1) + [32 % k]
        if 32 % k:
            receivers.add(int(counts.argmax()))
        for number in range(6):
            own = rows[tasks == number]
            if len(own) <= len(streams[number].rows):
                assert len(np.unique(own)) == len(own)
    assert receivers == set(range(6))


def test_mpt_with_replacement_draws_by_rate(streams):
    loader = Loader(streams, "mpt", 60, LENGTHS, seed=2, with_replacement=True)
    shares = np.array([np.bincount(loader.draw(step)[0], minlength=6) / 60 for step in range(3000)])
    rates = np.array([stream.rate for stream in streams]) / sum(stream.rate for stream in streams)
    z = (shares.mean(0) - rates) / (shares.std(0) / np.sqrt(len(shares)))
    assert np.abs(z).max() < 3.5
    assert ((shares > 0).sum(1) == 1).any()  # a task may be drawn twice


@pytest.mark.parametrize("sampling, size, message", [("bank", 10, "multiple of 6"), ("mpt", 5, "set it to 6 or more")])
def test_impossible_batch_sizes(streams, sampling, size, message):
    with pytest.raises(UserError, match=message):
        Loader(streams, sampling, size, LENGTHS)


def test_one_stream_serves_every_sampling(streams):
    for sampling in ("bank", "proportional", "mpt"):
        assert (Loader(streams[:1], sampling, 3, LENGTHS).batch(9)["task_ids"] == 0).all()


def test_batch_arrays(streams):
    batch = Loader(streams, "bank", 12, LENGTHS).batch(0)
    sizes = {"B": 12, "T": 6, "L": 4}
    for name, letters in BATCH_SHAPES.items():
        assert batch[name].shape == tuple(sizes[letter] for letter in letters.split())
        assert batch[name].dtype == (np.float32 if name == "loss_weights" else np.int32)
    for b in range(12):
        cache, row = streams[batch["task_ids"][b]].cache, batch["example_ids"][b]
        target = cache.targets(row)
        assert batch["encoder_tokens"][b].tolist() == [row + 2, 1, 0, 0, 0, 0]
        assert batch["decoder_target_tokens"][b].tolist() == [*target, *[0] * (4 - len(target))]
        assert batch["decoder_input_tokens"][b].tolist() == [0, *batch["decoder_target_tokens"][b][:-1]]
        assert batch["loss_weights"][b].tolist() == [1.0] * len(target) + [0.0] * (4 - len(target))


def test_batches_are_trimmed_to_the_smallest_length_that_holds_them(make_cache):
    stream = stream_data(make_cache("lengths", 40, long_after=30))
    loader = Loader([stream], "proportional", 2, LENGTHS, trim_lengths=(3, 2, 99))
    seen = set()
    for step in range(40):
        batch, whole = loader.batch(step), Loader([stream], "proportional", 2, LENGTHS).batch(step)
        width = batch["encoder_tokens"].shape[1]
        seen.add(width)
        assert np.array_equal(batch["encoder_tokens"], whole["encoder_tokens"][:, :width])
        assert not whole["encoder_tokens"][:, width:].any()
        assert width == (6 if (batch["example_ids"] >= 30).any() else 2)
    assert seen == {2, 6}


def test_sorted_windows_hold_the_same_examples_alike_in_length(make_cache):
    streams = [stream_data(make_cache("one", 40, long_after=20)), stream_data(make_cache("two", 24, long_after=6), rate=2.0)]
    plain = Loader(streams, "proportional", 4, LENGTHS, seed=2)
    sorted_ = Loader(streams, "proportional", 4, LENGTHS, seed=2, sort_window=8)
    mixed = 0
    for window in range(6):
        steps = range(8 * window, 8 * window + 8)
        expected, got = ([loader.draw(step) for step in steps] for loader in (plain, sorted_))
        pairs = [sorted((int(n), int(row)) for part in drawn for n, row in zip(*part, strict=True)) for drawn in (expected, got)]
        assert pairs[0] == pairs[1]
        lengths = [[len(streams[n].cache.inputs(row)) for n, row in zip(*part, strict=True)] for part in got]
        mixed += sum(len(set(batch)) > 1 for batch in lengths)
    assert mixed <= 6  # at most the one batch of each window where short meets long
    assert same(sorted_.batch(13), Loader(streams, "proportional", 4, LENGTHS, seed=2, sort_window=8).batch(13))


def test_batches_made_ahead_are_the_same_and_stop(streams):
    loader = Loader(streams, "mpt", 12, LENGTHS)
    ahead = list(loader.batches(4, 9))
    assert len(ahead) == 5 and all(same(batch, loader.batch(step)) for step, batch in enumerate(ahead, 4))
    iterator = loader.batches(0, 10**9)
    next(iterator)
    iterator.close()
    for thread in threading.enumerate():
        if thread.name == "mpt_jax-loader":
            thread.join(timeout=10)
            assert not thread.is_alive()


def test_errors_of_the_thread_reach_the_consumer(streams):
    broken = [StreamData(streams[0].cache, np.array([10**6]))]
    with pytest.raises(IndexError):
        list(Loader(broken, "bank", 2, LENGTHS).batches(0, 3))


def test_k_shot_is_balanced_nested_and_reproducible(make_cache):
    labels = [("yes", "no", "maybe")[0 if i % 10 < 6 else 1 + i % 2] for i in range(100)]
    cache = make_cache("labelled", 100, labels)
    four, sixteen = k_shot_rows(cache, 4, seed=0), k_shot_rows(cache, 16, seed=0)
    assert {name: sum(labels[i] == name for i in four) for name in set(labels)} == {"yes": 4, "no": 4, "maybe": 4}
    assert len(sixteen) == 48 and set(four) < set(sixteen)
    assert np.array_equal(four, k_shot_rows(cache, 4, seed=0))
    assert not np.array_equal(four, k_shot_rows(cache, 4, seed=1))
    assert len(k_shot_rows(cache, 0, seed=0)) == 100


def test_k_shot_of_a_rare_class_takes_all_and_says_so(make_cache, caplog):
    cache = make_cache("rare", 40, ["often"] * 38 + ["seldom"] * 2)
    rows = k_shot_rows(cache, 4, seed=0)
    assert len(rows) == 6 and {38, 39} <= set(rows)
    assert "only 2 examples of class 'seldom'" in caplog.text


def test_rare_classes_are_told_once_for_all_seeds_and_methods(make_cache, caplog):
    cache = make_cache("rarer", 40, ["often"] * 36 + ["seldom"] * 3 + ["once"])
    assert scarce_classes(cache, 4) == {"once": 1, "seldom": 3}
    assert scarce_classes(cache, 1) == scarce_classes(cache, 0) == {}
    for seed in range(3):
        k_shot_rows(cache, 4, seed)
    k_shot_rows(cache, 2, 0)
    assert [record.args[-1] for record in caplog.records] == [4, 2]
    assert "1 examples of class 'once', 3 examples of class 'seldom'" in caplog.text
    answers = make_cache("rarest", 5, [f"answer {i}" for i in range(5)])
    assert scarce_classes(answers, 8) == {"": 5}


def test_k_shot_without_classes_is_k_in_all(make_cache):
    answers = make_cache("answers", 50, [f"answer {i}" for i in range(50)])
    assert answers.labels is None
    assert len(k_shot_rows(answers, 16, seed=0)) == 16
    few = make_cache("few", 8, [f"answer {i}" for i in range(8)])  # few targets, but none recurs: not classes
    assert few.labels is None
