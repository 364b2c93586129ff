"""Time of a compiled program's instructions, and time of its collectives on links."""

import types

import pytest

from imagen_jax.hardware import chips, topology
from imagen_jax.planning import cost, hlo, links
from tests.planning.test_hlo import TEXT


@pytest.mark.parametrize(
    "op_name, path",
    [
        (
            "jit(step)/transpose(jvp(UNet))/down_2/block_0/conv_1/conv_general_dilated",
            "down_2/block_0/conv_1",
        ),
        (
            "jit(step)/transpose(jvp(UNet))/checkpoint/rematted_computation/mid/block_0/norm_0/mul",
            "mid/block_0/norm_0",
        ),
        (
            "jit(step)/while/body/closed_call/UNet/mid/attn_0/attn->bc/dot_general",
            "UNet/mid/attn_0",
        ),
        ("", ""),
    ],
)
def test_module_path(op_name, path):
    """Catches transformations or control flow read as modules, and the operation itself read as
    one.
    """
    assert cost.module_path(op_name) == path


def test_items_by_estimate_or_roofline():
    """Catches a loop's body counted once, the marker for "no estimate" read as cycles, a collective
    counted as compute, and bytes divided by the wrong rate.
    """
    chip = chips.by_name("v5e")
    costs = {item.name: item for item in cost.items(hlo.parse(TEXT), chip)}
    assert (
        costs["fusion.1"].seconds == pytest.approx(5 * 100 / chip.clock)
        and costs["fusion.1"].estimated
    )
    assert (
        costs["copy.1"].seconds == pytest.approx(5 * 2 * 8 * 128 * 4 / chip.memory_bandwidth)
        and not costs["copy.1"].estimated
    )
    assert costs["copy.1"].kind == cost.COPY and costs["fusion.1"].path == "down_0/block_0"
    assert set(costs) == {
        "fusion.1",
        "copy.1",
    }, "neither all-gather nor the fusion with a reduce-scatter"


# A convolution that the compiler fused with a part of an asynchronous all-gather, and a fusion that
# only contains an all-gather; shortened.
CARRIED = """HloModule jit_step, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,\
128]{1,0:T(8,128)}}

%carrier (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = f32[16,128]{1,0:T(8,128)} all-gather(%a), channel_id=1, replica_groups={{0,1}}, \
dimensions={0}
  ROOT %convolution.1 = f32[8,128]{1,0:T(8,128)} convolution(%a, %a), dim_labels=bf_io->bf
}

%only (b: f32[8,128]) -> f32[16,128] {
  %b = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = f32[16,128]{1,0:T(8,128)} all-gather(%b), channel_id=2, \
replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %gathers = f32[16,128]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%only, \
backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %carries = f32[8,128]{1,0:T(8,128)} fusion(%p), kind=kOutput, calls=%carrier, \
backend_config={"window_config":{"estimated_cycles":"300"}}
}
"""


def test_a_product_that_carries_a_collective_counts():
    """Catches convolutions left out because the compiler overlaps an all-gather with them."""
    (item,) = cost.items(hlo.parse(CARRIED), chips.by_name("v5e"))
    assert (item.name, item.kind, item.estimated) == ("carries", cost.MATRIX, True)
    assert cost.memory_bytes(hlo.parse(CARRIED)) == 2 * 8 * 128 * 4


def test_memory_bytes():
    """Catches arrays in on-chip memory counted, an asynchronous copy left out or counted at both
    ends, a loop's body counted once, and collectives counted.
    """
    array = 8 * 128 * 4
    assert cost.memory_bytes(hlo.parse(TEXT)) == 5 * (array + 2 * array) + array


def device(i, coords=(0, 0, 0), slice_index=0):
    return types.SimpleNamespace(id=i, coords=coords, slice_index=slice_index)


def gather(groups, size=8e9, kind="all-gather", times=1):
    return hlo.Collective(kind, int(size), groups, times, "")


def test_links_of_a_torus():
    """Catches sides that do not close counted as rings, an all-reduce as cheap as an all-gather,
    and the links of one side used for a group along two.
    """
    hardware = topology.parse("v5e:16x16")
    devices = [device(i, (i % 16, i // 16, 0)) for i in range(256)]
    one_side = gather((tuple(range(16)),))
    assert links.seconds(one_side, devices, hardware) == pytest.approx(8e9 * 15 / 16 / (2 * 50e9))
    assert links.seconds(
        gather((tuple(range(16)),), kind="all-reduce", times=3), devices, hardware
    ) == pytest.approx(6 * 8e9 * 15 / 16 / 100e9)
    assert links.seconds(gather((tuple(range(256)),)), devices, hardware) == pytest.approx(
        8e9 * 255 / 256 / (4 * 50e9)
    )
    small = topology.parse("v5e:4x4")
    corner = [device(i, (i % 4, i // 4, 0)) for i in range(16)]
    assert links.seconds(gather((tuple(range(4)),)), corner, small) == pytest.approx(
        8e9 * 3 / 4 / 50e9
    )
    assert links.seconds(gather(((3,),)), corner, small) == 0
    assert links.seconds(
        gather(((0, 1), (1, 2)), kind="collective-permute"), corner, small
    ) == pytest.approx(8e9 / 50e9)


@pytest.mark.parametrize(
    "name, links_of_a_side",
    [("v5p:2x4x4", 1), ("v4:2x2x4", 1), ("v5p:4x4x4", 2), ("v5p:4x4x12", 2)],
)
def test_rings_of_cubes(name, links_of_a_side):
    """Catches rings in slices of half a cube, whose sides of 4 chips do not close."""
    hardware = topology.parse(name)
    x, y, z = hardware.shape
    devices = [device(i, (i % x, i // x % y, i // (x * y))) for i in range(hardware.chips)]
    group = tuple(i * x * y for i in range(z))
    assert links.seconds(gather((group,)), devices, hardware) == pytest.approx(
        8e9 * (z - 1) / z / (links_of_a_side * hardware.chip.link_bandwidth)
    )


def test_links_between_slices_and_nodes():
    """Catches a data-centre network as fast as the torus, all bytes of a slice sent by each of its
    chips, and nodes of four GPUs treated as halves of a node of eight.
    """
    hardware = topology.parse("2xv5e:2x2")
    devices = [device(i, (i % 2, i // 2 % 2, 0), i // 4) for i in range(8)]
    inner, outer = 2 * 8e9 * 3 / 4 / (2 * 50e9), 2 * (8e9 / 4) / 2 / 3.1e9
    assert links.seconds(
        gather((tuple(range(8)),), kind="all-reduce"), devices, hardware
    ) == pytest.approx(inner + outer)
    nodes = topology.parse("h100:2x8")
    gpus = [types.SimpleNamespace(id=i) for i in range(16)]
    assert links.seconds(gather((tuple(range(8)),)), gpus, nodes) == pytest.approx(
        8e9 * 7 / 8 / 450e9
    )
    assert links.seconds(gather(((0, 8),)), gpus, nodes) == pytest.approx(8e9 / 2 / 50e9)
    assert links.seconds(gather(((0, 4),)), gpus, topology.parse("h100:4x4")) == pytest.approx(
        8e9 / 2 / 50e9
    )


def test_axes_of_groups():
    """Catches the axis along which groups differ, in place of that of their members."""
    sizes = {"data": 2, "fsdp": 4, "model": 1, "spatial": 2}
    assert links.axes_of(((0, 2, 4, 6), (1, 3, 5, 7)), sizes) == ("fsdp",)
    assert links.axes_of(((0, 8),), sizes) == ("data",) and links.axes_of(((0, 1),), sizes) == (
        "spatial",
    )
    assert links.axes_of((tuple(range(16)),), sizes) == ("data", "fsdp", "spatial")
