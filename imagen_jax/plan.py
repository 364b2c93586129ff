r"""Says, before anything is paid for, whether a config fits a TPU or GPU topology, how fast it will
train there and what that costs in chip-hours.

    python -m imagen_jax.plan --config configs/base_64.py --topology v5e:16x16
    python -m imagen_jax.plan --config configs/sr_1024.py --topology v5p-256 \
        --config.data.batch_size=1024 --search --output plans/sr_1024
    python -m imagen_jax.plan --text_encoder xxl --topology v5e-64 --captions 400000000

Nothing runs and no accelerator is needed: the train step and the sampler are compiled ahead of time
by the compiler of that hardware (pip install 'imagen_jax[tpu]' or '[cuda12]'; for GPUs that are not
here '[gpu-plan]' is enough). The first time takes minutes; block costs are kept and read the next
time. Of GPUs it reports memory, FLOPs and traffic: their compiler has no estimates of time. Exit
code 1: it does not fit.
"""

import dataclasses
import itertools
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from imagen_jax import cli

STOPS = {signal.SIGINT, signal.SIGTERM}
PARENT = "IMAGEN_JAX_PARENT"  # variable with the id of a process that a plan is to end with
HOPELESS = 1.5  # times the memory there is: an estimate above that is not worth compiling
log = logging.getLogger("imagen_jax.plan")


