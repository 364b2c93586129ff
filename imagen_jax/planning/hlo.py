"""Reads the text of a compiled program: its instructions, how often each runs, what the TPU
compiler estimates it costs, and its collectives.

The TPU compiler writes a cost in cycles beside nearly every fusion, copy and convolution
(`estimated_cycles` in `backend_config`). It is a property of the compiled program, the same on
every run and on a machine without a TPU. 2^63 - 1 there means that it has none.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

NO_ESTIMATE = 2**63 - 1
# What the TPU compiler calls the parts of collectives that cross slices, which it makes sends to
# and receives from the hosts' network.
BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    f"{sign}{n}": n for sign in "su" for n in (8, 16, 32, 64)
}

_NAME = r"%?([\w.\-]+)"
_DEFINITION = re.compile(rf"^\s+(?:ROOT )?{_NAME} = ")
_COMPUTATION = re.compile(rf"^(ENTRY )?{_NAME} \(.*\) -> .*\{{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    rf"\b(calls|to_apply|body|condition|true_computation|false_computation)={_NAME}"
    r"|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `type` is the result's, as written; `rest` what follows the
    operands.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    rest: str

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate, if it has one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found and int(found[1]) != NO_ESTIMATE else None

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the traced program this is from:
        "jit(step)/transpose(jvp(UNet))/down_2/block_0/conv_1/conv_general_dilated".
        """
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        """{attribute: computations}: calls, to_apply, body, condition, branches."""
        found: dict[str, list[str]] = {}
        for attribute, name, branches in _CALLED.findall(self.rest):
            if branches:
                found.setdefault("branches", []).extend(re.findall(_NAME, branches))
            else:
                found.setdefault(
                    "branches" if attribute.endswith("_computation") else attribute, []
                ).append(name)
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: {name: {instruction name: instruction}} of its computations, and which
    one it starts with.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def run(
        self, computation: str | None = None, times: float = 1
    ) -> Iterator[tuple[Instruction, dict[str, Instruction], float]]:
        """Each instruction that runs, its computation and how often: what a loop's body holds runs
        as often as the loop does.

        Of a conditional's branches the one with the most instructions is taken. What a fusion calls
        is part of the fusion.
        """
        here = self.computations[computation or self.entry]
        for instruction in here.values():
            yield instruction, here, times
            called = instruction.called
            if instruction.opcode == "while":
                trips = self.trip_count(instruction)
                for name in called["body"]:
                    yield from self.run(name, times * trips)
            elif instruction.opcode == "conditional":
                yield from self.run(
                    max(called["branches"], key=lambda name: len(self.computations[name])), times
                )
            elif instruction.opcode in ("call", "async-start"):
                for name in called.get("calls", []) + called.get("to_apply", []):
                    yield from self.run(name, times)

    def inside(self, instruction: Instruction) -> list[dict[str, Instruction]]:
        """The computations that a fusion is made of; none of another instruction."""
        return (
            [self.computations[name] for name in instruction.called.get("calls", [])]
            if instruction.opcode == "fusion"
            else []
        )

    def trip_count(self, loop: Instruction) -> int:
        """How often a `while` runs: what the compiler says of it, or a constant that its condition
        compares a counter from 0 with. Raises ValueError for any other.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        (condition,) = loop.called["condition"]
        constants = [
            re.match(r"[su]\d+\[\]", i.type) and re.search(r"^(\d+)", i.operands[0])
            for i in self.computations[condition].values()
            if i.opcode == "constant"
        ]
        bounds = [int(found[1]) for found in constants if found]
        if len(bounds) != 1:
            raise ValueError(
                f"the loop {loop.name} ({loop.op_name}) has no known trip count: constants {bounds}"
                " in its condition"
            )
        return bounds[0]


def parse(text: str) -> Module:
    """The program that `Compiled.as_text()` prints. Raises ValueError if there is no entry
    computation in it.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            current = computations.setdefault(opening[2], {})
            entry = opening[2] if opening[1] else entry
        elif current is not None and (start := _DEFINITION.match(line)):
            instruction = _instruction(start[1], line[start.end() :])
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    kind, text = _balanced(text) if text.startswith("(") else text.split(" ", 1)
    opcode, text = text.strip().split("(", 1)
    operands, rest = _balanced("(" + text)
    return Instruction(
        name, opcode, kind, tuple(part.strip() for part in _top_level(operands[1:-1])), rest
    )


def _balanced(text: str) -> tuple[str, str]:
    """(the parenthesis that `text` begins with, to its end; what follows)."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _top_level(text: str) -> list[str]:
    """The parts between those commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]] if text[start:].strip() else parts


def type_bytes(text: str, hbm_only: bool = False) -> int:
    """Bytes of an array or tuple type; `hbm_only` leaves out what lives in on-chip memory (a layout
    that says S(1) or more).
    """
    total = 0
    for item, dims, layout in _ARRAY.findall(text):
        if item in ITEM_BITS and not (hbm_only and re.search(r"S\([1-9]", layout)):
            total += (
                math.prod(map(int, dims.split(","))) * ITEM_BITS[item] // 8
                if dims
                else ITEM_BITS[item] // 8
            )
    return total


