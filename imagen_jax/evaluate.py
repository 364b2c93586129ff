r"""Evaluates a cascade on a prompt suite, or one stage on prepared data.

    python -m imagen_jax.evaluate --cascade configs/cascade.py:demo --suite embedded \
        --network efficientnet-lite0 --data PREPARED --output DIR
    python -m imagen_jax.evaluate --cascade ... --grid base.w=1,2,4 --grid sr_1.w=1,4,8
    python -m imagen_jax.evaluate --checkpoint WORKDIR --data PREPARED --output DIR
    python -m imagen_jax.evaluate --compare DIR_A --compare DIR_B

The first command draws a picture of every prompt and computes the metrics that papers report, from
the features of the pictures and of real images. The second does so for every combination of
sampling settings. The third computes denoising errors by noise level and samples of one stage. The
last compares two results of the first.
docs/evaluation.md describes all of them, and the files that they write.

All devices of all processes take part. An interrupted evaluation of a cascade continues when it is
run again, and so does `--follow`. `--checkpoint` without `--follow` starts again.
"""

import logging
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from imagen_jax import cli, field, output_paths, schema
from imagen_jax.evals import history
from imagen_jax.evals.measures import NAMES
from imagen_jax.object_storage import check_bucket, in_bucket
from imagen_jax.storage import as_path, check_local, check_utf8, exists, write_json

GRID = "grid"  # a flag of both kinds of evaluation
DATA_SUITE = "data"  # the captions of --data as a suite
# Flags that belong to one of the two kinds of evaluation, by the flag that chooses it.
OF_CHECKPOINT = (
    "measures",
    "which",
    "rows",
    "samples",
    "bins",
    "batch_size",
    "gallery",
    "lowres_from",
    "follow",
    "follow_minutes",
)
OF_CASCADE = (
    "suite",
    "suite_file",
    "prompts",
    "draw_seed",
    "per_prompt",
    "split",
    "stages",
    "images",
    "network",
    "reference",
    "metrics",
)
log = logging.getLogger("imagen_jax.evaluate")


def define_flags() -> None:
    """Defines the command-line flags; `cli.run` calls it."""
    cli.define_compile_cache()
    cli.define_processes()
    flags.DEFINE_string("output", None, "directory for the results, the same for all processes")
    flags.DEFINE_string(
        "data",
        None,
        "output directory of imagen_jax.prepare_data, made with the text encoder of the weights;"
        " with --cascade: the real images, instead of --images",
    )
    flags.DEFINE_integer(
        "seed",
        0,
        f"of rows, noise and shuffling; with --cascade: of the first picture; in {schema.SEEDS}",
    )
    flags.DEFINE_integer(
        "gallery",
        20_000,
        "with --checkpoint: largest number of images to compare samples with; if there are more,"
        " --seed determines a random subset",
    )
    for name in ("shard_cache_dir", "shard_cache_gib"):
        declared = schema.DATA[name]
        said = f"with --data in a bucket: {declared.meaning}"
        flags.DEFINE(FieldParser(declared), name, declared.older, said)
    flags.DEFINE_multi_string(
        GRID,
        [],
        f"{sampling_help(GRID)}. With --cascade: STAGE.FIELD=V1,V2,..., values of a field of"
        " `sampling` of a stage, such as base.w=1,2,4; may be repeated: evaluates every"
        " combination, and draws pictures that combinations share once",
    )
    flags.DEFINE_multi_string(
        "compare",
        [],
        "the output directories of two evaluations with --cascade, each with its own --compare:"
        " prints their paired differences; with --output, also writes comparison.json there",
    )
    define_cascade_flags()
    define_checkpoint_flags()


