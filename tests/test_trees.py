import jax
import numpy as np
import pytest

from mpt_jax import trees

TREE = {"a": {"b": np.arange(6.0).reshape(2, 3), "c": {"d": np.ones(4)}}, "e": np.zeros(())}


def test_flatten_and_unflatten_are_inverse():
    flat = trees.flatten(TREE)
    assert list(flat) == ["a/b", "a/c/d", "e"]
    assert jax.tree.all(jax.tree.map(np.array_equal, trees.unflatten(flat), TREE))


def test_tuples_are_leaves():
    assert trees.flatten({"a": {"b": (1, 2)}}) == {"a/b": (1, 2)}


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}])
def test_unflatten_refuses_a_leaf_that_is_a_folder(flat):
    with pytest.raises(ValueError, match="'a"):
        trees.unflatten(flat)


def test_count_works_on_shapes():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), TREE)
    assert trees.count(TREE) == trees.count(shapes) == 6 + 4 + 1


def test_fingerprint_sees_paths_shapes_and_values_but_not_order():
    reference = trees.fingerprint(TREE)
    assert len(reference) == 16 and int(reference, 16) >= 0
    assert trees.fingerprint({"e": TREE["e"], "a": TREE["a"]}) == reference
    renamed = {"a": {"x": TREE["a"]["b"], "c": TREE["a"]["c"]}, "e": TREE["e"]}
    reshaped = {"a": {"b": TREE["a"]["b"].reshape(3, 2), "c": TREE["a"]["c"]}, "e": TREE["e"]}
    changed = {"a": {"b": TREE["a"]["b"] + 1e-6, "c": TREE["a"]["c"]}, "e": TREE["e"]}
    assert len({reference, *map(trees.fingerprint, (renamed, reshaped, changed))}) == 4
