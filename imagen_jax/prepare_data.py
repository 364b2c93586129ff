r"""Turns captioned images into prepared data: images and text features in shards with a manifest.

    python -m imagen_jax.prepare_data --source emoji --output data/emoji --encoder t5_tiny \
        --max_length 32

There are four passes: check every image; select images and captions; encode each distinct caption
once; write the images. They write to OUTPUT.partial, which is renamed to OUTPUT at the end. A
journal there lists the finished shards. The same command therefore continues an interrupted run,
with any number of processes. It produces identical bytes, except that features may differ in
rounding if a process has another number of devices, among which a batch is split.
imagen_jax/data/records.py describes the result. OUTPUT/skipped.jsonl lists every skipped or changed
item with the reason.

On several hosts, start the same command once on each; imagen_jax/distributed explains how they find
each other. OUTPUT must be on a shared file system with atomic renames and locks, such as NFS or
Lustre, not in a bucket. Each process works on a fixed share of every pass and encodes on its own
devices. A mesh across hosts is not needed, because T5-XXL in bfloat16 (8.9 GiB) fits on one v5e
chip or H100. It would add all-gathers and wait for the slowest host at every batch. Process 0
publishes the result. If a process dies, the others name it and exit within about a minute; the same
command continues. Memory does not grow with the number of images.
"""

import os
import sys
import traceback
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags

from imagen_jax import cli, exit_codes
from imagen_jax.data import records
from imagen_jax.data.prepare.caption_estimate import preview_captions
from imagen_jax.data.prepare.crew import ALONE, Crew
from imagen_jax.data.prepare.passes import Settings, check_output, prepare, work_directory
from imagen_jax.data.prepare.preview import dry_run
from imagen_jax.data.prepare.resize import AS_IS, FORMATS, Resize
from imagen_jax.data.sources import source
from imagen_jax.distributed.startup import hosts, start
from imagen_jax.storage import check_local, check_utf8


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the command line in `values`, see `cli.run`."""
    text = partial(flags.DEFINE_string, flag_values=values)
    switch = partial(flags.DEFINE_bool, default=False, flag_values=values)
    integer = partial(flags.DEFINE_integer, flag_values=values)
    number = partial(flags.DEFINE_float, default=0.0, lower_bound=0, flag_values=values)
    source.define_flags(values)
    text("output", None, "directory to create; required", required=True)
    text(
        "encoder",
        None,
        "t5_tiny, a directory with a text encoder (config.json, weights, tokenizer), or a hub name;"
        " required",
        required=True,
    )
    integer(
        "max_length", 128, "captions are truncated to this many tokens; the paper gives no number"
    )
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
    flags.DEFINE_enum(
        "embedding",
        records.EMBEDDINGS[0],
        records.EMBEDDINGS,
        "dtype of the stored token features; int8 has one scale per token, and the manifest its"
        " error",
        flag_values=values,
    )
    integer("shard_size", 4096, "images or captions per shard")
    integer(
        "batch_size",
        64,
        "captions per device and batch, for captions of up to 32 tokens; fewer if longer",
    )
    integer("processes", 0, "worker processes that check and write images; 0: one per core")
    switch(
        "verify",
        help="verify the checksum of every shard, after the run or of a finished OUTPUT",
    )
    switch("dry_run", help="only estimate size and time, also of other stored sizes and dtypes")
    integer(
        "preview_captions",
        0,
        "only estimate the size and time of storing this number of captions like those of the"
        " source; needs only the encoder's tokenizer and config.json",
        lower_bound=0,
    )
    number(
        "captions_per_second",
        help="for --preview_captions: total captions per second of all chips, from imagen_jax.plan"
        " or measured",
    )
    integer("chips", 0, "for --preview_captions: number of chips", lower_bound=0)
    number(
        "price_per_gib_month",
        help="for --dry_run and --preview_captions: storage price per GiB and month, in any"
        " currency",
    )


def main() -> int:
    """Prepares the data; returns the exit code."""
    try:
        code = cli.guard(lambda: _run(flags.FLAGS), "interrupted; the same command continues")
    except Exception:
        if not hosts():
            raise
        traceback.print_exc()
        code = exit_codes.FAILED
    return end(code)


def end(code: int) -> int:
    """Returns the exit code; in a multi-process run, exits with it.

    That skips cleanup, because the cleanup of JAX can hang (0.10.2, CPU).
    """
    if hosts():
        sys.stdout.flush()
        os._exit(code)
    return code


def _run(args: flags.FlagValues) -> None:
    cli.log_to_stderr()
    if args.store_format and not args.store_size:
        raise ValueError("--store_format has no effect without --store_size: give --store_size N")
    settings = Settings(
        shard_size=args.shard_size,
        min_size=args.min_size,
        batch_size=args.batch_size,
        processes=args.processes or cli.cores(),
        resize=Resize(args.store_size, args.store_format or AS_IS.format),
        embedding=args.embedding,
    )
    if not 0 <= args.heldout < 1:
        raise ValueError(f"--heldout is {args.heldout}; give a fraction in [0, 1)")
    check_local("--encoder", args.encoder)
    check_local("--output", args.output)
    output = Path(args.output).resolve()
    check_utf8("--output", output)
    if args.preview_captions:
        return _preview_captions(args)
    if not args.dry_run:
        check_output(output)
        cli.make_directory("output", str(output.parent))
    with _crew(output) as crew:
        images = source.open_source(args)
        encoder = _load_encoder(args.encoder, args.max_length)
        if not args.dry_run:
            prepare(images, encoder, output, settings, crew)
        elif crew.leads:
            dry_run(images, encoder, settings, crew.count, args.price_per_gib_month)
    if args.verify and crew.leads and not args.dry_run:
        records.Prepared(output).verify()
        print("every shard matches its checksum")


def _crew(output: Path) -> Crew:
    """The group of processes that the environment describes, seen from this process."""
    start()
    if not hosts():
        return ALONE
    import jax
    from jax.experimental import multihost_utils

    run = int(multihost_utils.broadcast_one_to_all(np.uint32(int.from_bytes(os.urandom(4)))))
    # Otherwise JAX would kill all processes without a message if one of them dies.
    jax.distributed.shutdown()
    return Crew(
        work_directory(output) / "crew", jax.process_index(), len(hosts()), f"{run:08x}", hosts()
    )


def _preview_captions(args: flags.FlagValues) -> None:
    from imagen_jax.weights.text_encoders import load_tokenize

    tokenize, dim = load_tokenize(args.encoder, args.max_length)
    preview_captions(
        source.open_source(args),
        tokenize,
        dim,
        args.preview_captions,
        args.shard_size,
        args.embedding,
        args.captions_per_second,
        args.chips,
        args.price_per_gib_month,
    )


def _load_encoder(name: str, max_length: int):
    """Loads the text encoder on all devices of this process."""
    from imagen_jax.weights.text_encoders import load_text_encoder, local_mesh

    return load_text_encoder(name, max_length, make_mesh=local_mesh)


if __name__ == "__main__":
    cli.run(define_flags, main)
