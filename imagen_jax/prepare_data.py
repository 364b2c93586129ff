r"""Turns captioned images into prepared data: images and text features in shards with a manifest.

    python -m imagen_jax.prepare_data --source emoji --output data/emoji --encoder t5_tiny \
        --max_length 32

First the images: every one is checked, images and captions are selected, and the images are stored.
Then each distinct caption is encoded once, by one text encoder after another. OUTPUT is complete
when OUTPUT/manifest.json exists, which is written last. Until then OUTPUT/partial holds work files;
a journal there lists the finished shards. The same command therefore continues an interrupted run,
with any number of processes, and produces identical bytes. imagen_jax/data/records.py describes the
result. OUTPUT/skipped.jsonl lists every skipped or changed item with the reason.

OUTPUT may be in a bucket, gs://BUCKET/PATH, without a mount. A process then writes each shard to a
local temporary directory ($TMPDIR) before it stores the shard.

On several hosts, start the same command once on each; imagen_jax/distributed explains how they find
each other. OUTPUT must be in a bucket or on a file system that all of them share, such as NFS or
Lustre. Each process works on a fixed share and encodes on its own devices. If a process dies, the
others name it and exit; the same command continues. Memory does not grow with the number of images.
`--beam` ingests the images on an Apache Beam runner instead.
"""

import logging
import shlex
from collections.abc import Callable
from functools import partial

from absl import flags

from imagen_jax import cli, output_paths
from imagen_jax.data import manifest_file, records
from imagen_jax.data.prepare import ingest
from imagen_jax.data.prepare.caption_estimate import TokenizerFacts, preview_captions
from imagen_jax.data.prepare.passes import prepare
from imagen_jax.data.prepare.preview import dry_run
from imagen_jax.data.prepare.resize import AS_IS, FORMATS, Resize
from imagen_jax.data.prepare.settings import Settings
from imagen_jax.data.prepare.shards import AGAIN
from imagen_jax.data.prepare.work_directory import (
    adopt_earlier_work,
    check_output,
    shard_index,
)
from imagen_jax.data.sources import source
from imagen_jax.distributed import agreement
from imagen_jax.distributed.startup import hosts
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.object_storage import AnyPath, in_bucket
from imagen_jax.storage import check_local, exists
from imagen_jax.text.encoder_list import parse_encoders

