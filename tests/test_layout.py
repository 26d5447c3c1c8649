"""Padded and packed batches hold the same examples, on any number of hosts."""

import itertools

import numpy as np
import pytest
from caches import random_cache

from mpt_jax.config import DataConfig
from mpt_jax.data.layout import Examples, assemble, first_fit, row_counts
from mpt_jax.data.sampling import make_loader, stream_data
from mpt_jax.errors import UserError
from mpt_jax.shapes import BATCH_SHAPES, PACKED_SHAPES

LENGTHS = {"inputs": 9, "targets": 4}
P = 3
LAYOUTS = {
    "padded": {},
    "trimmed": {"trim_lengths": (3, 5, 7)},
    "packed": {"pack_lengths": {"inputs": 24, "targets": 10}},
}


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return [stream_data(random_cache(folder / name, name, size, LENGTHS, size), rate=size) for name, size in SIZES.items()]


SIZES = {"a": 150, "b": 90, "c": 200}


def loader_of(streams, sampling="proportional", batch_size=24, **fields):
    extra = {name: fields.pop(name) for name in ("row_multiple", "shard") if name in fields}
    config = DataConfig("x", LENGTHS, batch_size, sampling=sampling, seed=3, **fields)
    return make_loader(config, streams, prompt_length=P, **extra)


def examples_of(batch, streams):
    """What a packed batch holds, segment by segment: (task, row in its cache, place of the prompt, tokens, ...)."""
    found = []
    for r, e in zip(*np.nonzero(batch["example_ids"] >= 0), strict=True):
        source, target = (np.flatnonzero(batch[f"{name}_segments"][r] == e + 1) for name in ("encoder", "decoder"))
        for places in (source, target):
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))  # no gaps: distances are right
        tokens = batch["encoder_tokens"][r, source]
        assert not tokens[:P].any() and tokens[P:].all()
        rest = [batch[name][r, target].tolist() for name in ("decoder_input_tokens", "decoder_target_tokens", "loss_weights")]
        found.append((int(batch["task_ids"][r, e]), int(batch["example_ids"][r, e]), tokens[P:].tolist(), *rest))
    for name in ("encoder", "decoder"):
        used = batch[f"{name}_segments"] > 0
        assert used.sum() == sum((P + len(one[2])) if name == "encoder" else len(one[3]) for one in found)
    return sorted(found)


@pytest.mark.parametrize("sampling", ["bank", "proportional", "mpt"])
def test_packed_batches_hold_the_examples_of_the_step(streams, sampling):
    packed, padded = (loader_of(streams, sampling, **LAYOUTS[name]) for name in ("packed", "padded"))
    saved = []
    for step in (0, 5, 10**6):
        batch, (task_ids, rows) = packed.batch(step), padded.draw(step)
        expected = []
        for n, row in zip(task_ids.tolist(), rows.tolist(), strict=True):
            source, target = (getattr(streams[n].cache, name)(row).tolist() for name in ("inputs", "targets"))
            expected.append((n, row, source, [0, *target[:-1]], target, [1.0] * len(target)))
        assert examples_of(batch, streams) == sorted(expected)
        sizes = {"B": len(batch["task_ids"]), "S": 24, "L": 10, "E": 24 // P}
        for name, letters in PACKED_SHAPES.items():
            assert batch[name].shape == tuple(sizes[letter] for letter in letters.split())
            assert batch[name].dtype == (np.float32 if name == "loss_weights" else np.int32)
        for name, segments in (("encoder_tokens", "encoder"), ("decoder_target_tokens", "decoder"), ("loss_weights", "decoder")):
            assert not batch[name][batch[f"{segments}_segments"] == 0].any()
        saved.append(24 * (P + 9) - batch["encoder_tokens"].size)
    assert min(saved) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampling", ["bank", "proportional", "mpt"])
def test_hosts_read_disjoint_parts_of_the_same_batch(streams, sampling, layout):
    whole = loader_of(streams, sampling, row_multiple=4, **LAYOUTS[layout])
    for step in (0, 9, 40):
        expected = whole.batch(step)
        for hosts in (1, 2, 4):
            loaders = [loader_of(streams, sampling, row_multiple=4, shard=(n, hosts), **LAYOUTS[layout]) for n in range(hosts)]
            parts = [loader.batch(step) for loader in loaders]
            for name, array in expected.items():
                assert np.array_equal(np.concatenate([part[name] for part in parts]), array)
                assert len({part[name].shape for part in parts}) == 1


def test_a_batch_that_hosts_cannot_share_is_refused(streams):
    with pytest.raises(UserError, match="24 cannot be shared evenly by 5 hosts; set it to a multiple of 5"):
        loader_of(streams, shard=(0, 5))


@pytest.mark.parametrize("sampling", ["bank", "proportional"])
def test_any_step_costs_what_the_first_does(streams, sampling):
    """The only work that depends on the size of the data is an epoch's order: at most two for each stream, which are kept."""
    for step in (0, 10**6, 10**9):
        loader = loader_of(streams, sampling)
        for following in range(5):
            loader.batch(step + following)
        assert loader._order.cache_info().misses <= 2 * len(streams)


def test_assemble_pads_and_cuts(streams):
    caches = [stream.cache for stream in streams]
    task_ids, rows = np.array([2, 0, 2, 1]), np.array([5, 149, 199, 0])
    batch = assemble(Examples(caches, task_ids, rows), {"inputs": 6, "targets": 3})
    for b, (n, row) in enumerate(zip(task_ids, rows, strict=True)):
        source, target = caches[n].inputs(row)[:6].tolist(), caches[n].targets(row)[:3].tolist()
        assert batch["encoder_tokens"][b].tolist() == source + [0] * (6 - len(source))
        assert batch["decoder_target_tokens"][b].tolist() == target + [0] * (3 - len(target))
        assert batch["decoder_input_tokens"][b].tolist() == [0, *batch["decoder_target_tokens"][b][:-1]]
        assert batch["loss_weights"][b].tolist() == [1.0] * len(target) + [0.0] * (3 - len(target))
    assert set(batch) == {*BATCH_SHAPES, "example_ids"}


@pytest.mark.parametrize("wrong", [-1, 150])
def test_a_row_that_is_not_there_is_never_another_one(streams, wrong):
    with pytest.raises(IndexError, match="of 150 in a/train"):
        assemble(Examples([streams[0].cache], np.zeros(2, int), np.array([3, wrong])), LENGTHS)


def test_first_fit_keeps_to_all_capacities_and_leaves_little_room():
    rng = np.random.default_rng(0)
    capacity = np.array([64, 16, 8])
    sizes = np.stack([rng.integers(1, 65, 300), rng.integers(1, 9, 300), np.ones(300, int)], axis=1)
    rows, starts, used = first_fit(sizes, capacity)
    assert set(rows) == set(range(used))
    for row in range(used):
        own = np.flatnonzero(rows == row)
        own = own[np.argsort(starts[own, 2])]
        assert np.array_equal(starts[own], np.cumsum(sizes[own], axis=0) - sizes[own])  # one after the other
        assert (sizes[own].sum(axis=0) <= capacity).all()
    assert used <= 1.25 * (sizes.sum(axis=0) / capacity).max()  # measured: 1.07
    assert first_fit(np.array([[10, 3, 1], [54, 3, 1], [32, 3, 1], [32, 3, 1]]), capacity)[2] == 2


@pytest.mark.parametrize("batch_size, multiple", [(1, 1), (7, 1), (256, 1), (256, 8), (32, 8), (4, 8), (100, 7)])
def test_row_counts_hold_every_batch_and_pad_little(batch_size, multiple):
    counts = row_counts(batch_size, multiple)
    assert counts[0] == multiple and batch_size <= counts[-1] < batch_size + multiple
    for lower, upper in itertools.pairwise(counts):
        assert upper % multiple == 0 and lower < upper <= max(lower * 1.125, lower + multiple)
    assert row_counts(batch_size, multiple, (1,)) == tuple(sorted({multiple, counts[-1]}))


def test_packed_batches_have_the_wanted_numbers_of_rows(streams):
    loader = loader_of(streams, pack_rows=(11, 13), row_multiple=2, **LAYOUTS["packed"])
    assert {len(loader.batch(step)["task_ids"]) for step in range(30)} <= {12, 14, 24}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pack_lengths": {"inputs": 24}}, "must give the positions of a row for 'targets', at least the 4 of"),
        ({"pack_lengths": {"inputs": 8, "targets": 4}}, "for 'inputs', at least the 9 of"),
        ({"pack_rows": (4,)}, "nothing is packed; set DataConfig.pack_lengths"),
        ({"pack_lengths": {"inputs": 24, "targets": 4}, "pack_rows": (0,)}, "pack_rows must be positive"),
    ],
)
def test_mistakes_in_the_configuration_of_packing(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig("x", LENGTHS, 8, **fields).validate()
