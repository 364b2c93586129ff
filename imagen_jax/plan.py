r"""Predicts memory, time and cost of a training run, or of sampling, on a TPU or GPU topology.

    python -m imagen_jax.plan --config configs/base_64.py --topology v5e:16x16
    python -m imagen_jax.plan --config configs/sr_1024.py --topology v5p-256 \
        --config.data.batch_size=1024 --search --output plans/sr_1024
    python -m imagen_jax.plan --text_encoder xxl --topology v5e-64 --captions 400000000
    python -m imagen_jax.plan --config configs/base_64.py --topology v5e:16x16 \
        --text_encoder xxl --captions 100000000,400000000
    python -m imagen_jax.plan --sample --config configs/cascade.py --topology v5e:4x4

Nothing runs on an accelerator and none is needed. The train step and the sampler are compiled ahead
of time with the compiler of the target hardware. To install it, run in the checkout:

    pip install -e '.[tpu]'         # for TPUs
    pip install -e '.[gpu-plan]'    # for GPUs; '.[cuda12]' contains it too

The first plan of a config takes minutes; block costs are cached. For GPUs it reports everything
except step times: XLA:GPU provides no cycle estimates. Exit code 1: the run does not fit.
"""

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from imagen_jax import cli, output_paths

STOPS = {signal.SIGINT, signal.SIGTERM}
PARENT = "IMAGEN_JAX_PARENT"  # environment variable: the plan ends when this process ends
OF_TRAINING = ("exact", "search", "sampler")  # flags that --sample has no use for
OF_SAMPLING = ("size",)  # flags of --sample only
OF_ENCODER = ("tokens", "encode_batch")  # flags of --text_encoder without --config
# Errors that code in a config file may raise.
CONFIG_ERRORS = (
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    ImportError,
)


def define_flags() -> None:
    """Defines the command line, see `cli.run`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "config file of a stage, or with --sample of a cascade; fields are set with flags such as"
        " --config.mesh.fsdp=32",
        lock_config=True,
    )
    flags.FLAGS["config"].parser.parse = named(flags.FLAGS["config"].parser.parse)
    flags.DEFINE_string(
        "topology",
        None,
        "hardware, such as v5e:16x16, v5litepod-256, v4-512 (cores), 2xv5p:4x4x8 (two slices),"
        " h100-64 or a100:32x8 (nodes x GPUs)",
    )
    flags.DEFINE_string(
        "text_encoder",
        "",
        "plan the encoding of captions instead of a training: a name, such as xxl (T5 v1.1),"
        " flan-t5-xl, t5-11b, bert-large, clip-l14 or clip-bigg, or a directory with a text"
        " encoder's config.json; with --config and --captions: the encoder of the comparison, also"
        " several as in t5=xxl+clip=clip-l14",
    )
    flags.DEFINE_list(
        "tokens", ["16", "32", "64", "128"], "with --text_encoder: caption lengths in tokens"
    )
    flags.DEFINE_integer(
        "encode_batch",
        64,
        "with --text_encoder: captions of up to 32 tokens per chip and batch, as in prepare_data",
        lower_bound=1,
    )
    flags.DEFINE_list(
        "captions",
        [],
        "numbers of captions, such as 100000000,400000000: in a training plan compares stored text"
        " features with text.online; with --text_encoder alone one number, to report hours",
    )
    flags.DEFINE_float(
        "caption_tokens",
        32.0,
        "with --config and --captions: mean length of the captions in tokens",
        lower_bound=1.0,
    )
    flags.DEFINE_bool("sample", False, "plan the sampling of a cascade instead of a training")
    flags.DEFINE_integer(
        "pictures", 30_000, "with --sample: number of pictures to report hours for", lower_bound=1
    )
    flags.DEFINE_string(
        "size", "", "with --sample: HEIGHTxWIDTH in pixels of the pictures, as in `sample`"
    )
    flags.DEFINE_string(
        "output", "", "directory for plan.json and, in the plan of a training, plan.png"
    )
    flags.DEFINE_bool("json", False, "print JSON instead of text")
    flags.DEFINE_bool(
        "exact",
        False,
        "compile at the compiler's default level, as a run does; takes 10 minutes for sr_256, and"
        " 30 minutes and 16 GB for base_64",
    )
    flags.DEFINE_bool(
        "search", False, "if the run does not fit, compile the advised configs until one fits"
    )
    flags.DEFINE_bool(
        "time", True, "predict the step time (TPUs only), or the time of sampling with --sample"
    )
    flags.DEFINE_bool(
        "sampler", True, "also compile the sampler of train.sample_rows images in training"
    )
    flags.DEFINE_integer(
        "processes",
        cli.cores(),
        "number of blocks to compile at once; each needs 2 to 4 GB",
        lower_bound=1,
    )
    flags.DEFINE_string("cache", "~/.cache/imagen_jax/plan", "directory for cached block costs")
    flags.DEFINE_float("price", 0.0, "price of a chip-hour, to report the cost", lower_bound=0.0)


def named(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wraps the parser of --config so that its errors name the file and the line."""

    def read(text: str) -> Any:
        file = text.partition(":")[0]
        if os.path.isdir(file):
            raise ValueError(f"{file} is a directory; give a file, such as configs/base_64.py")
        if not os.path.isfile(file):
            raise ValueError(f"the file {file} does not exist")
        try:
            return parse(text)
        except CONFIG_ERRORS as error:
            # ml_collections wraps errors of the file in a ValueError or TypeError of its own.
            is_wrapped = isinstance(error, (ValueError, TypeError)) and error.__context__
            cause = error.__context__ if is_wrapped else error
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(cause.__traceback__)
                if os.path.realpath(frame.filename) == os.path.realpath(file)
            ]
            location = ":".join(map(str, [file, *lines[-1:]]))
            # A ValueError is a message of the config file to its user.
            kind = "" if isinstance(cause, ValueError) else f"{type(cause).__name__}: "
            raise ValueError(f"{location}: {kind}{cause}") from error

    return read


