"""Parameter trees as flat dicts of "a/b/c" paths: flatten, count, fingerprint.

A tree here is nested dicts; whatever is not a dict is a leaf. Empty dicts disappear when flattened.
"""

import hashlib
import math
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


def count(tree: Any) -> int:
    """Number of scalars in all leaves (arrays or `jax.ShapeDtypeStruct`s; any pytree)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


class LeafDigest:
    """A hash of one leaf that is never whole in memory: of its shape and of its values as float32, in any pieces."""

    def __init__(self, shape: tuple[int, ...]):
        self._digest = hashlib.sha256(str(shape).encode())

    def add(self, values: np.ndarray) -> None:
        """The next values of the leaf, in C order."""
        values = np.ascontiguousarray(values, np.float32)
        self._digest.update(values.data)  # hashed in place: a copy of an XXL matrix as bytes would double its memory

    def result(self) -> str:
        """64 hex digits."""
        return self._digest.hexdigest()


def combine(digests: Mapping[str, str]) -> str:
    """The fingerprint of a tree from the digests of its leaves by their paths: 16 hex digits."""
    lines = "".join(f"{path} {digest}\n" for path, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def fingerprint(tree: Tree) -> str:
    """16 hex digits that change with any path, shape or value (values are compared as float32)."""
    digests = {}
    for path, leaf in flatten(tree).items():
        values = np.asarray(leaf)
        digest = LeafDigest(values.shape)
        digest.add(values)
        digests[path] = digest.result()
    return combine(digests)
