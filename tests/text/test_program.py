"""The program of an encoder on a mesh, without weights: its sharding over eight devices."""

import jax
import numpy as np
import pytest

from imagen_jax.hardware import topology
from imagen_jax.sharding import batch_mesh
from imagen_jax.text.program import EncodeProgram, fewest_parts, parameter_shapes, weight_bytes
from imagen_jax.text.t5_network import T5Config, T5Encoder
from imagen_jax.weights import text_encoders

CONFIG = T5Config(d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, vocab_size=128)
XXL = T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128)
GIB = 2**30


def create(config: T5Config, dtype: str, mesh) -> EncodeProgram:
    network = T5Encoder(config, dtype)
    return text_encoders.encode_program(network, parameter_shapes(network, dtype), mesh)


def size(config: T5Config, dtype: str) -> int:
    return weight_bytes(parameter_shapes(T5Encoder(config), dtype))


def compiled(fsdp: int, devices: int = 8):
    return (
        create(CONFIG, "float32", batch_mesh(jax.devices()[:devices], fsdp)).lower(16, 32).compile()
    )


def test_each_device_does_its_part():
    """Catches a batch that every device computes completely, in eight times the time."""
    whole = compiled(1, devices=1).cost_analysis()["flops"]
    for fsdp in (1, 2, 8):
        assert compiled(fsdp).cost_analysis()["flops"] == pytest.approx(whole / 8, rel=0.05)


@pytest.mark.parametrize(("fsdp", "communicates"), [(1, False), (2, True), (8, True)])
def test_only_divided_weights_are_sent(fsdp, communicates):
    """Catches features gathered on every device, and communication with replicated weights."""
    text = compiled(fsdp).as_text()
    assert ("all-gather(" in text) == communicates and "all-reduce(" not in text


def test_weights_are_divided_over_fsdp_alone():
    """Catches sharded vectors, replicated kernels, weights sharded over `data`, and a leaf that
    differs from the model's.
    """
    abstract = create(XXL, "bfloat16", batch_mesh(jax.devices(), 4)).params
    leaves = jax.tree.leaves(abstract)
    total = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    held = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
    assert (
        total
        == size(XXL, "bfloat16")
        == 2
        * (24 * (4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096) + 32128 * 4096 + 32 * 64 + 4096)
    )
    assert total / 4 <= held < 1.001 * total / 4


def test_as_few_parts_as_fit():
    """Catches unnecessary sharding, and weights that leave no memory for a batch."""
    xxl = size(XXL, "bfloat16")
    assert fewest_parts(xxl, int(15.75 * GIB), 8) == 1  # v5e
    assert fewest_parts(2 * xxl, int(15.75 * GIB), 8) == 2
    assert fewest_parts(xxl, 11 * GIB, 6) == 2 and fewest_parts(xxl, None, 8) == 1
    with pytest.raises(
        ValueError, match="8.9 GiB do not fit on 1 devices of 8.0 GiB: use more devices"
    ):
        fewest_parts(xxl, 8 * GIB, 1)
    with pytest.raises(ValueError, match="fsdp 3, .* does not fit 8 devices"):
        batch_mesh(jax.devices(), 3)


def test_local_mesh_asks_the_devices(monkeypatch):
    """Catches a mesh that never shards weights, or uses only some of the devices."""
    sizes = lambda: tuple(text_encoders.local_mesh(10).shape[axis] for axis in ("data", "fsdp"))
    assert sizes() == (8, 1)
    monkeypatch.setattr(
        text_encoders, "fewest_parts", lambda weights, memory, devices: 4 if weights == 10 else 1
    )
    assert sizes() == (2, 4)


@pytest.mark.filterwarnings(
    "ignore:Error reading persistent compilation cache"
)  # it cannot hold programs for absent devices
@pytest.mark.parametrize("fsdp", [1, 4])
def test_it_compiles_for_devices_that_are_not_there(fsdp):
    """Catches a program that needs weights or real devices to be planned."""
    pytest.importorskip("libtpu")
    program = create(CONFIG, "bfloat16", batch_mesh(topology.parse("v5e:2x2").devices(), fsdp))
    memory = (
        program.lower(8, 16).compile(compiler_options={"optimization_level": 9}).memory_analysis()
    )
    whole = size(CONFIG, "bfloat16")
    assert (
        whole / fsdp <= memory.argument_size_in_bytes < 3 * whole / fsdp + 2**16
    )  # arrays are padded to tiles