def main() -> int:
    """Runs the command. Returns 0 if the run fits, else 1."""
    end_on_signals()
    args = flags.FLAGS
    cli.log_to_stderr()
    check_flags(args)
    config = {}
    if args.config:
        config = cli.cascade_config(args.config) if args.sample else cli.stage_config(args.config)
    from imagen_jax.hardware.topology import parse

    topology = parse(args.topology)
    for flag in ("output", "cache"):
        if args[flag].value:
            output_paths.make_directory(flag, os.path.expanduser(args[flag].value))
    if args.text_encoder and not args.config:
        return plan_encoder(topology, args)
    if args.sample:
        return plan_sampling(config, topology, args)
    use_cpu_only()
    from imagen_jax.planning import plan_report, train_plan

    options = train_plan.Options(
        cache=Path(args.cache).expanduser(),
        processes=args.processes,
        exact=args.exact,
        time=args.time,
        sampler=args.sampler,
        search=args.search,
        price=args.price,
        captions=tuple(map(int, args.captions)),
        caption_tokens=args.caption_tokens,
        encoders=args.text_encoder,
    )
    plan = train_plan.plan_training(config, topology, options)
    print(json.dumps(plan, indent=1) if args.json else plan_report.text(plan), flush=True)
    if args.output:
        write(plan, args.output, plan_report.picture(plan))
    return 0 if train_plan.fits(plan) else 1


def check_flags(args: Any) -> None:
    """Raises ValueError for flags that contradict each other or have invalid values."""
    if args.sample and args.text_encoder:
        raise ValueError("--sample and --text_encoder are both given; use one of them")
    for name in (*OF_TRAINING, "captions", "caption_tokens") if args.sample else ():
        if args[name].present:
            raise ValueError(f"--{name} is for the plan of a training; leave it out with --sample")
    for name in () if args.sample else OF_SAMPLING:
        if args[name].present:
            raise ValueError(f"--{name} is for --sample; leave it out")
    is_training = args.config is not None and not args.sample
    for name in () if args.text_encoder and not is_training else OF_ENCODER:
        if args[name].present:
            raise ValueError(f"--{name} is for --text_encoder without --config; leave it out")
    if args["caption_tokens"].present and not (is_training and args.captions):
        raise ValueError("--caption_tokens is for --config with --captions; leave it out")
    if args.config is not None and args.text_encoder and not args.captions:
        raise ValueError(
            "--config and --text_encoder are both given; use one of them, or add --captions to"
            " compare stored features with text.online"
        )
    if (args.config is None and not args.text_encoder) or args.topology is None:
        raise ValueError(
            "--topology NAME and either --config FILE or --text_encoder NAME are required, such as"
            " --config configs/base_64.py --topology v5e:16x16"
        )
    if not all(map(is_positive_integer, args.captions)):
        raise ValueError(
            f"--captions is {','.join(args.captions)!r}; it must be numbers of captions such as"
            " 100000000,400000000"
        )
    if not is_training and len(args.captions) > 1:
        raise ValueError("--captions with --text_encoder alone is one number")
    if not math.isfinite(args.price):
        raise ValueError(f"--price is {args.price}; it must be a finite number")
    if args.text_encoder and not (args.tokens and all(map(is_positive_integer, args.tokens))):
        raise ValueError(
            f"--tokens is {','.join(args.tokens)!r}; it must be caption lengths such as"
            " 16,32,64,128"
        )


