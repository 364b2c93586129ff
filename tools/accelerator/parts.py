"""The six parts in order of value: the processes of each and their time limits."""

import json
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.accelerator import tables
from tools.accelerator.running import Outcome, Process, Session

TESTS = (
    "tests/diffusion/test_schedule.py", "tests/diffusion/test_process.py",
    "tests/diffusion/test_guidance.py", "tests/diffusion/test_sampler.py",
    "tests/diffusion/test_conditioning.py", "tests/diffusion/test_loss.py",
    "tests/diffusion/test_density.py", "tests/diffusion/test_grid.py",
    "tests/models/test_blocks.py", "tests/models/test_networks.py", "tests/text/test_t5_network.py",
)  # fmt: skip
TINY_TESTS = ("tests/diffusion/test_schedule.py", "tests/diffusion/test_process.py")
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several processes use the device at once
MODELS = tuple(tables.A100)
# Label -> (XLA_FLAGS, fields of the model's config, attention), the most promising first.
TRIALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "cuDNN attention": ("", {}, "cudnn"),
    "remat none": ("", {"remat": "none"}, ""),
    "no Triton matrix products": ("--xla_gpu_enable_triton_gemm=false", {}, ""),
    "no command buffers": ("--xla_gpu_enable_command_buffer=", {}, ""),
    "NHWC convolutions": ("--xla_gpu_force_conv_nhwc=true", {}, ""),
    "latency-hiding scheduler": ("--xla_gpu_enable_latency_hiding_scheduler=true", {}, ""),
    "cuDNN fusions of matrix products": ("--xla_gpu_cudnn_gemm_fusion_level=2", {}, ""),
}
# Seconds of each part of nine minutes; what one leaves over goes to the last.
SECONDS = {
    "correct": 120.0, "train_speed": 180.0, "sampling": 90.0, "side_by_side": 70.0,
    "long_run": 100.0, "pictures": 540.0,
}  # fmt: skip
# Programs that compile at once. A compiler tries kernels on the device and keeps the memory for it:
# with fourteen at once on an H100 it ran out, and no train step was compiled within 300 s.
BESIDE = 3
LEAST = 15.0  # seconds below which a trial is not started
# Stage of the cascade -> config file.
CASCADE = {"base": "base_64", "sr_1": "sr_256", "sr_2": "sr_1024"}
SAMPLE_S, START_S = 75.0, 12.0  # of the pictures: what sampling and a trainer's imports may take