def define_flags() -> None:
    """The command line, see `cli.run`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "config file of a stage, with fields as --config.mesh.fsdp=32",
        lock_config=True,
    )
    flags.FLAGS["config"].parser.parse = named(flags.FLAGS["config"].parser.parse)
    flags.DEFINE_string(
        "topology",
        None,
        "hardware: v5e:16x16, v5litepod-256, v4-512 (cores), 2xv5p:4x4x8 (two slices), h100-64,"
        " a100:32x8 (nodes x GPUs)",
    )
    flags.DEFINE_string(
        "text_encoder",
        "",
        "instead of --config: xxl, xl, large, or a directory with a text encoder's config.json;"
        " plans encoding captions",
    )
    flags.DEFINE_list(
        "tokens", ["16", "32", "64", "128"], "with --text_encoder: lengths of captions"
    )
    flags.DEFINE_integer(
        "encode_batch",
        64,
        "with --text_encoder: captions of up to 32 tokens at once on a chip, as prepare_data"
        " has it",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "captions", 0, "with --text_encoder: how many there are, to state hours", lower_bound=0
    )
    flags.DEFINE_string("output", "", "directory for plan.json and plan.png")
    flags.DEFINE_bool("json", False, "print JSON instead of text")
    flags.DEFINE_bool(
        "exact",
        False,
        "compile at the default level, as a run does: 10 minutes for sr_256, 30 minutes and 16 GB"
        " for base_64",
    )
    flags.DEFINE_bool(
        "search", False, "if it does not fit, compile what is advised in turn until something fits"
    )
    flags.DEFINE_bool("time", True, "predict the time of a step (TPUs)")
    flags.DEFINE_bool(
        "sampler", True, "compile the sampler too, as training draws train.sample_rows images"
    )
    flags.DEFINE_integer(
        "processes", cli.cores(), "blocks to compile at once, each in 2 to 4 GB", lower_bound=1
    )
    flags.DEFINE_string("cache", "~/.cache/imagen_jax/plan", "directory for block costs")
    flags.DEFINE_float(
        "price", 0.0, "money for a chip-hour, to state the cost of all steps", lower_bound=0.0
    )


def named(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """What reads FILE[:ARG] of a config, with errors that say in which file, and on which line of
    it, they are.
    """

    def read(text: str) -> Any:
        file = text.partition(":")[0]
        if not os.path.isfile(file):
            raise ValueError(f"the file {file} does not exist")
        try:
            return parse(text)
        except (
            ValueError,
            TypeError,
            ArithmeticError,
            LookupError,
            AttributeError,
            ImportError,
        ) as error:
            own = (
                error.__context__
                if isinstance(error, (ValueError, TypeError)) and error.__context__
                else error
            )  # these two come wrapped
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(own.__traceback__)
                if os.path.realpath(frame.filename) == os.path.realpath(file)
            ]
            raise ValueError(
                f"{':'.join(map(str, [file, *lines[-1:]]))}: {type(own).__name__}: {own}"
            ) from error

    return read


def main() -> int:
    end_on_signals()
    args = flags.FLAGS
    cli.log_to_stderr()
    if args.config is not None and args.text_encoder:
        raise ValueError(
            "--config and --text_encoder are both given; one thing is planned at a time"
        )
    if (args.config is None and not args.text_encoder) or args.topology is None:
        raise ValueError(
            "--topology NAME and either --config FILE or --text_encoder NAME are needed, such as"
            " --config configs/base_64.py --topology v5e:16x16"
        )
    config = cli.stage_config(args.config) if args.config else {}
    if not math.isfinite(args.price):
        raise ValueError(f"--price {args.price} is no amount of money")
    from imagen_jax.hardware import topology

    place = topology.parse(args.topology)
    for flag in ("output", "cache"):
        if args[flag].value:
            cli.make_directory(flag, os.path.expanduser(args[flag].value))
    if args.text_encoder:
        return encoder(place, args)
    found = plan(config, place, args)
    report(found, args)
    return 0 if fits(found) else 1


def end_on_signals() -> None:
    """From here on SIGINT and SIGTERM, and the end of the process named in PARENT, end this one
    with one line, also in the midst of compiling.

    The signals are blocked in every thread that begins from here but the one that waits for them:
    the TPU compiler's own handler, which prints what looks like a crash, gets none. Processes that
    compile blocks end with this one. multiprocessing's own helper, which removes what they leave
    behind, and says so, is started first: its start unblocks signals.
    """
    os.environ["PYTHONWARNINGS"] = ",".join(
        filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker"))
    )
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    threading.Thread(target=_end_on_signal, daemon=True).start()
    if PARENT in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()


def _end_on_signal() -> None:
    number = signal.sigwait(STOPS)
    try:
        cli.fail("interrupted, the same command continues")
    finally:
        os._exit(128 + number)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def encoder(place: Any, args: Any) -> int:
    """Plans encoding captions; the exit code."""
    if not args.tokens or not all(
        text.isascii() and text.isdigit() and int(text) for text in args.tokens
    ):
        raise ValueError(f"--tokens {','.join(args.tokens)} are no lengths such as 16,32,64,128")
    only_here()
    from imagen_jax.planning import encoder_plan

    network = encoder_plan.find_network(args.text_encoder)
    found = {"name": args.text_encoder} | encoder_plan.plan_encoder(
        network, place, [int(text) for text in args.tokens], args.encode_batch, args.captions
    )
    print(
        json.dumps(found, indent=1) if args.json else "\n".join(encoder_plan.text(found)),
        flush=True,
    )
    if args.output:
        keep(found, args.output)
    return 0 if all(row["fits"] for row in found["passes"]) else 1


def only_here() -> None:
    """Nothing needs the devices of this machine; and the compile cache cannot read back programs
    for devices that are not there.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that compile blocks, too
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", None)


def plan(config: Mapping[str, Any], place: Any, args: Any) -> dict[str, Any]:
    """The whole report as a dict; with --search, of the first advice that fits."""
    only_here()
    from imagen_jax.planning import plan_report, step_time

    found = examine(config, place, args)
    if fits(found):
        return found
    tried: list[dict[str, Any]] = []
    hopeful = lambda row: row["estimated_peak"] <= HOPELESS * found["memory"]["limit"]
    rows, again = itertools.tee(
        advice(config, place, found)
    )  # an estimate that was made for the search is not made again
    for row in filter(hopeful, rows) if args.search else ():
        log.info("trying %s", plan_report.options(row["overrides"]))
        other = examine(step_time.overridden(config, row["overrides"]), place, args)
        tried.append(row | {"peak": needed(other)})
        if fits(other):
            return other | {
                "overrides": row["overrides"],
                "tried": tried,
                "asked": found["memory"] | {"fits": False, "peak": needed(found)},
            }
    return found | {
        "advice": up_to_first_that_fits(again, found["memory"]["limit"]),
        "tried": tried,
    }


def fits(found: Mapping[str, Any]) -> bool:
    """Whether a training can run: its step, and the sampler if it draws."""
    return found["memory"]["fits"] and found.get("sampler", found["memory"])["fits"]


def needed(found: Mapping[str, Any]) -> int:
    """Bytes of a chip that a training needs."""
    return max(found["memory"]["peak"], found.get("sampler", found["memory"])["peak"])


def examine(config: Mapping[str, Any], place: Any, args: Any) -> dict[str, Any]:
    """The report of one config: memory first, and if it fits, FLOPs, traffic, time and
    the sampler.
    """
    from imagen_jax.planning import block_costs, cost, step_time, whole_step

    program = step_time.make_program(config, place)
    if args.time and place.chip.platform == "tpu":
        block_costs.check_columns(config, place)
    log.info("%s on %s: compiling the whole step for %d chips", config["name"], place, place.chips)
    memory, module = step_time.memory(program, place, args.exact)
    found = describe(config, place, program, memory, args.exact)
    if module is None:
        return found
    traffic = whole_step.traffic(module, program, place)
    found["collectives"] = [dataclasses.asdict(row) for row in traffic]
    if args.time and place.chip.platform == "tpu":
        cache = Path(args.cache).expanduser()
        blocks = []
        for block in block_costs.block_costs(config, place, cache, args.processes):
            blocks.append(block)
            log.info(
                "%2d  %-28s %8.2f ms, %3.0f %% of peak",
                len(blocks),
                block.places[0],
                1e3 * block.seconds,
                100 * block.flops / block.seconds / place.chip.peak_flops,
            )
        blocks.sort(key=lambda block: block.places)  # they come in the order they are done in
        log.info("optimizer and EMA, parameter by parameter")
        update, update_bytes = block_costs.update_cost(
            config, place, step_time.shapes_on_a_chip(program), cache, args.processes
        )
        found["memory_traffic"] = step_time.memory_traffic(
            place, step_time.blocks_bytes(program, blocks) + update_bytes
        )
        found["time"] = step_time.predict(
            program, place, found["flops"]["per_chip_and_step"], blocks, update, traffic
        )
        found["places"] = step_time.places(blocks, program.accumulation)
        if args.exact:
            found["check"] = step_time.check(module, place, found["time"]) | step_time.schedule(
                traffic
            )
        found["cost"] = step_time.expense(
            found["time"], place, config["train"]["steps"], args.price
        )
    elif place.chip.platform != "tpu":
        found["memory_traffic"] = step_time.memory_traffic(place, cost.memory_bytes(module))
    if args.sampler and config["train"]["sample_every"]:
        found["sampler"] = sampler(config, place, program, found["memory"]["parts"], args.exact)
    if args.sampler and program.stage.train_size != program.stage.image_size:
        found["whole_images"] = whole_images(place, program, args.exact)
    return found


def describe(
    config: Mapping[str, Any], place: Any, program: Any, memory: Any, exact: bool
) -> dict[str, Any]:
    """What is known of a config without its compiled text."""
    import jax

    from imagen_jax import sharding
    from imagen_jax.planning import whole_step
    from imagen_jax.stage import create_stage
    from imagen_jax.training.step import forward_flops

    flops = 3 * forward_flops(create_stage(config))
    images = config["data"]["batch_size"]
    return {
        "config": config["name"],
        "topology": str(place),
        "chip": place.chip.name,
        "platform": place.chip.platform,
        "chips": place.chips,
        "mesh": dict(program.mesh.shape),
        "batch": images,
        "accumulation": program.accumulation,
        "remat": config["model"]["remat"],
        "not_split": sharding.badly_split(
            program.abstract.params,
            program.mesh,
            config["mesh"]["rules"],
            config["mesh"]["fsdp_min_elements"],
        ),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params)),
        "flops": {
            "per_image": flops,
            "per_step": flops * images,
            "per_chip_and_step": flops * images / place.chips,
        },
        "memory": {
            "fits": memory.fits,
            "peak": memory.peak,
            "limit": memory.limit,
            "level": whole_step.level(place, exact),
            "parts": memory.parts | {"temporaries": memory.temporaries},
        },
    }


