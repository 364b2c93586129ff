"""Parameter trees by name map: values, named errors, checksum, writing, memory."""

import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from imagen_jax.weights.name_map import NameMap, Slot, map_tree, read_tree, write_tree
from tests.weights import layouts

SLOTS = {
    "text.table": Slot(("token_embedding",), (10, 4), False),
    "text.layer.weight": Slot(("block_0", "dense", "kernel"), (6, 4), True),
    "text.layer.scale": Slot(("block_0", "norm", "scale"), (4,), False),
}
NAMES = NameMap(SLOTS)


def make_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=slot.shape).astype(np.float32) for name, slot in SLOTS.items()}


def as_params(weights: dict[str, np.ndarray]) -> dict:
    """The tree of SLOTS, built without the map."""
    block = {
        "dense": {"kernel": weights["text.layer.weight"].T},
        "norm": {"scale": weights["text.layer.scale"]},
    }
    return {"token_embedding": weights["text.table"], "block_0": block}


def assert_same(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_all_layouts_read_alike(tmp_path):
    """Catches a swapped or untransposed kernel in any layout, and a checksum that depends on the
    layout or misses a change.
    """
    weights, digests = make_weights(), set()
    for layout in layouts.LAYOUTS:
        directory = layouts.write(tmp_path / layout, weights, layout)
        params, digest = read_tree(directory, NAMES, "float32")
        assert_same(params, as_params(weights))
        digests.add(digest)
    assert len(digests) == 1
    weights["text.layer.scale"][3] += 1e-6
    layouts.write(tmp_path / "other", weights, "safetensors")
    assert read_tree(tmp_path / "other", NAMES, "float32")[1] not in digests


def test_checksum_is_of_the_stored_tensors(tmp_path):
    """Catches a checksum of cast weights: two files that differ beyond bfloat16 would be equal."""
    layouts.write(tmp_path, make_weights(), "safetensors")
    half, of_half = read_tree(tmp_path, NAMES, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(ml_dtypes.bfloat16)}
    assert of_half == read_tree(tmp_path, NAMES, "float32")[1]


def test_a_part_of_a_file(tmp_path):
    """Catches a map of a part that refuses, reads or hashes the rest, and a map of the whole file
    that ignores it.
    """
    layouts.write(tmp_path, make_weights(), "safetensors")
    alone = read_tree(tmp_path, NAMES, "float32")
    rest = {"decoder.weight": np.ones(3, np.float32), "decoder.steps": np.ones(2, np.int64)}
    layouts.write(tmp_path, make_weights() | rest, "safetensors")
    part = NameMap(SLOTS, lambda name: name.startswith("text."))
    params, digest = read_tree(tmp_path, part, "float32")
    assert_same(params, alone[0])
    assert digest == alone[1]
    with pytest.raises(ValueError, match=r"has unexpected decoder\.steps, decoder\.weight"):
        read_tree(tmp_path, NAMES, "float32")


def test_aliases(tmp_path):
    """Catches a tensor not found by its alias, both names refused, a checksum that depends on the
    name.
    """
    weights = make_weights()
    names = NameMap(SLOTS, aliases={"text.embedding": "text.table"})
    renamed = {"text.embedding" if n == "text.table" else n: w for n, w in weights.items()}
    digests = set()
    for variant in (weights, renamed, renamed | {"text.table": weights["text.table"].copy()}):
        layouts.write(tmp_path, variant, "safetensors")
        params, digest = read_tree(tmp_path, names, "float32")
        assert_same(params, as_params(weights))
        digests.add(digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("text.layer.weight"), r"lacks text\.layer\.weight"),
        (lambda w: w.update({"text.new": w["text.table"].copy()}), r"has unexpected text\.new"),
        (
            lambda w: w.update({"text.layer.weight": w["text.layer.weight"].T.copy()}),
            r"text\.layer\.weight is \(4, 6\), not \(6, 4\)",
        ),
        (
            lambda w: w.update({"text.layer.scale": np.ones(4, np.int32)}),
            r"text\.layer\.scale is int32",
        ),
        (lambda w: w.clear() or w.update({"x": np.ones(1, np.float32)}), "lacks .*, .*, text"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    """Catches a missing, extra, misshapen or integer tensor that is ignored or not named."""
    weights = make_weights()
    change(weights)
    layouts.write(tmp_path, weights, "safetensors")
    with pytest.raises(ValueError, match=message):
        read_tree(tmp_path, NAMES, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_trees_read_again(tmp_path, dtype):
    """Catches a forgotten transpose, fp32 that is rounded, a partial file."""
    weights = make_weights()
    path = tmp_path / "model.safetensors"
    write_tree(path, as_params(weights), NAMES, dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    want = jax.tree.map(lambda x: np.asarray(jax.numpy.asarray(x, dtype)), as_params(weights))
    assert_same(read_tree(path, NAMES, dtype)[0], want)


def test_kernels_of_convolutions(tmp_path):
    """Catches height and width exchanged by a plain transpose, in reading, writing or the map."""
    weight = np.arange(2 * 3 * 5 * 7, dtype=np.float32).reshape(2, 3, 5, 7)  # [out, in, h, w]
    tree = {"conv": {"kernel": weight.transpose(2, 3, 1, 0), "bias": np.ones(2, np.float32)}}
    names = map_tree(tree, lambda path: path.replace("/", ".").replace("kernel", "weight"))
    assert names.slots["conv.weight"] == Slot(("conv", "kernel"), (2, 3, 5, 7), True)
    assert names.slots["conv.bias"] == Slot(("conv", "bias"), (2,), False)
    write_tree(tmp_path / "model.safetensors", tree, names, "float32")
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["conv.weight"], weight)
    assert_same(read_tree(tmp_path, names, "float32")[0], tree)


def test_trees_that_do_not_fit_are_not_written(tmp_path):
    """Catches a leaf that is dropped, omitted or written with another shape."""
    path, params = tmp_path / "model.safetensors", as_params(make_weights())
    with pytest.raises(ValueError, match="has no place for head/kernel"):
        write_tree(path, params | {"head": {"kernel": np.ones((2, 2))}}, NAMES, "float32")
    with pytest.raises(ValueError, match=r"lacks text\.table"):
        write_tree(path, {"block_0": params["block_0"]}, NAMES, "float32")
    params["block_0"]["dense"]["kernel"] = params["block_0"]["dense"]["kernel"].T
    with pytest.raises(ValueError, match=r"text\.layer\.weight is \(4, 6\), not \(6, 4\)"):
        write_tree(path, params, NAMES, "float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["safetensors", "bin shards"])
def test_never_twice_in_memory(tmp_path, layout):
    """Catches a checkpoint that is read completely before it is cast."""
    slots = {f"layer.{i}": Slot((f"block_{i}", "kernel"), (256, 512), True) for i in range(40)}
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=slot.shape).astype(np.float32) for n, slot in slots.items()}
    largest, total = (f(w.nbytes for w in weights.values()) for f in (max, sum))
    layouts.write(tmp_path, weights, layout)
    del weights
    tracemalloc.start()
    read_tree(tmp_path, NameMap(slots), "float32")  # once, so that its imports are not counted
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    params, _ = read_tree(tmp_path, NameMap(slots), "bfloat16")
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == total // 2
    assert peak < total // 2 + 4 * largest < total