def traffic(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    """Bytes that an instruction reads and writes in device memory, each operand once: less than it
    really moves if it reads one twice.
    """
    return type_bytes(instruction.type, hbm_only=True) + sum(
        type_bytes(o.type, hbm_only=True) for o in operands(instruction, computation)
    )


def operands(instruction: Instruction, computation: dict[str, Instruction]) -> list[Instruction]:
    """The instructions whose results it takes."""
    names = [operand.split(" ")[-1].lstrip("%") for operand in instruction.operands]
    return [computation[name] for name in names if name in computation]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation: its kind, the bytes that it takes or makes on a device, whichever
    is more, who talks to whom, how often.

    `beside`: the program goes on computing meanwhile, which the fast compile level never arranges.
    """

    kind: str
    bytes: int
    groups: tuple[
        tuple[int, ...], ...
    ]  # of positions in the mesh; of a collective-permute, its pairs
    times: float
    op_name: str
    beside: bool = False


def collectives(module: Module, devices: int) -> Iterator[Collective]:
    """Every collective of a program for so many devices, those inside fusions too; an all-reduce
    that is fused with the slice of it is a reduce-scatter.

    A collective over several slices of TPUs is written as parts within a slice and between slices;
    each is one here. One that the compiler spreads over what computes meanwhile stands whole in
    each fusion that carries it, with one `chain_id`, and is one here too.
    """
    chains = set()
    for instruction, here, times in module.run():
        if instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.rest:
            yield _between_slices(instruction, here, times)
        parts = [
            (i, computation)
            for computation in module.inside(instruction)
            for i in computation.values()
        ] or [(instruction, here)]
        for found, computation in parts:
            kind = found.opcode.removesuffix("-start")
            chain = re.search(r'channel_id=\d+.*\bchain_id="\d+"', found.rest)
            if kind not in COLLECTIVES or (chain and chain[0] in chains):
                continue
            if chain:
                chains.add(chain[0])
            scattered = kind == "all-reduce" and any(i.opcode == "dynamic-slice" for i, _ in parts)
            beside = bool(chain) or found.opcode.endswith("-start")
            yield Collective(
                "reduce-scatter" if scattered else kind,
                _payload(found, computation),
                _groups(found, devices),
                times,
                found.op_name,
                beside,
            )


def _between_slices(
    send: Instruction, computation: dict[str, Instruction], times: float
) -> Collective:
    """What a chip exchanges with those of its place in other slices: as much as it sends or, in the
    receive of the same name, gets.
    """
    attribute = lambda name: re.search(rf'{name}="([^"]*)"', send.rest)[1]
    kind, meeting = (
        BETWEEN_SLICES.get(attribute("_xla_megascale_transfer_type")),
        f'"{attribute("_xla_host_transfer_rendezvous")}"',
    )
    target = re.match(r"\{([\d,]+)\}x\{0:(\d+)\}", attribute("_xla_megascale_target"))
    if kind is None or target is None:
        raise ValueError(
            f"{send.name}: cannot read this transfer between slices: {send.rest[:300]}"
        )
    first = lambda instruction: type_bytes(_ARRAY.search(instruction.type)[0])
    size = max(
        first(i) for i in computation.values() if i.opcode in ("send", "recv") and meeting in i.rest
    )
    chips = int(target[2]) + 1
    groups = tuple(
        tuple(chip + i * chips for i, _ in enumerate(target[1].split(","))) for chip in range(chips)
    )
    return Collective(kind, size, groups, times, send.op_name)


def _payload(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    """Bytes of all operands or of all results. A start's result lists the operands first, but that
    of an all-reduce.
    """
    count = len(instruction.operands)
    results = [type_bytes(array[0]) for array in re.finditer(_ARRAY, instruction.type)]
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        results = results[count : 2 * count]
    return max(
        sum(results),
        sum(type_bytes(operand.type) for operand in operands(instruction, computation)),
    )


def _groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """Who talks to whom, in the three forms that XLA writes: {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0),
    mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}.
    """
    listed = re.search(
        r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})?\}", instruction.rest
    )
    if listed:
        groups = re.findall(r"\{([\d,]+)\}", listed[1] or "")
        return tuple(_numbers(group) for group in groups) or (tuple(range(devices)),)
    if iota := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.rest
    ):
        order = _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    elif mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" \{([^}]*)\}",
        instruction.rest,
    ):
        axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
        shape, names = [int(size) for _, size in axes], re.findall(r"'(\w+)'", mesh[4])
        ids = (_iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(shape))).reshape(shape)
        talking = [i for i, (name, _) in enumerate(axes) if name in names]
        order = np.moveaxis(ids, talking, range(-len(talking), 0)).reshape(
            -1, math.prod(shape[i] for i in talking)
        )
    else:
        raise ValueError(
            f"{instruction.name}: cannot read who takes part in this {instruction.opcode}"
        )
    return tuple(map(tuple, order.tolist()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _iota(dims: str, order: str | None) -> np.ndarray:
    """[2,3]T(1,0): 0 to 5 in two rows, transposed."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids
