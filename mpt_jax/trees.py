"""Parameter trees as flat dicts of "a/b/c" paths: select, split, merge, count, fingerprint.

A tree here is nested dicts; whatever is not a dict is a leaf. Empty dicts disappear when flattened.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Tree = Mapping[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """{"a": {"b": x}} → {"a/b": x}, in the tree's own order."""
    flat: dict[str, Any] = {}

    def walk(node: Tree, prefix: str) -> None:
        for name, value in node.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{name}/")
            else:
                flat[f"{prefix}{name}"] = value

    walk(tree, "")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`; ValueError when one path is both a leaf and a folder."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"'{path}' lies inside the leaf '{folder}'")
        if name in node:
            raise ValueError(f"'{path}' is given twice")
        node[name] = value
    return tree


def split(tree: Tree, pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(leaves whose whole path matches the regex, all others), both as nested dicts."""
    flat = flatten(tree)
    matching = {path for path in flat if re.fullmatch(pattern, path)}
    return (
        unflatten({path: leaf for path, leaf in flat.items() if path in matching}),
        unflatten({path: leaf for path, leaf in flat.items() if path not in matching}),
    )


def merge(*trees: Tree) -> dict[str, Any]:
    """One tree with the leaves of all; ValueError when two trees hold the same path."""
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise ValueError(f"'{path}' is in two of the trees to be merged")
            flat[path] = leaf
    return unflatten(flat)


def count(tree: Any) -> int:
    """Number of scalars in all leaves (arrays or `jax.ShapeDtypeStruct`s; any pytree)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def fingerprint(tree: Tree) -> str:
    """16 hex digits that change with any path, shape or value (values are compared as float32)."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        values = np.ascontiguousarray(np.asarray(leaf).astype(np.float32))
        digest.update(f"{path}{values.shape}".encode())
        digest.update(values.data)  # hashed in place: a copy of an XXL matrix as bytes would double its memory
    return digest.hexdigest()[:16]