def is_positive_integer(text: str) -> bool:
    """Whether the text is a positive integer in ASCII digits."""
    return text.isascii() and text.isdigit() and int(text) > 0


def end_on_signals() -> None:
    """Ends this process on SIGINT, on SIGTERM, and when the process named in PARENT ends.

    It ends with a one-line message, even while the compiler runs. The signals are blocked in all
    threads except one that waits for them, because the TPU compiler's own handler prints what looks
    like a crash. The worker processes that compile blocks end with this one.
    """
    # multiprocessing's resource tracker warns about what ended workers leave behind. It starts
    # before the signals are blocked, because its start unblocks them.
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
        cli.fail("interrupted; run the same command again to continue")
    finally:
        os._exit(128 + number)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def use_cpu_only() -> None:
    """Keeps JAX off this machine's accelerators, here and in worker processes.

    Also disables the compile cache, which cannot load programs for devices that are not present.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", None)


def read_stage_config(text: str) -> dict[str, Any]:
    """The config of a stage from "FILE" or "FILE:VARIANT"."""
    parse = named(config_flags.config_flags.ConfigFileFlagParser("config").parse)
    return cli.stage_config(parse(text), text)


def plan_sampling(config: Mapping[str, Any], topology: Any, args: Any) -> int:
    """Plans the sampling of a cascade. Returns 0 if it fits, else 1."""
    use_cpu_only()
    from imagen_jax import stage_sizes
    from imagen_jax.planning import sample_plan, sample_report

    options = sample_plan.Options(
        cache=Path(args.cache).expanduser(),
        processes=args.processes,
        pictures=args.pictures,
        time=args.time,
        price=args.price,
        size=stage_sizes.parse(args.size) if args.size else None,
    )
    plan = sample_plan.plan_cascade(config, topology, options, read_stage_config)
    print(json.dumps(plan, indent=1) if args.json else sample_report.text(plan), flush=True)
    if args.output:
        write(plan, args.output)
    return 0 if sample_plan.fits(plan) else 1


def plan_encoder(topology: Any, args: Any) -> int:
    """Plans the encoding of captions. Returns 0 if it fits, else 1."""
    use_cpu_only()
    from imagen_jax.planning import encoder_plan

    network = encoder_plan.find_network(args.text_encoder)
    lengths = [int(text) for text in args.tokens]
    captions, cache = sum(map(int, args.captions)), os.path.expanduser(args.cache)
    plan = {"name": args.text_encoder} | encoder_plan.plan_encoder(
        network, topology, lengths, args.encode_batch, captions, cache
    )
    text = json.dumps(plan, indent=1) if args.json else "\n".join(encoder_plan.text(plan))
    print(text, flush=True)
    if args.output:
        write(plan, args.output)
    return 0 if all(row["fits"] for row in plan["passes"]) else 1


def write(plan: Mapping[str, Any], output: str, picture: bytes = b"") -> None:
    """Writes plan.json, and plan.png if there is a picture."""
    from imagen_jax.storage import write_atomically, write_json

    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "plan.json", plan)
    if picture:
        write_atomically(directory / "plan.png", picture)
    files = "plan.json and plan.png" if picture else "plan.json"
    print(f"wrote {files} to {directory}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(define_flags, main)
