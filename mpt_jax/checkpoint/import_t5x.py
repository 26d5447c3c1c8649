"""Import of a T5X checkpoint: its target's arrays, one for each layer or with the layers scanned, into our tree.

T5X's names are ours but for the layers. `layers_<n>` has them one by one; scanned ("scalable") models have them on axis 1 of
arrays under `encoder/encoder` (flaxformer) or `encoder/layers` (t5x `scalable_t5`). The kernels of attention may keep heads
apart: [D,H,K], and [H,K,D] of `out`. A checkpoint has no configuration, so the configured one is what it must fit.

Strict as `import_hf`: every leaf is filled, every array of the target is used, shapes must agree.
"""

import math
from typing import NamedTuple

from mpt_jax.checkpoint.leaves import Leaf, Leaves, equal, joined, layer, some, stack, transposed
from mpt_jax.checkpoint.t5x_files import Place, open_target
from mpt_jax.config import T5Config
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import param_shapes
from mpt_jax.trees import flatten

RELPOS = "relpos_bias/rel_embedding"
RELPOS_SCANNED = (RELPOS, "relative_posemb/rel_embedding")  # within the scanned layers: flaxformer, scalable_t5
ASSUMED = {  # by activation, what `t5x_architecture` cannot see and takes as T5X's T5s have it
    "gated-gelu": "gated by gelu's tanh form (UL2's gate, silu, looks alike), position biases to distance 128, norm epsilon 1e-6",
    "relu": "relu, position biases to distance 128, norm epsilon 1e-6",
}


class Source(NamedTuple):
    """Where one of our leaves lies: in an array for each layer, in one, or in one with the layers on axis 1."""

    keys: list[str]
    is_scanned: bool = False


def t5x_architecture(place: Place) -> T5Config:
    """The architecture that the names and shapes of a T5X checkpoint show, and for the rest `ASSUMED`.

    Raises:
        UserError: arrays by which a T5 is known are missing, or their shapes fit no T5.
    """
    found = open_target(place)

    def array(*ends: str, ranks: tuple[int, ...] = (2,)) -> tuple[str, tuple[int, ...], int]:
        """(path, shape of one layer, layers that are stacked in it) of the first array of one of these names."""
        for end in ends:
            if path := next((path for path in sorted(found) if path == end or path.endswith(f"/{end}")), None):
                shape, is_scanned = found[path].shape, path.split("/")[1] in ("encoder", "decoder", "layers")
                if len(shape) - is_scanned not in ranks:
                    raise UserError(
                        f"{place.name} is no T5, for target/{path} has the shape {list(shape)}, but a T5's has "
                        f"{ranks[0] + is_scanned} axes; give a T5X checkpoint of a T5."
                    )
                return (path, (shape[0], *shape[2:]), shape[1]) if is_scanned else (path, shape, 0)
        raise UserError(f"{place.name} is no T5, for it has no target/…/{ends[0]}; give a T5X checkpoint of a T5.")

    def layers(side: str) -> int:
        numbers = {part for path in found if path.startswith(f"{side}/layers_") for part in path.split("/")[1:2]}
        return len(numbers) or array(f"{side}/{side}/mlp/wo/kernel", f"{side}/layers/mlp/wo/kernel")[2]

    _, (vocab_size, d_model), _ = array("token_embedder/embedding")
    _, (heads, buckets), _ = array(*RELPOS_SCANNED)
    _, (_, *widths), _ = array("attention/query/kernel", ranks=(2, 3))
    hidden, (_, d_ff), _ = array("mlp/wi_0/kernel", "mlp/wi/kernel")
    config = T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=math.prod(widths) // max(heads, 1),
        num_heads=heads,
        d_ff=d_ff,
        num_encoder_layers=layers("encoder"),
        num_decoder_layers=layers("decoder"),
        activation="gated-gelu" if "wi_0" in hidden else "relu",
        tie_embeddings="decoder/logits_dense/kernel" not in found,
        relpos_buckets=buckets,
    )
    try:
        config.validate()
    except UserError as error:
        raise UserError(f"{place.name} shows no T5: {error}") from None
    return config


