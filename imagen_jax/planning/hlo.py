"""A parser for the text of a compiled program (HLO).

It yields the instructions, the number of times each runs, the TPU compiler's cycle estimates, and
the collectives.

The TPU compiler annotates nearly every fusion, copy and convolution with a cost in cycles
(`estimated_cycles` in `backend_config`; 2^63 - 1 means that there is no estimate). The estimates
are part of the compiled program: they are the same on every run, and need no TPU.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

NO_ESTIMATE = 2**63 - 1
# The TPU compiler turns collectives between slices into sends and receives over the hosts' network.
# These are the names in their attributes.
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
    """One instruction of a computation.

    Fields:
        name: without the leading "%".
        opcode: such as "fusion".
        type: the type of the result, as text.
        operands: the operands, as text.
        rest: the text after the operands: attributes, metadata, backend_config.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    rest: str

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate in cycles, or None."""
        estimate = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(estimate[1]) if estimate and int(estimate[1]) != NO_ESTIMATE else None

    @functools.cached_property
    def op_name(self) -> str:
        """The origin in the traced program.

        For example "jit(step)/transpose(jvp(UNet))/down_2/block_0/conv_1/conv_general_dilated".
        """
        op_name = re.search(r'op_name="([^"]*)"', self.rest)
        return op_name[1] if op_name else ""

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        """The computations that it calls: {attribute: names}.

        Attributes are "calls", "to_apply", "body", "condition" and "branches".
        """
        called: dict[str, list[str]] = {}
        for attribute, name, branches in _CALLED.findall(self.rest):
            if branches:
                called.setdefault("branches", []).extend(re.findall(_NAME, branches))
            else:
                key = "branches" if attribute.endswith("_computation") else attribute
                called.setdefault(key, []).append(name)
        return called


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Fields:
        computations: {computation name: {instruction name: instruction}}.
        entry: name of the computation that the program starts with.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def run(
        self, computation: str | None = None, times: float = 1, smaller: bool = False
    ) -> Iterator[tuple[Instruction, dict[str, Instruction], float]]:
        """Yields (instruction, its computation, number of executions) for all that runs.

        The body of a loop counts once per iteration. Of the branches of a conditional, the one with
        the largest results counts, or with `smaller` the one with the smallest. The instructions
        inside a fusion are not listed, see `inside`.
        """
        pick = min if smaller else max
        here = self.computations[computation or self.entry]
        for instruction in here.values():
            yield instruction, here, times
            called = instruction.called
            if instruction.opcode == "while":
                trips = self.trip_count(instruction)
                for name in called["body"]:
                    yield from self.run(name, times * trips, smaller)
            elif instruction.opcode == "conditional":
                yield from self.run(pick(called["branches"], key=self._size), times, smaller)
            elif instruction.opcode in ("call", "async-start"):
                for name in called.get("calls", []) + called.get("to_apply", []):
                    yield from self.run(name, times, smaller)

    def _size(self, computation: str) -> int:
        """Bytes of the results of all instructions of a computation."""
        return sum(type_bytes(i.type) for i in self.computations[computation].values())

    def inside(self, instruction: Instruction) -> list[dict[str, Instruction]]:
        """The computations inside a fusion; an empty list for other instructions."""
        return (
            [self.computations[name] for name in instruction.called.get("calls", [])]
            if instruction.opcode == "fusion"
            else []
        )

    def trip_count(self, loop: Instruction) -> int:
        """The number of iterations of a `while`.

        It is the compiler's annotation, or the constant that the loop's condition compares a
        counter with. Raises ValueError if there is neither.
        """
        if annotation := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(annotation[1])
        (condition,) = loop.called["condition"]
        constants = [
            re.match(r"[su]\d+\[\]", i.type) and re.search(r"^(\d+)", i.operands[0])
            for i in self.computations[condition].values()
            if i.opcode == "constant"
        ]
        bounds = [int(constant[1]) for constant in constants if constant]
        if len(bounds) != 1:
            raise ValueError(
                f"cannot determine the trip count of the loop {loop.name} ({loop.op_name}): its"
                f" condition has the constants {bounds}, not exactly one"
            )
        return bounds[0]


def parse(text: str) -> Module:
    """Parses the text of `Compiled.as_text()`. Raises ValueError if it has no entry computation."""
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
        raise ValueError("not the text of a compiled program: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    kind, text = _balanced(text) if text.startswith("(") else text.split(" ", 1)
    opcode, text = text.strip().split("(", 1)
    operands, rest = _balanced("(" + text)
    return Instruction(
        name, opcode, kind, tuple(part.strip() for part in _top_level(operands[1:-1])), rest
    )


def _balanced(text: str) -> tuple[str, str]:
    """Splits text after the parenthesis that it starts with."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _top_level(text: str) -> list[str]:
    """Splits text at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]] if text[start:].strip() else parts


def type_bytes(text: str, hbm_only: bool = False) -> int:
    """Bytes of an array or tuple type.

    `hbm_only` excludes arrays in on-chip memory, whose layout says S(1) or higher.
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
    """Bytes that an instruction reads and writes in device memory, each operand counted once.

    This is a lower bound: an instruction may read an operand several times. The workspaces that
    cuBLAS and cuDNN calls have among their results do not count.
    """
    result = instruction.type
    if 'custom_call_target="__cu' in instruction.rest:
        result = re.sub(r"\b[su]8\[\d+\]", "", result)
    return type_bytes(result, hbm_only=True) + sum(
        type_bytes(o.type, hbm_only=True) for o in operands(instruction, computation)
    )


