"""The most expensive kernels of a profiler trace, read without TensorBoard."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

SHOWN = 12
# Kinds of kernels by their names, first match wins.
KINDS = (
    ("convolution", r"conv|fprop|dgrad|wgrad|implicit_gemm|cudnn.*(engine|nhwc)"),
    ("matrix product", r"gemm|cutlass|cublas|xmma|nvjet|dot"),
    ("attention", r"flash|fmha|sdpa|attention|softmax"),
    ("copy or transpose", r"memcpy|memset|copy|transpose|nchw"),
    ("reduction", r"reduc"),
    ("elementwise", r"fusion|loop|wrapped|convert|broadcast|concatenate|pad"),
)


def table(directory: str, steps: int) -> dict[str, Any]:
    """{"busy_s": kernel seconds a step, "kernels": the largest, "kinds": seconds by kind}."""
    seconds, count = defaultdict(float), defaultdict(int)
    for name, duration in events(directory):
        seconds[name] += duration / steps
        count[name] += 1
    busy = sum(seconds.values())
    kinds: dict[str, float] = defaultdict(float)
    for name, taken in seconds.items():
        kinds[kind_of(name)] += taken
    order = sorted(seconds, key=seconds.get, reverse=True)[:SHOWN]
    rows = [
        {
            "kernel": name[:160],
            "kind": kind_of(name),
            "seconds": seconds[name],
            "share": seconds[name] / busy,
            "calls": count[name] / steps,
        }
        for name in order
    ]
    shares = {kind: taken / busy for kind, taken in sorted(kinds.items(), key=lambda kv: -kv[1])}
    return {"busy_s": busy, "kernels": rows, "kinds": shares}


def events(directory: str) -> Iterator[tuple[str, float]]:
    """(name without its number, seconds) of every kernel: GPU streams, or a CPU's operations."""
    for file in Path(directory).rglob("*.xplane.pb"):
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        gpus = [plane for plane in planes if "/device:GPU" in plane.name]
        for plane in gpus or planes:
            for line in plane.lines:
                if gpus and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    if gpus or has_operation(event):
                        yield plain(event.name), event.duration_ns / 1e9


def has_operation(event: Any) -> bool:
    """Whether a host event is an operation of a compiled program without nested operations."""
    return plain(event.name) not in ("while", "call", "conditional") and any(
        name == "hlo_op" for name, _ in event.stats
    )


def plain(name: str) -> str:
    """A kernel's name without its number, such as loop_add_fusion."""
    return re.sub(r"([._]\d+)+$", "", name)


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.I)), "other")