def open_t5x(place: Place, config: T5Config) -> Leaves:
    """The leaves of a T5X checkpoint in our tree, with names, shapes and dtypes checked and (almost) nothing read yet.

    Raises:
        UserError: missing, unexpected, misshapen or unreadable arrays; another dtype than float32 and bfloat16.
    """
    found = open_target(place)
    shapes = {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()}
    sources = {path: _source(path, shape, found) for path, shape in shapes.items()}
    wanted = {key for source in sources.values() for key in source.keys}
    if missing := wanted - found.keys():
        raise UserError(
            f"{place.name} lacks {_targets(missing)}; it is incomplete or of another architecture than T5Config says, so choose "
            "the matching gin/backbones file."
        )
    if extra := found.keys() - wanted:
        raise UserError(
            f"{place.name} holds {_targets(extra)}, which the T5 of T5Config has no place for; choose the matching "
            "gin/backbones file."
        )
    for key in sorted(wanted):
        if found[key].dtype not in ("float32", "bfloat16"):
            raise UserError(
                f"{place.name}: target/{key} is {found[key].dtype}, but weights must be float32 or bfloat16; "
                "take another checkpoint."
            )
    return {path: _leaf(path, shapes[path], sources[path], found, place, config) for path in shapes}


def _source(path: str, shape: tuple[int, ...], found: Leaves) -> Source:
    side = path.split("/")[0]
    bases = [base for base in (f"{side}/{side}", f"{side}/layers") if any(key.startswith(f"{base}/") for key in found)]
    if "/layers/" in path:
        name = path.removeprefix(f"{side}/layers/")
        return Source([f"{bases[0]}/{name}"], True) if bases else Source([f"{side}/layers_{n}/{name}" for n in range(shape[0])])
    if path.endswith(RELPOS) and path not in found:
        for key in (f"{base}/{name}" for base in bases for name in RELPOS_SCANNED):
            if key in found:
                return Source([key], True)
    return Source([path])


def _leaf(path: str, shape: tuple[int, ...], source: Source, found: Leaves, place: Place, config: T5Config) -> Leaf:
    """Our leaf of this shape, composed of the arrays of the checkpoint. UserError for an array that does not fit."""

    def fit(key: str, layers: tuple[int, ...], shape: tuple[int, ...]) -> Leaf:
        """The array `key` as [*layers, *shape], where `layers` is () or the number of those that are on its axis 1."""
        heads = (config.num_heads, config.d_kv)
        forms: list[tuple[tuple[int, ...], int | None]] = [(shape, None)]
        if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
            forms.append(((shape[0], *heads), 1))
        elif path.endswith("out/kernel"):
            forms.append(((*heads, shape[1]), 0))
        leaf = found[key]
        for form, heads_at in forms:
            if leaf.shape == (form[0], *layers, *form[1:]):
                leaf = transposed(leaf, (1, 0, *range(2, len(leaf.shape)))) if layers else leaf
                return leaf if heads_at is None else joined(leaf, len(layers) + heads_at)
        raise UserError(
            f"{place.name}: target/{key} has the shape {list(leaf.shape)}, but T5Config wants "
            f"{[shape[0], *layers, *shape[1:]]}; choose the matching gin/backbones file."
        )

    if "/layers/" not in path:
        if not source.is_scanned:
            return fit(source.keys[0], (), shape)
        layers = config.num_encoder_layers if path.startswith("encoder/") else config.num_decoder_layers
        return _common(fit(source.keys[0], (layers,), shape), f"{place.name}: target/{source.keys[0]}")
    if source.is_scanned:
        return fit(source.keys[0], shape[:1], shape[1:])
    return stack([fit(key, (), shape[1:]) for key in source.keys])


def _common(leaf: Leaf, name: str) -> Leaf:
    """What all layers of a scanned leaf [layers, …] share: scanned models have a table of position biases for each layer."""

    for number in range(1, leaf.shape[0]):
        if not equal(layer(leaf, 0), layer(leaf, number)):
            raise UserError(
                f"{name} differs from layer to layer, as in umT5, but a T5 has one table of position biases for all layers; "
                "take another checkpoint."
            )
    return layer(leaf, 0)


def _targets(keys: set[str]) -> str:
    return some(f"target/{key}" for key in keys)