def operands(instruction: Instruction, computation: dict[str, Instruction]) -> list[Instruction]:
    """The instructions that produce an instruction's operands."""
    names = [operand.split(" ")[-1].lstrip("%") for operand in instruction.operands]
    return [computation[name] for name in names if name in computation]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Fields:
        kind: one of `COLLECTIVES`.
        bytes: of all operands or of all results on one device, whichever is larger.
        groups: groups of devices, as positions in the mesh; for a collective-permute its pairs.
        times: number of executions.
        op_name: origin in the traced program.
        overlapped: True if it is overlapped with compute. The fast level (O0) never does this.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: float
    op_name: str
    overlapped: bool = False


def collectives(module: Module, devices: int, smaller: bool = False) -> Iterator[Collective]:
    """Yields every collective of a program for `devices` devices, also those inside fusions.

    smaller: see `Module.run`.

    An all-reduce fused with a slice of its result is reported as a reduce-scatter. A collective
    over several TPU slices is compiled into one part within slices and one between them; each is
    reported. A collective that the compiler spreads over several fusions, to overlap it with their
    compute, appears in each of them with the same `chain_id` and is reported once.
    """
    chains = set()
    for instruction, here, times in module.run(smaller=smaller):
        if instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.rest:
            yield _between_slices(instruction, here, times)
        parts = [
            (i, computation)
            for computation in module.inside(instruction)
            for i in computation.values()
        ] or [(instruction, here)]
        for part, computation in parts:
            kind = part.opcode.removesuffix("-start")
            chain = re.search(r'channel_id=\d+.*\bchain_id="\d+"', part.rest)
            if kind not in COLLECTIVES or (chain and chain[0] in chains):
                continue
            if chain:
                chains.add(chain[0])
            scattered = kind == "all-reduce" and any(i.opcode == "dynamic-slice" for i, _ in parts)
            yield Collective(
                kind="reduce-scatter" if scattered else kind,
                bytes=_payload(part, computation),
                groups=_groups(part, devices),
                times=times,
                op_name=part.op_name,
                overlapped=bool(chain) or part.opcode.endswith("-start"),
            )


def _between_slices(
    send: Instruction, computation: dict[str, Instruction], times: float
) -> Collective:
    """The exchange of a chip with the chips at its position in the other slices.

    Its size is that of the send or of the receive with the same rendezvous name, whichever is
    larger.
    """
    attribute = lambda name: re.search(rf'{name}="([^"]*)"', send.rest)[1]
    kind = BETWEEN_SLICES.get(attribute("_xla_megascale_transfer_type"))
    rendezvous = f'"{attribute("_xla_host_transfer_rendezvous")}"'
    target = re.match(r"\{([\d,]+)\}x\{0:(\d+)\}", attribute("_xla_megascale_target"))
    if kind is None or target is None:
        raise ValueError(
            f"{send.name}: cannot read this transfer between slices: {send.rest[:300]}"
        )
    first = lambda instruction: type_bytes(_ARRAY.search(instruction.type)[0])
    size = max(
        first(i)
        for i in computation.values()
        if i.opcode in ("send", "recv") and rendezvous in i.rest
    )
    chips = int(target[2]) + 1
    groups = tuple(
        tuple(chip + i * chips for i, _ in enumerate(target[1].split(","))) for chip in range(chips)
    )
    return Collective(kind, size, groups, times, send.op_name)


def _payload(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    """Bytes of all operands or of all results, whichever is larger.

    The result of an asynchronous start lists the operands before the results, except for an
    all-reduce.
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
    """The groups of devices, in any of the forms that XLA prints.

    {{0,1},{2,3}}
    [2,2]<=[2,2]T(1,0)
    mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}
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
        inner = [i for i, (name, _) in enumerate(axes) if name in names]
        order = np.moveaxis(ids, inner, range(-len(inner), 0)).reshape(
            -1, math.prod(shape[i] for i in inner)
        )
    else:
        raise ValueError(
            f"{instruction.name}: cannot read the device groups of this {instruction.opcode}:"
            f" {instruction.rest[:300]}"
        )
    return tuple(map(tuple, order.tolist()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _iota(dims: str, order: str | None) -> Int[np.ndarray, "..."]:
    """The device numbers of "[2,3]T(1,0)": 0 to 5 in two rows, transposed."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids
