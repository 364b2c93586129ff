"""The parser of compiled programs, on texts with known answers and on programs compiled here."""

import jax
import jax.numpy as jnp
import pytest

from imagen_jax.planning import hlo

# As libtpu 0.0.42 prints it, shortened: a loop of five iterations, an asynchronous all-gather and
# copy, and a reduce-scatter written as a fusion.
TEXT = """HloModule jit_step, is_scheduled=true, \
entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,128]{1,0:T(8,128)}}

%fused_computation (param_0: f32[8,128]) -> bf16[8,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %convert.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} convert(%param_0), \
metadata={op_name="jit(step)/jvp(UNet)/down_0/block_0/convert"}
}

%all-reduce-scatter (input: f32[16,128]) -> f32[4,128] {
  %input = f32[16,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[16,128]{1,0:T(8,128)} all-reduce(%input), channel_id=1, \
replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add, metadata={op_name="g"}
  %zero = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[4,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), \
dynamic_slice_sizes={4,128}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kLoop, calls=%fused_computation, \
metadata={op_name="jit(step)/jvp(UNet)/down_0/block_0/convert"}, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %copy.1 = f32[8,128]{1,0:T(8,128)} copy(%x), \
backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  ROOT %tuple.1 = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%i, %copy.1)
}

%condition (state.1: (s32[], f32[8,128])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %state.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %five), direction=LT
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %start = (f32[8,128]{1,0:T(8,128)}, f32[16,128]{1,0:T(8,128)}) all-gather-start(%p), \
channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %done = f32[16,128]{1,0:T(8,128)} all-gather-done(%start)
  %fetch = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %fetched = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %scattered = f32[4,128]{1,0:T(8,128)} fusion(%done), kind=kCustom, calls=%all-reduce-scatter, \
backend_config={"window_config":{"estimated_cycles":"7"}}
  %init = s32[] constant(0)
  %tuple.2 = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%init, %p)
  %while.1 = (s32[], f32[8,128]{1,0:T(8,128)}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse(TEXT)


def test_a_loop_counts_as_often_as_it_runs(module):
    """Catches a loop's body counted once, and the marker for "no estimate" read as a number."""
    runs = {i.name: (i.cycles, times) for i, _, times in module.run()}
    assert (
        runs["fusion.1"] == (100, 5) and runs["copy.1"] == (None, 5) and runs["scattered"] == (7, 1)
    )
    assert "convert.1" not in runs, "instructions inside a fusion are not listed"


def test_loops_that_count_without_a_sign():
    """Catches loops made by the compiler itself, whose counters are u32, refused."""
    module = hlo.parse(TEXT.replace("s32[]{:T(128)} constant(5)", "u32[]{:T(128)} constant(6)"))
    assert {times for i, _, times in module.run() if i.name == "fusion.1"} == {6}


CONDITIONAL = """HloModule jit_sample

%one (a: f32[2,8]) -> f32[2,8] {
  %a = f32[2,8]{1,0} parameter(0)
  %half = f32[2,8]{1,0} negate(%a)
  %again = f32[2,8]{1,0} negate(%half)
  ROOT %copy = f32[2,8]{1,0} copy(%again)
}

%both (b: f32[2,8]) -> f32[2,8] {
  %b = f32[2,8]{1,0} parameter(0)
  %twice = f32[4,8]{1,0} concatenate(%b, %b), dimensions={0}
  ROOT %slice = f32[2,8]{1,0} slice(%twice), slice={[0:2], [0:8]}
}

ENTRY %main (i: s32[], p: f32[2,8]) -> f32[2,8] {
  %i = s32[] parameter(0)
  %p = f32[2,8]{1,0} parameter(1)
  ROOT %out = f32[2,8]{1,0} conditional(%i, %p, %p), branch_computations={%one, %both}
}
"""


def test_the_branch_of_a_conditional():
    """Catches the branch with more instructions taken for the one with more work: unguided and
    guided evaluations have about the same instructions, on other numbers of rows.
    """
    module = hlo.parse(CONDITIONAL.replace("%twice = f32[4,8]", "%twice = f32[16,8]"))
    names = lambda smaller: {i.name for i, _, _ in module.run(smaller=smaller)}
    assert "twice" in names(False) and "half" not in names(False)
    assert "half" in names(True) and "twice" not in names(True)


def test_workspaces_are_no_traffic():
    """Catches the workspace of a cuBLAS call, 32 MiB on an H100, counted as traffic."""
    call = (
        "  %gemm = (bf16[4,8]{1,0}, s8[33554432]{0}) custom-call(%a, %b),"
        ' custom_call_target="__cublas$gemm"'
    )
    text = f"ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {{\n{call}\n}}\n"
    ((instruction, computation, _),) = hlo.parse(text).run()
    assert hlo.traffic(instruction, computation) == 4 * 8 * 2


