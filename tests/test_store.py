"""Checkpoints: what is read is what was written, and damage is found and named."""

import json
import shutil
import tracemalloc

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpt_jax import distributed
from mpt_jax.checkpoint import store
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.checkpoint.store import Store
from mpt_jax.errors import UserError


class State(flax.struct.PyTreeNode):
    step: jax.Array
    trainable: dict
    opt_state: object
    key: jax.Array


def make_state(step: int) -> State:
    params = {"shared": jax.random.normal(jax.random.key(step), (2, 3, 4)), "task_u": jnp.full((3, 3, 1), float(step))}
    return State(jnp.asarray(step), params, optax.adafactor(0.3).init(params), jax.random.key_data(jax.random.key(step)))


def make_best(step: int) -> dict:
    return {
        "trainable": {"shared": np.full((2, 3, 4), step, np.float32)},
        "score": np.array([step, -np.inf]),
        "step": np.array([1, 0]),
    }


DATA = {"a": "0" * 16, "b": "1" * 16}


def store_at(folder, fingerprint="a" * 16, keep=2, data=DATA) -> Store:
    return Store(folder, keep=keep, fingerprint=fingerprint, data=data)


@pytest.fixture
def written(tmp_path):
    store = store_at(tmp_path)
    for step in (1, 2, 3):
        store.save(step, make_state(step), make_best(step), {"loader": {"step": step}})
    store.close()
    return tmp_path


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_is_exact_and_keeps_the_newest(written):
    store = store_at(written)
    state, best, meta = store.restore(make_state(0), make_best(0))
    same(state, make_state(3))
    same(best, make_best(3))
    assert meta["loader"] == {"step": 3}
    assert store.latest() == 3
    assert sorted(path.name for path in (written / "checkpoints").iterdir()) == ["2", "3"]


def test_without_validation_there_is_no_best(tmp_path):
    store = store_at(tmp_path)
    assert store.restore(make_state(0), make_best(0)) is None
    store.save(5, make_state(5), None, {})
    assert store.restore(make_state(0), make_best(0)).best is None


def test_arrays_that_change_after_saving_do_not_reach_the_file(tmp_path):
    store, best = store_at(tmp_path), make_best(1)
    store.save(1, make_state(1), best, {})
    best["score"][:] = 99
    same(store.restore(make_state(0), make_best(0)).best, make_best(1))


def test_another_backbone_is_refused(written):
    with pytest.raises(UserError, match=r"checkpoints/3 belongs to the backbone a{16}, .* b{16}; give the backbone"):
        store_at(written, fingerprint="b" * 16).restore(make_state(0), make_best(0))


@pytest.mark.parametrize("data", [DATA | {"b": "2" * 16}, {"a": DATA["a"]}, DATA | {"b": "2" * 16, "c": "3" * 16}])
def test_other_training_data_are_refused_by_task(written, data):
    with pytest.raises(UserError, match=r"checkpoints/3 was trained on other examples of the task 'b' than there are now"):
        store_at(written, data=data).restore(make_state(0), make_best(0))


def test_the_best_is_not_read_where_none_is_asked_for(written):
    restored = store_at(written).restore(make_state(0), None)
    same(restored.state, make_state(3))
    assert restored.best is None


def files_of(folder):
    return sorted(path for path in (folder / "checkpoints" / "3").rglob("*") if path.is_file())


def harm(path, damage: str) -> None:
    """One bit in the middle is another, or the second half or all of the file is gone."""
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "delete":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(whole[:middle])
    else:
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(written, tmp_path_factory, caplog, damage):
    for path in files_of(written):
        if not path.stat().st_size or (path.name == "files.json" and damage == "delete"):
            continue  # without files.json, the rest still stands
        folder = tmp_path_factory.mktemp("copy")
        shutil.copytree(written, folder, dirs_exist_ok=True)
        relative = path.relative_to(written / "checkpoints" / "3")
        harm(folder / "checkpoints" / "3" / relative, damage)
        caplog.clear()
        store = store_at(folder)
        restored = store.restore(make_state(0), make_best(0))
        same(restored.state, make_state(2))
        same(restored.best, make_best(2))
        [message] = [record.getMessage() for record in caplog.records if record.name == "mpt_jax"]
        assert "checkpoints/3 is damaged (" in message and relative.as_posix() in message and "goes on from step 2" in message
        store.save(3, make_state(3), make_best(3), {})  # its number is free
        same(store_at(folder).restore(make_state(0), make_best(0)).state, make_state(3))
        assert (folder / "damaged" / "3").is_dir()


def test_all_damaged_is_a_sentence_and_leaves_everything_as_it_was(written):
    for step in (2, 3):
        harm(written / "checkpoints" / str(step) / "files.json", "truncate")
    with pytest.raises(
        UserError, match=r"No checkpoint in .*checkpoints can be read \(3: files.json .*; 2: .*\); restore one, or"
    ):
        store_at(written).restore(make_state(0), make_best(0))
    assert sorted(path.name for path in (written / "checkpoints").iterdir()) == ["2", "3"]


def test_killed_before_the_checksums_is_still_a_checkpoint(written):
    (written / "checkpoints" / "3" / "files.json").unlink()
    same(store_at(written).restore(make_state(0), make_best(0)).state, make_state(3))


def test_other_shapes_are_a_sentence(written):
    other = make_state(0).replace(trainable={"shared": jnp.zeros((2, 5, 4)), "task_u": jnp.zeros((3, 3, 1))})
    with pytest.raises(UserError, match=r"has float32\[2, 3, 4\] for 'trainable/shared', where this run has float32\[2, 5, 4\]"):
        store_at(written).restore(other, make_best(0))


def test_what_a_failed_save_left_is_deleted_when_the_run_goes_on(written):
    """And is no progress: a run that has nothing else may change its configuration."""
    partial = written / "checkpoints" / "4.orbax-checkpoint-tmp"
    (partial / "state").mkdir(parents=True)
    (partial / "state" / "data").write_bytes(bytes(100))
    store = store_at(written)
    assert sorted(path.name for path in (written / "checkpoints").iterdir()) == ["2", "3"]
    same(store.restore(make_state(0), make_best(0)).state, make_state(3))
    store.save(4, make_state(4), make_best(4), {})
    assert store.latest() == 4


def test_only_a_whole_checkpoint_is_progress(written):
    folder = RunFolder(str(written))
    assert folder.has_progress()
    for step in ("2", "3"):
        (written / "checkpoints" / step).rename(written / "checkpoints" / f"{step}.orbax-checkpoint-tmp")
    assert not folder.has_progress()


def test_one_process_sums_for_all(written, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(store, "_file_sums", lambda folder: pytest.fail("this is not it"))
    same(store_at(written).restore(make_state(0), make_best(0)).state, make_state(3))


def test_sums_take_little_memory(tmp_path):
    (tmp_path / "data").write_bytes(bytes(2**25))
    tracemalloc.start()
    store._file_sums(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_the_sums_are_of_every_file(written):
    sums = json.loads((written / "checkpoints" / "3" / "files.json").read_text())
    assert len(sums) == len(files_of(written)) - 1
