"""Time and memory traffic of a compiled TPU program, instruction by instruction.

The time of an instruction is the compiler's estimate, or a roofline (bytes over memory bandwidth)
where it has none. Asynchronous copies and slices are assumed to be hidden behind compute. Not
included are collectives, see `links` (except that a matrix product fused with a collective counts),
and Pallas kernels, for which the compiler has no estimate, see `kernels`.
"""

import dataclasses
import re
from collections.abc import Iterator

from imagen_jax.hardware.chips import Chip
from imagen_jax.planning.hlo import COLLECTIVES, Instruction, Module, operands, traffic, type_bytes

MATRIX, ELEMENTWISE, COPY, KERNEL = "matrix", "elementwise", "copy", "kernel"
# Opcodes without a cost of their own: they move no data, their computation is counted where it is
# defined, or they start or end an asynchronous operation.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id"
    " opt-barrier iota while conditional call async-update send recv domain add-dependency".split()
)
# Opcodes that only move data.
MOVES = FREE | frozenset(
    "copy transpose reshape slice dynamic-slice dynamic-update-slice concatenate pad fusion"
    " broadcast convert".split()
)
# Parts of an op_name that are not module names: JAX transformations and control flow.
NOT_A_MODULE = frozenset(
    "while body cond closed_call checkpoint remat rematted_computation custom_vjp_call"
    " custom_jvp_call pjit".split()
)


@dataclasses.dataclass(frozen=True)
class Item:
    """The cost of one instruction, over all its executions.

    Fields:
        path: module path in the model's names, "" if unknown.
        kind: "matrix", "elementwise" or "copy".
        seconds: total time.
        estimated: True if the time is the compiler's estimate, False if it is a roofline.
        name: the instruction's name.
    """

    path: str
    kind: str
    seconds: float
    estimated: bool
    name: str


def items(module: Module, chip: Chip, smaller: bool = False) -> Iterator[Item]:
    """Yields the cost of every instruction that takes time on the chip.

    smaller: which branch of a conditional counts, see `Module.run`.
    """
    for instruction, computation, times in module.run(smaller=smaller):
        if _is_free(instruction, module) or _is_kernel(instruction):
            continue
        cycles = instruction.cycles
        seconds = (
            traffic(instruction, computation) / chip.memory_bandwidth
            if cycles is None
            else cycles / chip.clock
        )
        yield Item(
            module_path(instruction.op_name),
            kind(instruction, module),
            times * seconds,
            cycles is not None,
            instruction.name,
        )


def memory_bytes(module: Module, smaller: bool = False) -> float:
    """Bytes that a program reads and writes in device memory.

    Includes kernels and asynchronous copies; excludes collectives. smaller: see `items`.
    """
    total = 0.0
    for instruction, computation, times in module.run(smaller=smaller):
        if instruction.opcode in ("copy-done", "slice-done"):
            total += times * _moved(instruction, computation)
        elif not _is_free(instruction, module):
            total += times * traffic(instruction, computation)
    return total


def _is_free(instruction: Instruction, module: Module) -> bool:
    """Whether an instruction is not counted: see `FREE`, and pure collectives."""
    opcode = instruction.opcode
    return (
        opcode in FREE or opcode.endswith(("-start", "-done")) or _only_sends(instruction, module)
    )


def _is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction is a Pallas kernel."""
    return 'custom_call_target="tpu_custom_call"' in instruction.rest


def _moved(done: Instruction, computation: dict[str, Instruction]) -> int:
    """Bytes of an asynchronous copy or slice in device memory.

    They count twice if both source and destination are there, once if one is on-chip memory.
    """
    (start,) = operands(done, computation)
    ends = (done.type, *(operand.type for operand in operands(start, computation)[:1]))
    return type_bytes(done.type) * sum(type_bytes(end, hbm_only=True) > 0 for end in ends)


def _only_sends(instruction: Instruction, module: Module) -> bool:
    """Whether an instruction is a collective without a matrix product fused to it."""
    return is_collective(instruction, module) and kind(instruction, module) != MATRIX


def is_collective(instruction: Instruction, module: Module) -> bool:
    """Whether an instruction is a collective or a fusion that contains one."""
    return any(
        opcode.removesuffix("-start") in COLLECTIVES for opcode in _opcodes(instruction, module)
    )


def kind(instruction: Instruction, module: Module) -> str:
    """The kind of an instruction or fusion.

    "matrix" if it contains a matrix product or convolution, "copy" if it only moves data, else
    "elementwise".
    """
    opcodes = _opcodes(instruction, module)
    if opcodes & {"convolution", "dot"}:
        return MATRIX
    return COPY if opcodes <= MOVES else ELEMENTWISE


def _opcodes(instruction: Instruction, module: Module) -> set[str]:
    """The opcode of an instruction and those of the instructions fused into it."""
    return {instruction.opcode} | {
        i.opcode for computation in module.inside(instruction) for i in computation.values()
    }


def module_path(op_name: str) -> str:
    """The module path in an op_name, or "" if there is none.

    "jit(step)/transpose(jvp(UNet))/down_2/block_0/conv_1/conv_general_dilated" gives
    "down_2/block_0/conv_1".
    """
    parts = op_name.split("/")[:-1]
    return "/".join(
        part for part in parts if re.fullmatch(r"\w+", part) and part not in NOT_A_MODULE
    )