def define_cascade_flags() -> None:
    """The flags of an evaluation of a cascade."""
    config_flags.DEFINE_config_file(
        "cascade", None, "cascade config, as of imagen_jax.sample", lock_config=True
    )
    flags.DEFINE_string(
        "suite",
        "",
        "prompts: coco, prompts, drawbench, partiprompts, geneval, gpic, embedded (of this"
        " package), or data (the captions of --data)",
    )
    flags.DEFINE_string(
        "suite_file", "", "the suite's list of prompts; embedded and data need none"
    )
    flags.DEFINE_integer(
        "prompts",
        0,
        "number of prompts, drawn from the suite by --draw_seed; 0: all, of COCO 30,000",
        lower_bound=0,
    )
    flags.DEFINE_integer("draw_seed", 0, "seed of the draw of prompts", lower_bound=0)
    flags.DEFINE_integer("per_prompt", 1, "pictures per prompt", lower_bound=1)
    flags.DEFINE_enum(
        "split", "heldout", ["heldout", "train"], "split of --data: captions and real images"
    )
    flags.DEFINE_list("stages", ["base", "sr_1", "sr_2"], "consecutive stages to run, from base on")
    flags.DEFINE_string("images", "", "folder with the real images to compare with")
    flags.DEFINE_multi_string(
        "network",
        [],
        "feature network, NAME or NAME=PATH of its weights; may be repeated. docs/evaluation.md"
        " lists them",
    )
    flags.DEFINE_multi_string(
        "reference", [], "file with the features of real images, instead of --images or --data"
    )
    flags.DEFINE_list("metrics", [], "metrics to compute; default: all that the networks allow")


def define_checkpoint_flags() -> None:
    """The flags of an evaluation of one stage."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "a workdir (its newest intact checkpoint), one checkpoint, an exported file, or"
        " embedded:NAME",
    )
    names = ", ".join(NAMES)
    flags.DEFINE_list("measures", [], f"{names}; default: all that apply to the stage")
    flags.DEFINE_string(
        "which",
        "ema",
        "weights to evaluate: ema, params, or ema_1, ema_2 ... of optim.ema_tracks; an exported"
        " file contains only one of them",
    )
    flags.DEFINE_string(
        "encoder",
        "",
        "text encoder for --data without the features that the weights need; default:"
        " text.online_encoder of the weights' config",
    )
    flags.DEFINE_integer("rows", 256, "number of images per split for the errors")
    flags.DEFINE_integer("samples", 0, "number of samples per split; 0: as many as --rows")
    flags.DEFINE_integer(
        "bins", 10, "number of noise-level bins; training draws every bin equally often"
    )
    flags.DEFINE_integer("batch_size", 64, "images per batch; it changes results only by rounding")
    for name, flag in schema.EVALUATE_FLAGS.items():
        if flag != GRID:
            parser = FieldParser(schema.SAMPLING[name])
            flags.DEFINE(parser, flag, None, sampling_help(name))
    flags.DEFINE_string(
        "lowres_from",
        "",
        "samples.npz of the previous stage, used as low-res input instead of the true images",
    )
    flags.DEFINE_bool(
        "follow",
        False,
        "evaluate each checkpoint of a running workdir as it appears, until the training has ended",
    )
    flags.DEFINE_float(
        "follow_minutes",
        0.0,
        "with --follow: stop after this many minutes; 0: no limit",
        lower_bound=0,
    )


class FieldParser(flags.ArgumentParser):
    """Parses the value of a config field from a flag."""

    def __init__(self, config_field: field.Field):
        self._field = config_field
        self.syntactic_help = field.valid(config_field)

    def parse(self, argument: Any) -> Any:
        return field.parse(argument, self._field) if isinstance(argument, str) else argument

    def flag_type(self) -> str:
        return field.kind_name(self._field.kind)


def sampling_help(name: str) -> str:
    """The help of the flag that overrides a field of the checkpoint's `sampling`."""
    return f"{schema.SAMPLING[name].meaning} Default: sampling.{name} of the checkpoint"


def main() -> int:
    args = flags.FLAGS
    cli.log_to_stderr()
    if args.compare:
        return compare(args)
    check_flags(args)
    with cli.processes():
        if args.cascade is None:
            evaluate_checkpoint(args)
        else:
            evaluate_cascade(args)
    return 0


