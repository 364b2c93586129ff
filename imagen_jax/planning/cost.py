"""Where a compiled program's time goes: the compiler's estimate of each instruction, or a roofline
where it has none.

What moves data in the background (asynchronous copies and slices) is taken as hidden behind what
computes. Left out are collectives, whose time is a matter of links (`links`; of a product that is
fused with one the product counts), and Pallas kernels, of which the compiler knows no cost
(`kernels`).
"""

import dataclasses
import re
from collections.abc import Iterator

from imagen_jax.hardware.chips import Chip
from imagen_jax.planning.hlo import COLLECTIVES, Instruction, Module, operands, traffic, type_bytes

MATRIX, ELEMENTWISE, COPY, KERNEL = "matrix", "elementwise", "copy", "kernel"
# They move no data, or what they do is counted where it is done; so is the end and the beginning of
# what is asynchronous.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id"
    " opt-barrier iota while conditional call async-update send recv domain add-dependency".split()
)
# Components of an op_name that are not modules' names: what transformations and control flow add.
NOT_A_PLACE = frozenset(
    "while body cond closed_call checkpoint remat rematted_computation custom_vjp_call"
    " custom_jvp_call pjit".split()
)


@dataclasses.dataclass(frozen=True)
class Item:
    """What one instruction costs in all its runs. `place` is in the model's names ("" if unknown);
    not `estimated`: by the roofline.
    """

    place: str
    kind: str
    seconds: float
    estimated: bool
    name: str


def items(module: Module, chip: Chip) -> Iterator[Item]:
    """Every instruction of a program that takes time on the chip."""
    for instruction, computation, times in module.run():
        opcode = instruction.opcode
        if (
            opcode in FREE
            or opcode.endswith(("-start", "-done"))
            or 'custom_call_target="tpu_custom_call"' in instruction.rest
            or _only_sends(instruction, module)
        ):
            continue
        cycles = instruction.cycles
        seconds = (
            traffic(instruction, computation) / chip.memory_bandwidth
            if cycles is None
            else cycles / chip.clock
        )
        yield Item(
            place(instruction.op_name),
            kind(instruction, module),
            times * seconds,
            cycles is not None,
            instruction.name,
        )


def memory_bytes(module: Module) -> float:
    """Bytes that a program reads and writes in device memory, kernels and what moves in the
    background included, collectives not.
    """
    total = 0.0
    for instruction, computation, times in module.run():
        opcode = instruction.opcode
        if opcode in ("copy-done", "slice-done"):
            total += times * _moved(instruction, computation)
        elif (
            opcode not in FREE
            and not opcode.endswith(("-start", "-done"))
            and not _only_sends(instruction, module)
        ):
            total += times * traffic(instruction, computation)
    return total


def _moved(done: Instruction, computation: dict[str, Instruction]) -> int:
    """Bytes of an asynchronous copy or slice in device memory: at one end if the other is on the
    chip.
    """
    (start,) = operands(done, computation)
    ends = (done.type, *(operand.type for operand in operands(start, computation)[:1]))
    return type_bytes(done.type) * sum(type_bytes(end, hbm_only=True) > 0 for end in ends)


def _only_sends(instruction: Instruction, module: Module) -> bool:
    """Whether an instruction is a collective and computes nothing: a product may carry
    one along.
    """
    return is_collective(instruction, module) and kind(instruction, module) != MATRIX


def is_collective(instruction: Instruction, module: Module) -> bool:
    """Whether an instruction is one, or a fusion that has one in it."""
    return any(
        opcode.removesuffix("-start") in COLLECTIVES for opcode in _opcodes(instruction, module)
    )


def kind(instruction: Instruction, module: Module) -> str:
    """What a fusion mainly is: anything with a matrix product or convolution in it is one, and what
    only moves data is a copy.
    """
    inside = _opcodes(instruction, module)
    if inside & {"convolution", "dot"}:
        return MATRIX
    moves = FREE | {
        "copy",
        "transpose",
        "reshape",
        "slice",
        "dynamic-slice",
        "dynamic-update-slice",
        "concatenate",
        "pad",
        "fusion",
        "broadcast",
        "convert",
    }
    return COPY if inside <= moves else ELEMENTWISE


def _opcodes(instruction: Instruction, module: Module) -> set[str]:
    """An instruction's own, and those in a fusion."""
    return {instruction.opcode} | {
        i.opcode for computation in module.inside(instruction) for i in computation.values()
    }


def place(op_name: str) -> str:
    """ "down_2/block_0/conv_1" of
    "jit(step)/transpose(jvp(UNet))/down_2/block_0/conv_1/conv_general_dilated".
    """
    parts = op_name.split("/")[:-1]
    return "/".join(
        part for part in parts if re.fullmatch(r"\w+", part) and part not in NOT_A_PLACE
    )