# Flags that all processes of a run need alike: what is done next, and all that the bytes depend on.
ALIKE = ("output", "images_only", "text_only", "beam", "dry_run", "verify")
ALIKE += ("source", "heldout", "where")
ALIKE += ("shard_size", "min_size", "store_size", "store_format", "embedding")
ALIKE += ("encoder", "max_length", "batch_size")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the command line in `values`, see `cli.run`."""
    source.define_flags(values)
    cli.define_compile_cache(values)
    cli.define_processes(values)
    text = partial(flags.DEFINE_string, flag_values=values)
    switch = partial(flags.DEFINE_bool, default=False, flag_values=values)
    text("output", None, "directory to create; required", required=True)
    text(
        "beam",
        "",
        "ingest the images with Apache Beam, with these pipeline options: '--runner=FlinkRunner"
        " --flink_master=HOST:PORT'; needs pip install apache-beam",
    )
    switch("images_only", help="stop when the images are stored; see docs/data.md, Many hosts")
    switch(
        "text_only",
        help="store the captions without features, for configs with text.online = True",
    )
    switch("verify", help="verify the checksum of every shard, also of a finished OUTPUT")
    _define_images(values)
    _define_captions(values)
    _define_estimates(values)


def _define_images(values: flags.FlagValues) -> None:
    integer = partial(flags.DEFINE_integer, flag_values=values)
    integer("min_size", 0, "skip images with a side shorter than this, in pixels")
    integer(
        "store_size",
        0,
        "store images whose shorter side is longer than this, in pixels, resized to it; 0: store"
        " all images in their size",
    )
    flags.DEFINE_enum(
        "store_format",
        None,
        FORMATS,
        "encoding of resized images: jpeg (the default; quality 95, full chroma) or png (lossless)",
        flag_values=values,
    )
    integer("shard_size", 4096, "images or captions per shard")
    integer("processes", 0, "worker processes that check and write images; 0: one per core")


def _define_captions(values: flags.FlagValues) -> None:
    integer = partial(flags.DEFINE_integer, flag_values=values)
    flags.DEFINE_string(
        "encoder",
        None,
        "t5_tiny, a directory with a text encoder (config.json, weights, tokenizer), or a hub name;"
        " @layer=-1 after it chooses other features, and t5=NAME+clip=DIR gives several names"
        " (docs/data.md); required unless --images_only or --text_only",
        flag_values=values,
    )
    integer(
        "max_length", 128, "captions are truncated to this many tokens; the paper gives no number"
    )
    flags.DEFINE_enum(
        "embedding",
        records.EMBEDDINGS[0],
        records.EMBEDDINGS,
        "dtype of the stored token features; int8 has one scale per token, and the manifest its"
        " error",
        flag_values=values,
    )
    integer(
        "batch_size",
        64,
        "captions per device and batch, for captions of up to 32 tokens; fewer if longer",
    )


def _define_estimates(values: flags.FlagValues) -> None:
    integer = partial(flags.DEFINE_integer, default=0, lower_bound=0, flag_values=values)
    number = partial(flags.DEFINE_float, default=0.0, lower_bound=0, flag_values=values)
    flags.DEFINE_bool(
        "dry_run",
        False,
        "only estimate size and time, also of other stored sizes and dtypes",
        flag_values=values,
    )
    integer(
        "preview_captions",
        help="only estimate the size and time of storing this number of captions like those of the"
        " source; needs only the encoder's tokenizer and config.json",
    )
    number(
        "captions_per_second",
        help="for --preview_captions: total captions per second of all chips, from imagen_jax.plan"
        " or measured",
    )
    integer("chips", help="for --preview_captions: number of chips")
    number(
        "price_per_gib_month",
        help="for --dry_run and --preview_captions: storage price per GiB and month, in any"
        " currency",
    )


def main() -> int:
    """Prepares the data; returns the exit code."""
    return cli.guard(lambda: _run(flags.FLAGS), "interrupted; the same command continues")


def _run(args: flags.FlagValues) -> None:
    cli.log_to_stderr()
    logging.getLogger("apache_beam").setLevel(logging.ERROR)  # it tells of every step
    settings, output = _settings(args), _output(args)
    if args.preview_captions:
        return _preview_captions(args, output)
    reads_only = args.dry_run or exists(output / manifest_file.MANIFEST)
    if not args.dry_run:
        check_output(output)
    if not reads_only and not in_bucket(output):
        output_paths.make_directory("output", str(output if output.exists() else output.parent))
    ingestion = _ingestion(args.beam)
    with cli.processes(args, restart=AGAIN) as watch:
        agreement.check({f"--{name}": str(args[name].value) for name in ALIKE})
        encoders = None if args.images_only else _encoders(args.encoder, args.max_length)
        if not reads_only:
            agreement.check_in_first(lambda: adopt_earlier_work(output))
        with shard_index(output, reads_only) as index:
            images = source.open_source(args, index, reads_only)
        if not args.dry_run:
            at = lambda activity: watch.at(0, activity)
            prepare(images, encoders, output, settings, ingestion, at)
        elif agreement.is_first():
            count, price = len(hosts()) or 1, args.price_per_gib_month
            dry_run(images, encoders, settings, count, price)
        if args.verify and not args.dry_run:
            _verify(output)
        agreement.gather()  # nobody leaves before process 0 is done


def _output(args: flags.FlagValues) -> AnyPath:
    """The directory of the result. Raises ValueError if it cannot be one."""
    output = output_paths.output_directory("output", args.output)
    if not in_bucket(output):
        return output.resolve()
    if args.beam:
        raise ValueError(
            f"--beam writes to a file system that its workers share, not to --output {output}:"
            " mount the bucket in the workers, or leave --beam out"
        )
    return output


def _verify(output: AnyPath) -> None:
    """Compares every shard with its checksum; the processes divide them."""
    manifest = manifest_file.read_manifest(output)
    manifest_file.verify_shards(output, manifest, agreement.own_share(list(manifest["shards"])))
    agreement.gather()
    if agreement.is_first():
        print("every shard matches its checksum")


def _settings(args: flags.FlagValues) -> Settings:
    """The options of the passes. Raises ValueError for flags that do not fit together."""
    if args.store_format and not args.store_size:
        raise ValueError("--store_format has no effect without --store_size: give --store_size N")
    if not 0 <= args.heldout < 1:
        raise ValueError(f"--heldout is {args.heldout}; give a fraction in [0, 1)")
    if bool(args.encoder) + args.images_only + args.text_only != 1:
        raise ValueError("give one of --encoder NAME, --images_only and --text_only")
    if args.images_only and (args.verify or args.preview_captions):
        raise ValueError("--verify and --preview_captions need --encoder, not --images_only")
    for name in ("embedding", "max_length") if args.text_only else ():
        if args[name].value != args[name].default:
            raise ValueError(f"--{name} has no effect with --text_only: leave it out")
    for encoder in parse_encoders(args.encoder).values() if args.encoder else ():
        check_local("--encoder", encoder)
    return Settings(
        shard_size=args.shard_size,
        min_size=args.min_size,
        batch_size=args.batch_size,
        processes=args.processes or cli.cores(),
        resize=Resize(args.store_size, args.store_format or AS_IS.format),
        embedding=args.embedding,
    )


def _ingestion(options: str) -> Callable:
    """`ingest.ingest`, or its counterpart on a Beam runner with these options."""
    if not options:
        return ingest.ingest
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise ValueError(f"--beam {options!r}: {error}") from error
    try:
        from imagen_jax.data.prepare import beam_ingest
    except ModuleNotFoundError as error:
        raise ValueError("--beam needs Apache Beam: pip install 'apache-beam>=2.77'") from error
    return beam_ingest.on_runner(words)


def _preview_captions(args: flags.FlagValues, output: AnyPath) -> None:
    with shard_index(output, read_only=True) as index:
        images = source.open_source(args, index, read_only=True)
    preview_captions(
        images,
        _tokens(args.encoder, args.max_length),
        args.preview_captions,
        args.shard_size,
        args.embedding,
        args.captions_per_second,
        args.chips,
        args.price_per_gib_month,
    )


def _tokens(encoders: str | None, max_length: int) -> dict[str, TokenizerFacts]:
    """The tokenizers of the encoders by name; {} for texts alone."""
    from imagen_jax.weights.text_encoders import load_tokenize, prepared_length

    return {
        name: TokenizerFacts(*load_tokenize(encoder, prepared_length(name, encoder, max_length)))
        for name, encoder in (parse_encoders(encoders) if encoders else {}).items()
    }


def _encoders(encoders: str | None, max_length: int) -> Encoders:
    """The text encoders, to be loaded on all devices of this process; none for texts alone."""
    from imagen_jax.weights.text_encoders import encoder_loaders, local_mesh

    if not encoders:
        return Encoders({})
    return Encoders(encoder_loaders(encoders, max_length, make_mesh=local_mesh))


if __name__ == "__main__":
    cli.run(define_flags, main)