class Parts:
    """The parts of one call; tasks that need no device start while an earlier part runs."""

    def __init__(self, session: Session, models: Sequence[str], trials: int):
        """trials: the number of TRIALS to run, in order."""
        self.session, self.models, self.trials = session, models, trials
        self._queue: list[tuple[str, str, dict[str, Any]]] = []
        self._compiling: dict[str, Process] = {}
        self._data: Process | None = None
        self._prepared = False

    def prepare(self, selected: Sequence[str]) -> None:
        """Starts the tasks that leave the device free: compilation, the longest, and the data.

        BESIDE programs compile concurrently; `_open` admits one process at a time to measure.
        """
        if "train_speed" in selected:
            for model in self.models:
                self._queue.append((model, "train_speed", {"model": model}))
        if "sampling" in selected:
            batches = [2, 1] if self.session.tiny else [16, 1]
            for model in self._stages():
                arguments = {"model": model, "batches": batches}
                self._queue.append((f"draw {model}", "sampling", arguments))
        if "side_by_side" in selected:
            self._queue.append(("imagen_jax", "side_by_side", self._compared("jax")))
        self._compile_more()
        if "pictures" in selected or "long_run" in selected:
            data = [sys.executable, "-m", "imagen_jax.prepare_data", "--source", "emoji"]
            data += ["--output", self.session.work / "data", "--encoder", "t5_tiny"]
            data += ["--max_length", "32"]
            self._data = self.session.start("data", data, {"JAX_PLATFORMS": "cpu"})

    def _compile_more(self) -> None:
        """Starts tasks of the queue; each compiles and then waits for its gate."""
        while self._queue and len(self._compiling) < BESIDE:
            name, module, arguments = self._queue.pop(0)
            given = arguments | {"gate": str(self._gate(name))}
            self._compiling[name] = self._start_task(name, module, given)

    def _open(self, part: str, model: str, name: str = "") -> Outcome:
        """Admits the compiled task `name` to the device; its outcome."""
        name, limit = name or model, self.session.left()
        while name not in self._compiling:  # one of a part that failed stands before it
            self.session.stop(self._compiling.pop(next(iter(self._compiling))))
            self._compile_more()
        self._gate(name).write_text(f"{limit:.0f}")
        outcome = self.session.finish(part, model, self._compiling[name], limit)
        del self._compiling[name]
        self._compile_more()
        return outcome

    def _gate(self, name: str) -> Path:
        return self.session.work / f"{name.replace(' ', '_')}.gate"

    def _stages(self) -> list[str]:
        return [model for model in tables.STAGES if model in self.models]

    def _compared(self, framework: str, compiled: bool = False) -> dict[str, Any]:
        batches = [2] if self.session.tiny else [16, 64]
        return {"framework": framework, "batches": batches, "compiled": compiled}

    def _start_task(self, name: str, module: str, arguments: dict[str, Any]) -> Process:
        given = json.dumps({**arguments, "tiny": self.session.tiny})
        command = [sys.executable, "-m", "tools.accelerator.task", module, given]
        return self.session.start(name, command, SHARED)

    def correct(self) -> None:
        """Compares the device's sampler with the CPU's during the tests, then bf16 with fp32."""
        session, started = self.session, {}
        report = session.work / "tests.xml"
        platform = "cpu" if session.tiny else "cuda"
        workers = [] if session.tiny else ["-n", "6"]
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            *workers,
        ]
        tests += ["-m", "not slow and not parity", f"--junitxml={report}"]
        tests += TINY_TESTS if session.tiny else TESTS
        started["tests"] = session.start(
            "tests", tests, SHARED | {"IMAGEN_JAX_TEST_PLATFORM": platform}
        )
        sampler = {"check": "sampler", "model": ""}
        started["sampler"] = self._start_task("sampler", "numerics", sampler)
        for name, process in started.items():
            session.finish("correct", name, process, session.left())
            if name == "tests" and report.exists():
                session.results.extend("correct", name, read_junit(report))
        for model in self.models:
            arguments = {"check": "bf16", "model": model}
            session.task("correct", f"bf16 {model}", "numerics", arguments, session.left(), SHARED)

    def train_speed(self) -> None:
        """Measures each network's train step in turn, then runs the trials on the slowest."""
        best, known = {}, {}
        for model in self.models:
            outcome = self._open("train_speed", model)
            known[model] = {k: v for k, v in outcome.last("facts").items() if k != "what"}
            if steps := [r for r in outcome.records if r["what"] == "step"]:
                best[model] = max(steps, key=lambda step: step["images_per_s"])
        if not best:
            return
        slowest = min(best, key=lambda model: best[model].get("mfu") or 0.0)
        facts = {k: v for k, v in known[slowest].items() if k != "model"}
        for label, (flags, fields, attention) in list(TRIALS.items())[: self.trials]:
            if self.session.left() < LEAST:
                break
            arguments = {"model": slowest, "known": facts, "batch": best[slowest]["batch"]}
            arguments |= {"fields": fields, "attention": attention}
            self.session.task(
                "train_speed", f"trial: {slowest}, {label}", "train_speed", arguments,
                self.session.left(), self.session.more_flags(flags),
            )  # fmt: skip

    def sampling(self) -> None:
        """Measures each stage of the paper's cascade."""
        for model in self._stages():
            self._open("sampling", model, f"draw {model}")

    def side_by_side(self) -> None:
        """Measures IF-I-M's U-Net: PyTorch eager, this package, then PyTorch compiled."""
        run = lambda name, given: self.session.task(
            "side_by_side", name, "side_by_side", given, self.session.left()
        )
        run("PyTorch", self._compared("torch"))
        self._open("side_by_side", "imagen_jax")
        if not self.session.tiny:
            run("PyTorch, compiled", self._compared("torch", compiled=True))

    def _has_data(self, part: str) -> bool:
        """Waits for the prepared data, once for all parts; whether there are any."""
        if self._data:
            outcome = self.session.finish(part, "data", self._data, self.session.left())
            self._data, self._prepared = None, outcome.done
        return self._prepared

    def long_run(self) -> None:
        """Kills a training and continues it."""
        if self._has_data("long_run"):
            work = self.session.work
            arguments = {"data": str(work / "data"), "directory": str(work)}
            self.session.task(
                "long_run", "base", "long_run", arguments, self.session.left(), SHARED
            )

    def pictures(self) -> None:
        """Trains the stages of the demo cascade side by side, exports them and samples."""
        session, python = self.session, [sys.executable, "-m"]
        if not self._has_data("pictures"):
            return
        variant, data = "tiny" if session.tiny else "demo", session.work / "data"
        task = {"data": str(data), "directory": str(session.work), "output": ""}
        prompts = self._start_task("prompts", "contact_sheet", task | {"what": "prompts"})
        train_s = session.left() - SAMPLE_S
        if train_s < 2 * START_S:
            session.results.add("pictures", "training", "not started: no time left", 0.0, [])
            return
        running = {}
        for stage, name in CASCADE.items():
            command = [*python, "imagen_jax.train", f"--config=configs/{name}.py:{variant}"]
            command += [f"--config.data.path={data}", "--workdir", session.work / stage]
            command += ["--minutes", f"{(train_s - START_S) / 60:.3f}"]
            running[stage] = session.start(stage, command, SHARED)
        end = time.monotonic() + train_s
        trained = []
        for stage, process in running.items():
            limit = max(1.0, end - time.monotonic())
            if session.finish("pictures", stage, process, limit).done:
                trained.append(stage)
            session.results.extend("pictures", stage, read_metrics(session.work / stage, stage))
        write_training_log(session, CASCADE)
        session.finish("pictures", "prompts", prompts, session.left())
        self._export_and_sample(trained, task)

    def _export_and_sample(self, trained: Sequence[str], task: dict[str, Any]) -> None:
        """Exports the trained stages' EMA weights in bf16 and writes a contact sheet.

        A stage that was not trained is replaced by the package's own.
        """
        session, python, exports = self.session, [sys.executable, "-m"], {}
        for stage in trained:
            file = session.results.output / f"{stage}.safetensors"
            command = [*python, "imagen_jax.export", "--checkpoint", session.work / stage]
            exports[stage] = session.start(
                f"export {stage}", [*command, "--output", file], {"JAX_PLATFORMS": "cpu"}
            )
        drawn = session.work / "drawn"
        command = [*python, "imagen_jax.sample", "--config=configs/cascade.py:demo"]
        command += [f"--config.{s}.checkpoint={session.work / s}" for s in trained]
        command += ["--prompts", session.work / "prompts.txt", "--output", drawn]
        outcome = session.command("pictures", "draw", command, session.left(), SHARED)
        for stage, process in exports.items():
            session.finish("pictures", f"export {stage}", process, max(5.0, session.left()))
        if outcome.done:
            sheet = task | {"what": "sheet", "directory": str(drawn)}
            sheet["output"] = str(session.results.output / "pictures.png")
            session.task("pictures", "sheet", "contact_sheet", sheet, max(5.0, session.left()))


def read_junit(path: Path) -> list[dict[str, Any]]:
    """A record of a pytest run: its counts and the failed tests."""
    cases = ElementTree.parse(path).getroot().iter("testcase")
    failures, passed, skipped = [], 0, 0
    for case in cases:
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            message = " ".join(bad.get("message", "").split())[:300]
            failures.append(
                {"test": f"{case.get('classname')}.{case.get('name')}", "message": message}
            )
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    counts = {"passed": passed, "failed": len(failures), "skipped": skipped}
    return [{"what": "tests"} | counts | {"failures": failures}]


def read_metrics(workdir: Path, stage: str) -> list[dict[str, Any]]:
    """A record of a training: its steps, last loss and median speed."""
    rows = training_rows(workdir)
    if not rows:
        return []
    speeds = sorted(r["time/images_per_s"] for r in rows[1:] if "time/images_per_s" in r)
    summary = {
        "what": "trained",
        "stage": stage,
        "steps": rows[-1]["step"],
        "loss": rows[-1]["loss"],
    }
    return [summary | {"images_per_s": speeds[len(speeds) // 2] if speeds else None}]


def training_rows(workdir: Path) -> list[dict[str, Any]]:
    """The complete lines of a training's metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def write_training_log(session: Session, stages: Sequence[str]) -> None:
    """Writes the metrics of all stages to one file of the output."""
    with open(session.results.output / "training.jsonl", "w", encoding="utf-8") as file:
        for stage in stages:
            for row in training_rows(session.work / stage):
                file.write(json.dumps({"stage": stage} | row) + "\n")


def named(parts: Parts) -> dict[str, Callable[[], None]]:
    """{name of a part: its function}, in order of value."""
    return {name: getattr(parts, name) for name in SECONDS}