def test_collectives(module):
    """Catches an asynchronous all-gather counted by its operand or twice, a reduce-scatter reported
    as an all-reduce, and groups misread.
    """
    gather, scatter = sorted(hlo.collectives(module, 8), key=lambda c: c.kind)
    assert (gather.kind, gather.bytes, gather.groups) == (
        "all-gather",
        16 * 128 * 4,
        ((0, 1), (2, 3), (4, 5), (6, 7)),
    )
    assert (scatter.kind, scatter.bytes, scatter.groups) == (
        "reduce-scatter",
        16 * 128 * 4,
        ((0, 2, 4, 6), (1, 3, 5, 7)),
    )


def test_combined_collectives():
    """Catches one of several combined arrays counted alone, and operands added to results."""
    both = TEXT.replace(
        "%start = (f32[8,128]{1,0:T(8,128)}, f32[16,128]{1,0:T(8,128)}) all-gather-start(%p)",
        "%start = ((f32[8,128]{1,0}, bf16[8,128]{1,0}), (f32[16,128]{1,0}, bf16[16,128]{1,0}))"
        " all-gather-start(%p, %q)",
    )
    gather, _ = sorted(hlo.collectives(hlo.parse(both), 8), key=lambda c: c.kind)
    assert gather.bytes == 16 * 128 * (4 + 2)


# An all-gather in three pieces, as the default compiler level overlaps it with compute, and one
# that is exposed; shortened.
CHAINED = """HloModule jit_step, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,\
128]{1,0:T(8,128)}}

%begin (a: f32[8,128]) -> f32[16,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.1 = f32[16,128]{1,0:T(8,128)} all-gather(%a), channel_id=3, \
replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="7"}
}

%go_on (b: f32[8,128]) -> f32[8,128] {
  %b = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-gather.2 = f32[16,128]{1,0:T(8,128)} all-gather(%b), channel_id=3, replica_groups={{0,1}}, \
dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %convolution.1 = f32[8,128]{1,0:T(8,128)} convolution(%b, %b), dim_labels=bf_io->bf
}

ENTRY %main (p: f32[8,128]) -> f32[16,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %async-collective-start = f32[16,128]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%begin
  %fusion.1 = f32[8,128]{1,0:T(8,128)} fusion(%p), kind=kOutput, calls=%go_on, \
backend_config={"window_config":{"estimated_cycles":"300"}}
  %async-collective-done = f32[16,128]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%begin
  ROOT %all-gather.4 = f32[32,128]{1,0:T(8,128)} all-gather(%p), channel_id=4, \
replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_a_collective_in_pieces_is_one():
    """Catches an all-gather counted once for each fusion that contains a piece of it, and an
    exposed one reported as overlapped.
    """
    collectives = list(hlo.collectives(hlo.parse(CHAINED), 4))
    assert [(c.bytes, c.overlapped) for c in collectives] == [
        (16 * 128 * 4, True),
        (32 * 128 * 4, False),
    ]


@pytest.mark.parametrize(
    "written, groups",
    [
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        (
            "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}",
            ((0, 4), (1, 5), (2, 6), (3, 7)),
        ),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_groups_written_as_a_mesh(written, groups):
    """Catches device ids left in the mesh's order, and the axes in braces read as those that do not
    communicate.
    """
    text = TEXT.replace("replica_groups={{0,1},{2,3},{4,5},{6,7}}", f"replica_groups={written}")
    assert groups in [c.groups for c in hlo.collectives(hlo.parse(text), 8)]


def test_traffic_leaves_out_on_chip_memory(module):
    """Catches bytes in on-chip memory (S(1)) counted, and bfloat16 with other than 16 bits."""
    body = module.computations["body"]
    assert (
        hlo.traffic(body["fusion.1"], body) == 8 * 128 * 4
        and hlo.traffic(body["copy.1"], body) == 2 * 8 * 128 * 4
    )
    assert hlo.type_bytes("(bf16[3,5]{1,0}, /*index=1*/pred[7]{0}, s32[])") == 30 + 7 + 4


def test_a_program_compiled_here():
    """Catches a parser that only reads the texts above: the CPU compiler prints other layouts and
    loops.
    """
    compiled = (
        jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c) @ c, None), x, length=7)[0])
        .lower(jnp.ones((16, 16)))
        .compile()
    )
    module = hlo.parse(compiled.as_text())
    assert max(times for _, _, times in module.run()) == 7


def test_not_a_program():
    """Catches an empty result for a text that is not a program."""
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("nothing")


# As libtpu 0.0.42 prints an all-gather and an all-reduce over four slices of four chips, shortened.
SLICES = """HloModule jit_step, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[32,\
128]{1,0:T(8,128)}}

ENTRY %main (p: f32[8,128]) -> f32[32,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%p, %after-all), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-gather_0",\
_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %recv = (f32[32,128]{1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-gather_0",\
_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %send.1 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%p, %after-all), channel_id=5, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce_0",\
_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=4, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce_0",\
_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = f32[32,128]{1,0:T(8,128)} get-tuple-element(%recv), index=0
}
"""


def test_what_crosses_slices_is_a_collective():
    """Catches communication between slices, the slowest of all, left out because it is written as
    sends; and an all-gather counted as the bytes that one chip sends.
    """
    gather, total = hlo.collectives(hlo.parse(SLICES), 16)
    assert (gather.kind, gather.bytes, total.kind, total.bytes) == (
        "all-gather",
        4 * 4096,
        "all-reduce",
        4096,
    )
    assert (
        gather.groups
        == total.groups
        == ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
    )
    with pytest.raises(ValueError, match="cannot read this transfer between slices"):
        list(hlo.collectives(hlo.parse(SLICES.replace("ALL_GATHER", "NEW_KIND")), 16))


# As the GPU compiler of jax 0.10.2 prints a loop of seven iterations with an all-to-all and an
# all-reduce in it, shortened. The comparison of the loop's condition is inside a fusion.
GPU = """HloModule jit_f, is_scheduled=true, \
entry_computation_layout={(f32[128,1024]{1,0})->f32[128,1024]{1,0}}

%region_0 (state: (s32[], f32[128,1024])) -> (s32[], f32[128,1024]) {
  %state = (s32[], f32[128,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[128,1024]{1,0} get-tuple-element(%state), index=1
  %all-to-all-start = ((f32[128,1024]{0,1}), f32[128,1024]{0,1}) all-to-all-start(%x), \
channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  %all-to-all-done = f32[128,1024]{0,1} all-to-all-done(%all-to-all-start)
  %all-gather-start = (f32[128,1024]{0,1}, f32[1024,1024]{0,1}) \
all-gather-start(%all-to-all-done), channel_id=2, replica_groups=mesh['axis_0'=1,'axis_1'=8] \
{'axis_1'}, dimensions={0}
  %all-gather-done = f32[1024,1024]{0,1} all-gather-done(%all-gather-start)
  %reduce-scatter-start = ((f32[1024,1024]{1,0}), f32[128,1024]{1,0}) \
reduce-scatter-start(%all-gather-done), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={0}, to_apply=%sum
  %reduce-scatter-done = f32[128,1024]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start = (f32[128,1024]{1,0}, f32[64]{0}) all-reduce-start(%reduce-scatter-done, %y), \
channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  ROOT %tuple = (s32[], f32[128,1024]{1,0}) tuple(%i, %reduce-scatter-done)
}

%fused_compare (param_0: s32[]) -> pred[] {
  %param_0 = s32[] parameter(0)
  %seven = s32[] constant(7)
  ROOT %lt = pred[] compare(%param_0, %seven), direction=LT
}

%region_2 (state.1: (s32[], f32[128,1024])) -> pred[] {
  %state.1 = (s32[], f32[128,1024]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %loop_compare_fusion = pred[] fusion(%i.1), kind=kLoop, calls=%fused_compare
}

ENTRY %main (p: f32[128,1024]) -> f32[128,1024] {
  %p = f32[128,1024]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %tuple.6 = (s32[], f32[128,1024]{1,0}) tuple(%zero, %p)
  %while.8 = (s32[], f32[128,1024]{1,0}) while(%tuple.6), condition=%region_2, body=%region_0, \
metadata={op_name="jit(f)/while"}, backend_config={"known_trip_count":{"n":"7"},\
"known_init_step":{"init":"0","step":"1"},"dynamic_variables":[]}
  ROOT %out = f32[128,1024]{1,0} get-tuple-element(%while.8), index=1
}
"""


def test_loops_and_collectives_of_gpus():
    """Catches a loop refused because its bound is not in its condition (as for gradient
    accumulation); operands added to the results of an all-to-all or reduce-scatter; and those of an
    all-reduce left out.
    """
    collectives = {c.kind: c for c in hlo.collectives(hlo.parse(GPU), 8)}
    assert {c.times for c in collectives.values()} == {7} and len(collectives) == 4
    assert collectives["all-to-all"].bytes == 128 * 1024 * 4
    assert collectives["all-gather"].bytes == collectives["reduce-scatter"].bytes == 1024 * 1024 * 4
    assert collectives["all-reduce"].bytes == 128 * 1024 * 4 + 64 * 4