def check_flags(args: Any) -> None:
    """Raises ValueError for flags that are missing, contradict each other or are of no file."""
    if bool(args.checkpoint) == (args.cascade is not None) or not args.output:
        raise ValueError(
            "--output and either --cascade CONFIG (with --suite) or --checkpoint (with --data) are"
            " required"
        )
    others, chosen = (OF_CASCADE, "cascade") if args.checkpoint else (OF_CHECKPOINT, "checkpoint")
    others = [*others, *(() if args.checkpoint else schema.EVALUATE_FLAGS.values())]
    for name in others:
        if args[name].present and name != GRID:
            advice = "" if args.checkpoint else "; set fields with --cascade.STAGE.sampling.FIELD"
            raise ValueError(f"--{name} is for --{chosen}; leave it out{advice}")
    schema.check_seed(args.seed, "--seed")
    check_data(args.data or "")
    for flag in ("lowres_from", "images", "suite_file"):
        check_local(f"--{flag}", args[flag].value or "")
        check_utf8(f"--{flag}", args[flag].value or "")
    output = output_paths.output_directory("output", args.output)
    if args.checkpoint:
        check_utf8("--checkpoint", args.checkpoint)
        check_checkpoint_flags(args)
    else:
        check_cascade_flags(args)
    output_paths.make_directory("output", output)


def check_data(path: str) -> None:
    """Raises ValueError if --data cannot be opened because of its name alone."""
    data = as_path("--data", path)
    check_bucket("--data", data)
    if not in_bucket(data):
        check_utf8("--data", path)


def check_checkpoint_flags(args: Any) -> None:
    """`check_flags` for an evaluation of one stage."""
    if not args.data:
        raise ValueError("--checkpoint needs --data, a directory of imagen_jax.prepare_data")
    if args.lowres_from and not Path(args.lowres_from).is_file():
        raise ValueError(f"--lowres_from {args.lowres_from} does not exist; give a samples.npz")
    sampling_grid(args)
    if args.follow_minutes and not args.follow:
        raise ValueError("--follow_minutes needs --follow")
    from imagen_jax.cascade import resolve
    from imagen_jax.weights.step_directories import split_name

    checkpoint = as_path("--checkpoint", resolve(args.checkpoint))
    check_bucket("--checkpoint", checkpoint)
    workdir, _ = split_name(checkpoint)
    if not (args.follow or exists(checkpoint) or exists(workdir)):
        raise ValueError(f"--checkpoint {checkpoint} does not exist")
    if args.follow and checkpoint.is_file():
        raise ValueError(
            f"--follow needs a workdir, but --checkpoint {checkpoint} is a file: give the"
            " workdir or omit --follow"
        )


def sampling_grid(args: Any) -> str | None:
    """The field `sampling.grid` of --grid, for an evaluation of one stage."""
    if not args.grid:
        return None
    if len(args.grid) > 1:
        raise ValueError("--grid may be repeated with --cascade only; give it once")
    try:
        return field.parse(args.grid[0], schema.SAMPLING[GRID])
    except ValueError as error:
        raise ValueError(f"--grid {error}") from None


def check_cascade_flags(args: Any) -> None:
    """`check_flags` for an evaluation of a cascade."""
    if not args.suite:
        raise ValueError("--cascade needs --suite NAME, such as embedded")
    if args.suite == DATA_SUITE and not args.data:
        raise ValueError("--suite data needs --data, a directory of imagen_jax.prepare_data")
    if args.suite == DATA_SUITE and args.suite_file:
        raise ValueError("--suite data takes its prompts from --data; leave --suite_file out")
    if args["split"].present and not args.data:
        raise ValueError("--split is a split of --data, which is not given; leave it out")
    if args.images and args.data:
        raise ValueError("--images and --data both name real images; give one of them")
    if not args.network and args.suite != DATA_SUITE:
        raise ValueError(
            "--network is needed: NAME=PATH of a feature network's weights, or efficientnet-lite0"
        )
    names = [network_option(option)[0] for option in args.network]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--network {name} is given twice: leave one out")
    if "base" not in args.cascade or args.stages[:1] != ["base"]:
        raise ValueError("--cascade needs a cascade config, and --stages must begin with base")


def evaluate_checkpoint(args: Any) -> None:
    """Evaluates one stage, or each checkpoint of a run."""
    from imagen_jax.cascade import resolve
    from imagen_jax.data import shard_cache
    from imagen_jax.distributed import shared_files
    from imagen_jax.evals import stage_evaluation

    checkpoint = as_path("--checkpoint", resolve(args.checkpoint))
    output = as_path("--output", args.output)
    settings = {
        name: args[name].value
        for name in ("rows", "samples", "gallery", "bins", "batch_size", "seed", "lowres_from")
    }
    settings["samples"] = settings["samples"] or settings["rows"]
    overrides = {name: args[flag].value for name, flag in schema.EVALUATE_FLAGS.items()}
    overrides[GRID] = sampling_grid(args)
    evaluator = stage_evaluation.Evaluator(
        args.data,
        args.which,
        args.measures,
        settings,
        {name: value for name, value in overrides.items() if value is not None},
        args.encoder,
        shard_cache.Place(args.shard_cache_dir, args.shard_cache_gib),
    )
    told = settings | overrides | {"measures": args.measures, "which": args.which}
    told |= {"encoder": args.encoder, "checkpoint": str(checkpoint), "follow": args.follow}
    with shared_files.agreed_output(output, told):
        if args.follow:
            evaluator.check_continues(output / history.FILE)
            stage_evaluation.follow(evaluator.run, checkpoint, output, args.follow_minutes)
        else:
            evaluator.run(checkpoint, output)


def evaluate_cascade(args: Any) -> None:
    """Evaluates a cascade, or a grid of its settings, and prints the table in process 0."""
    from imagen_jax.distributed import shared_files
    from imagen_jax.evals import grid_evaluation, report, suite_evaluation

    settings, output = cascade_settings(args), as_path("--output", args.output)
    with shared_files.agreed_output(output, settings.facts() | {"--grid": args.grid}):
        if args.grid:
            table = grid_evaluation.evaluate(settings, args.grid, output)
        else:
            result = suite_evaluation.evaluate(settings, output)
            table = None if result is None else report.table(suite_evaluation.lines(result))
    if table is not None:
        print(table)
    if table is not None and not args.grid:
        print(f"all results: {output / suite_evaluation.RESULT}")


def cascade_settings(args: Any) -> Any:
    """The `suite_evaluation.Settings` of the flags."""
    from imagen_jax.data.records import open_once
    from imagen_jax.data.shard_cache import Place
    from imagen_jax.evals import data_suite, suites
    from imagen_jax.evals.real_images import FolderImages, PreparedImages
    from imagen_jax.evals.suite_settings import Settings

    cache = Place(args.shard_cache_dir, args.shard_cache_gib)
    prepared, count = open_once(args.data, cache) if args.data else None, args.prompts or None
    if args.suite == DATA_SUITE:
        suite = data_suite.load(prepared, args.split, count, args.draw_seed)
    else:
        options = {"file": args.suite_file, "images": args.images}
        suite = suites.load_suite(args.suite, count=count, seed=args.draw_seed, **options)
    cli.check_count(len(suite.prompts), args.per_prompt, "give a smaller --per_prompt or --prompts")
    images = gallery = None
    if args.images:
        images = lambda size: FolderImages(Path(args.images), size)
    elif prepared:
        images = lambda size: PreparedImages(prepared, (args.split,), size)
    if args.suite == DATA_SUITE:
        splits = [name for name, n in prepared.manifest["counts"]["images"].items() if n]
        gallery = lambda size: PreparedImages(prepared, tuple(splits), size)
    return Settings(
        config=cli.cascade_config(args.cascade, "--cascade"),
        stages=args.stages,
        suite=suite,
        per_prompt=args.per_prompt,
        seed=args.seed,
        networks=dict(map(network_option, args.network)),
        metrics=args.metrics,
        images=images,
        references=args.reference,
        gallery=gallery,
    )


def compare(args: Any) -> int:
    """Prints the comparison of two results, and writes it to --output if that is given."""
    others = (*OF_CASCADE, *OF_CHECKPOINT, *schema.EVALUATE_FLAGS.values())
    for name in (*others, "cascade", "checkpoint", "data", "seed"):
        if args[name].present:
            raise ValueError(f"--{name} has no effect with --compare; leave it out")
    if len(args.compare) != 2:
        raise ValueError("--compare DIR is needed twice: two output directories of --cascade")
    from imagen_jax.evals import evaluation_comparison

    result = evaluation_comparison.compare(*(as_path("--compare", path) for path in args.compare))
    print(evaluation_comparison.table(result))
    if args.output:
        output = output_paths.output_directory("output", args.output)
        output_paths.make_directory("output", output)
        write_json(output / evaluation_comparison.FILE, result)
    return 0


def network_option(text: str) -> tuple[str, str]:
    """(name, path) of NAME or NAME=PATH."""
    name, _, path = text.partition("=")
    return name, path


if __name__ == "__main__":
    cli.run(define_flags, main)
