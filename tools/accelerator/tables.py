"""The results as Markdown tables for BENCHMARKS.md.

A measurement without a result keeps its row, with the reason in the last column.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Parts = Mapping[str, Mapping[str, Mapping[str, Any]]]
GIB = 2**30
# Images/s a GPU on 8 A100-80G, NVIDIA's T5X Imagen (since withdrawn), text encoder not counted.
A100 = {"base_500m": 107.0, "base_2b": 27.4, "sr_256": 84.3, "sr_1024": 84.8}
STAGES = ("base_2b", "sr_256", "sr_1024")


def markdown(about: Mapping[str, Any], parts: Parts) -> str:
    """The whole page: facts, then a table for each part that ran."""
    writers = {
        "correct": correct,
        "train_speed": train_speed,
        "sampling": sampling,
        "side_by_side": side_by_side,
        "long_run": long_run,
        "pictures": pictures,
    }
    lines = [facts(about)]
    if about.get("tiny"):
        lines += ["", "Tiny networks: these numbers test the tool and tell nothing else."]
    for part, writer in writers.items():
        if part in parts:
            lines += ["", f"### {part}", "", *writer(parts[part])]
    return "\n".join(lines)


def facts(about: Mapping[str, Any]) -> str:
    """Date, commit, device, versions and command in one line."""
    versions = ", ".join(f"{name} {v}" for name, v in about.get("versions", {}).items())
    memory = number(about.get("memory_bytes"), "{:.1f} GiB usable", 1 / GIB)
    device = f"{about.get('device', 'device unknown')} ({memory})"
    head = f"{about['date']}, commit {about['commit']}, {device}, Python {about['python']}"
    return f"{head}, {versions}: `{about['command']}`"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; a pipe in a cell is escaped."""
    line = lambda cells: "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def number(value: Any, form: str, scale: float = 1.0) -> str:
    """A number in a format, or a dash for one that was not measured."""
    return "-" if value is None else form.format(value if scale == 1.0 else value * scale)


def last(entry: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The newest record of a kind in a measurement; empty if there is none."""
    return next((dict(r) for r in reversed(entry["records"]) if r["what"] == what), {})


def note(entry: Mapping[str, Any]) -> str:
    """The status in one line; "" if it is "done"."""
    return "" if entry["status"] == "done" else " ".join(entry["status"].split())[:160]


def correct(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One row a check."""
    rows = []
    for name, entry in tasks.items():
        for record in entry["records"]:
            if record["what"] == "tests":
                outcome = f"{record['passed']} passed, {record['failed']} failed"
                failed = "; ".join(test["test"] for test in record["failures"][:8])
                rows.append((name, outcome, "0 failed", failed))
            elif record["what"] == "check":
                passed = "passed" if record["passed"] else "FAILED"
                error = number(record["error"], "{:.2e}")
                rows.append((record["check"], error, number(record["tolerance"], "{:g}"), passed))
        if not any(r["what"] in ("tests", "check") for r in entry["records"]) or note(entry):
            rows.append((name, "-", "-", note(entry)))
    return table(("check", "found", "allowed", "result"), rows)


def train_speed(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Speed and memory of each network, the slowest one's kernels, and the trials."""
    heads = (
        "network", "batch", "step", "images/s", "8 A100-80G, images/s a GPU", "MFU",
        "peak, measured",
        "compiler", "by shapes", "tracing", "compiling", "note",
    )  # fmt: skip
    gib = lambda record, field: number(record.get(field), "{:.1f} GiB", 1 / GIB)
    rows, trials, listed = [], [], []
    for name, entry in tasks.items():
        for step in best_steps(entry) or [{}]:
            if name.startswith("trial: "):
                trials.append((name.removeprefix("trial: "), step, entry))
                continue
            rows.append((
                name, number(step.get("batch"), "{}"),
                number(step.get("seconds"), "{:.1f} ms", 1e3),
                number(step.get("images_per_s"), "{:.1f}"), number(A100.get(name), "{:g}"),
                number(step.get("mfu"), "{:.1f} %", 100), gib(step, "peak_bytes"),
                gib(step, "compiler_allocated_bytes"), gib(step, "analytic_bytes"),
                number(step.get("trace_s"), "{:.0f} s"), number(step.get("compile_s"), "{:.0f} s"),
                note(entry),
            ))  # fmt: skip
        if profile := last(entry, "kernels"):
            listed.append((best_steps(entry)[-1].get("mfu"), name, profile))
    lines = table(heads, rows)
    if listed:
        lines += ["", *kernel_table(*min(listed, key=lambda row: row[0] or 0.0)[1:])]
    return lines + (["", *trial_table(tasks, trials)] if trials else [])


def best_steps(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The newest step record of each batch size of a measurement."""
    newest = {r["batch"]: dict(r) for r in entry["records"] if r["what"] == "step"}
    return list(newest.values())


def kernel_table(name: str, profile: Mapping[str, Any]) -> list[str]:
    """The three most expensive kernels of a network and the shares of the kinds."""
    rows = [
        (f"`{k['kernel'][:90]}`", k["kind"], number(k["seconds"], "{:.2f} ms", 1e3),
         number(k["share"], "{:.1f} %", 100), number(k["calls"], "{:.0f}"))
        for k in profile["kernels"][:3]
    ]  # fmt: skip
    lines = table((f"kernel of {name}", "kind", "a step", "share", "calls a step"), rows)
    kinds = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in profile["kinds"].items())
    return [*lines, "", f"Kernels of {name} by kind: {kinds or 'none in the trace'}."]


def trial_table(
    tasks: Mapping[str, Mapping[str, Any]], trials: Sequence[tuple[str, dict, Mapping]]
) -> list[str]:
    """Each trial next to the same network and batch without it."""
    rows = []
    for label, step, entry in trials:
        model = label.split(",")[0]
        default = next(
            (s for s in best_steps(tasks.get(model, {"records": []}))
             if s["batch"] == step.get("batch")), {},
        )  # fmt: skip
        speeds = step.get("images_per_s"), default.get("images_per_s")
        ratio = speeds[0] / speeds[1] if all(speeds) else None
        rows.append((
            label, number(step.get("batch"), "{}"), number(speeds[0], "{:.1f}"),
            number(ratio, "{:.3f}"), number(step.get("compile_s"), "{:.0f} s"), note(entry),
        ))  # fmt: skip
    return table(("trial", "batch", "images/s", "over default", "compiling", "note"), rows)


def sampling(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each stage at each batch, then the cascade."""
    rows, totals = [], {}
    for name, entry in tasks.items():
        drawn = [r for r in entry["records"] if r["what"] == "drawn"]
        for r in drawn:
            totals.setdefault(r["wanted"], {})[name] = r["full_seconds"]
            rows.append((
                name, str(r["wanted"]), str(r["batch"]), number(r["seconds"], "{:.3f} s"),
                str(r["full_steps"]), number(r["full_seconds"], "{:.2f} s"),
                number(r["images_per_s"], "{:.3f}"), note(entry),
            ))  # fmt: skip
        if not drawn:
            rows.append((name, *["-"] * 6, note(entry)))
    for wanted, stages in totals.items():
        if set(stages) == set(STAGES):
            total = sum(stages.values())
            speed = f"{wanted / total:.3f}"
            rows.append(("cascade", str(wanted), "-", "-", "-", f"{total:.2f} s", speed, ""))
    heads = (
        "stage", "pictures", "at once", "8 steps", "steps", "all steps", "pictures/s", "note",
    )  # fmt: skip
    return table(heads, rows)


def side_by_side(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each implementation, batch and direction."""
    rows = []
    for name, entry in tasks.items():
        timed = [r for r in entry["records"] if r["what"] == "timed"]
        for r in timed:
            rows.append((
                name, r["implementation"], f"{r['parameters']:,}", str(r["batch"]), r["pass"],
                number(r["seconds"], "{:.2f} ms", 1e3), number(r["images_per_s"], "{:.1f}"),
                note(entry),
            ))  # fmt: skip
        if not timed:
            rows.append((name, *["-"] * 6, note(entry)))
    heads = (
        "run", "implementation", "parameters", "batch", "pass", "time", "images/s", "note",
    )  # fmt: skip
    return table(heads, rows)


def long_run(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Speed and memory before the kill and after it, then the ledger and the trace."""
    rows, lines = [], []
    for name, entry in tasks.items():
        for what in ("killed", "continued"):
            if r := last(entry, what):
                memory = (r.get(f"memory/{m}_gib") for m in ("device", "device_peak", "host"))
                rows.append((
                    f"{name}, {what}", str(r["last_step"]), number(r["images_per_s"], "{:.1f}"),
                    *(number(value, "{:.2f} GiB") for value in memory), "",
                ))  # fmt: skip
        if r := last(entry, "ledger"):
            parts = ", ".join(f"{k} {v:.1f} s" for k, v in sorted(r["seconds"].items()))
            clocks = f"{r['ledger_s']:.1f} s in the ledger, {r['outside_s']:.1f} s outside"
            lines += ["", f"{name}: {clocks}; {parts}."]
        if r := last(entry, "trace"):
            lines += ["", f"{name}: the trace has {number(r['bytes'], '{:.1f} MiB', 2**-20)}."]
        if note(entry):
            rows.append((name, *["-"] * 5, note(entry)))
    heads = ("training", "last step", "images/s", "device", "device, peak", "host", "note")
    return table(heads, rows) + lines


def pictures(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each step of the demo cascade's training."""
    rows = []
    for name, entry in tasks.items():
        r = last(entry, "trained")
        rows.append((
            name, number(r.get("steps"), "{}"), number(r.get("images_per_s"), "{:.1f}"),
            number(r.get("loss"), "{:.4f}"), f"{entry['seconds']:.0f} s", note(entry),
        ))  # fmt: skip
    return table(("step", "steps", "images/s", "last loss", "took", "note"), rows)