def sampler(
    config: Mapping[str, Any], place: Any, program: Any, parts: Mapping[str, int], exact: bool
) -> dict[str, Any]:
    """What drawing a sample grid needs in the midst of training, where parameters, optimizer state
    and a batch stay `beside` what the sampler itself needs.
    """
    from imagen_jax.planning import whole_step

    rows = config["train"]["sample_rows"]
    log.info("compiling the sampler of %d images", rows)
    _, alone = whole_step.compile_text(whole_step.lower_sampler(program, rows), place, exact)
    held = ("parameters", "optimizer", "batch", "EMA tracks")
    beside = sum(size for part, size in parts.items() if part in held)
    peak = alone + beside
    return {
        "rows": rows,
        "steps": config["sampling"]["steps"],
        "peak": peak,
        "beside": beside,
        "fits": peak <= place.chip.memory_limit,
    }


def whole_images(place: Any, program: Any, exact: bool) -> dict[str, Any]:
    """What drawing whole images needs, of a stage that is trained on crops; with no training beside
    it, so it decides nothing of that.
    """
    from imagen_jax.planning import whole_step

    size = program.stage.image_size
    log.info("compiling the sampler of whole images, %d pixels across", size)
    _, peak = whole_step.compile_text(whole_step.lower_whole_images(program), place, exact)
    return {
        "size": size,
        "rows": program.mesh.shape["data"] * program.mesh.shape["fsdp"],
        "peak": peak,
        "fits": peak <= place.chip.memory_limit,
    }


def advice(
    config: Mapping[str, Any], place: Any, found: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What would need less memory, in the order to try it, each with an estimate: the compiled peak
    changed as the known parts change.
    """
    from imagen_jax.planning import block_costs, step_time, whole_step

    if found["memory"]["fits"]:
        yield from sampler_advice(config, place, found)
        return
    for overrides in step_time.alternatives(config, place):
        changed = step_time.overridden(config, overrides)
        try:
            parts = whole_step.state_parts(step_time.make_program(changed, place))
        except ValueError:
            continue
        share = (
            changed["data"]["batch_size"]
            / changed["optim"]["accumulation"]
            / (config["data"]["batch_size"] / config["optim"]["accumulation"])
        )
        share *= (
            block_costs.mesh_sizes(config, place)["spatial"]
            / block_costs.mesh_sizes(changed, place)["spatial"]
        )
        peak = sum(parts.values()) + found["memory"]["parts"]["temporaries"] * share
        yield {"overrides": overrides, "estimated_peak": int(peak)}


def sampler_advice(
    config: Mapping[str, Any], place: Any, found: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """`advice` for a training whose step fits: fewer images in a sample grid, or none."""
    from imagen_jax.planning import block_costs, step_time

    sizes = block_costs.mesh_sizes(config, place)
    drawn, shards = found["sampler"], sizes["data"] * sizes["fsdp"]
    held = drawn["beside"] + found["memory"]["parts"]["EMA"]
    for overrides in step_time.fewer_samples(config, shards):
        share = -(-overrides["train.sample_rows"] // shards) / -(-drawn["rows"] // shards)
        yield {"overrides": overrides, "estimated_peak": int(held + share * (drawn["peak"] - held))}
    yield {"overrides": {"train.sample_every": 0}, "estimated_peak": found["memory"]["peak"]}


def up_to_first_that_fits(rows: Iterable[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Advice as far as somebody needs it: its last row is estimated to fit, or nothing is."""
    taken = []
    for row in rows:
        taken.append(row)
        if row["estimated_peak"] <= limit:
            break
    return taken


def report(found: Mapping[str, Any], args: Any) -> None:
    """Prints the plan, and writes plan.json and plan.png to --output."""
    from imagen_jax.planning import plan_report

    print(json.dumps(found, indent=1) if args.json else plan_report.text(found), flush=True)
    if args.output:
        keep(found, args.output, plan_report.picture(found))


def keep(found: Mapping[str, Any], output: str, picture: bytes = b"") -> None:
    """Writes plan.json, and plan.png if there is a picture."""
    from imagen_jax.storage import write_atomically, write_json

    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "plan.json", found)
    if picture:
        write_atomically(directory / "plan.png", picture)
    print(f"plan.json{' and plan.png' * bool(picture)} in {directory}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(define_flags, main)
