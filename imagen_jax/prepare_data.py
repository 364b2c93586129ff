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
command continues. Each process needs about 1 kB of memory per image; --dry_run prints an estimate.
"""

import argparse
import os
import sys
import traceback
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NoReturn

import numpy as np

from imagen_jax import cli, exit_codes
from imagen_jax.data import records
from imagen_jax.data.prepare.crew import ALONE, Crew, Lost
from imagen_jax.data.prepare.passes import Settings, check_output, prepare, work_directory
from imagen_jax.data.prepare.preview import preview, preview_captions
from imagen_jax.data.sources.source import add_options, open_source
from imagen_jax.distributed.startup import hosts, start
from imagen_jax.distributed.watch import LOST
from imagen_jax.storage import check_local


def main() -> None:
    """Runs the command. An expected error prints one line on standard error.

    imagen_jax/exit_codes.py lists the exit codes.
    """
    cli.escape_unprintable()
    args = parser().parse_args()
    try:
        _run(args)
        end(0)
    except BrokenProcessPool:
        end(
            cli.fail(
                "a worker process was killed, perhaps because memory ran out: run the same command"
                " with fewer --processes; it continues"
            )
        )
    except KeyboardInterrupt:
        end(cli.fail("interrupted; the same command continues", exit_codes.INTERRUPTED))
    except Lost as error:
        end(cli.fail(str(error), LOST))
    except Exception as error:
        if explanation := cli.explain(error):
            end(cli.fail(*explanation))
        if not hosts():
            raise
        traceback.print_exc()
        end(exit_codes.FAILED)


def end(code: int) -> NoReturn:
    """Exits this process.

    A multi-process run skips cleanup, because the cleanup of JAX can hang (0.10.2, CPU).
    """
    if hosts():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _run(args: argparse.Namespace) -> None:
    settings = Settings(
        shard_size=args.shard_size,
        min_size=args.min_size,
        batch_size=args.batch_size,
        processes=args.processes or cli.cores(),
    )
    if not 0 <= args.heldout < 1:
        raise ValueError(f"--heldout is {args.heldout}; give a fraction in [0, 1)")
    for name in ("preview_captions", "captions_per_second", "chips", "price_per_gib_month"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)} is less than 0")
    check_local("--encoder", args.encoder)
    check_local("--output", args.output)
    output = Path(args.output).resolve()
    if args.preview_captions:
        return _preview_captions(args)
    if not args.dry_run:
        check_output(output)
        cli.make_directory("output", str(output.parent))
    with _crew(output) as crew:
        source = open_source(args)
        encoder = _load_encoder(args.encoder, args.max_length)
        if not args.dry_run:
            prepare(source, encoder, output, settings, crew)
        elif crew.leads:
            preview(source, encoder, settings, crew.count)
    if args.verify and crew.leads and not args.dry_run:
        records.Prepared(output).verify()
        print("every shard matches its checksum")


def _crew(output: Path) -> Crew:
    """The group of processes that the environment describes, seen from this process."""
    cli.log_to_stderr()
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


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    parser = cli.Parser(
        prog="python -m imagen_jax.prepare_data", description=__doc__.splitlines()[0]
    )
    add_options(parser)
    parser.add_argument("--output", required=True, help="directory to create")
    parser.add_argument(
        "--encoder",
        required=True,
        help=(
            "t5_tiny, a directory with a text encoder (config.json, weights, tokenizer), or a hub"
            " name"
        ),
    )
    parser.add_argument(
        "--max_length",
        type=int,
        default=128,
        help="captions are truncated to this many tokens (default 128; not in the paper)",
    )
    parser.add_argument(
        "--min_size",
        type=int,
        default=0,
        help="skip images with a side shorter than this, in pixels",
    )
    parser.add_argument("--shard_size", type=int, default=4096, help="images or captions per shard")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="captions per device and batch, for captions of up to 32 tokens; fewer if longer",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        help="worker processes that check and write images (default: all cores)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="verify the checksum of every shard, after the run or of a finished OUTPUT",
    )
    parser.add_argument("--dry_run", action="store_true", help="only estimate size and time")
    parser.add_argument(
        "--preview_captions",
        type=int,
        default=0,
        metavar="N",
        help=(
            "only estimate the size and time of storing N captions like those of the source;"
            " needs only the encoder's tokenizer and config.json"
        ),
    )
    rates = (
        "for --preview_captions: total captions per second of all chips, from imagen_jax.plan or"
        " measured"
    )
    parser.add_argument("--captions_per_second", type=float, default=0.0, help=rates)
    parser.add_argument(
        "--chips", type=int, default=0, help="for --preview_captions: number of chips"
    )
    parser.add_argument(
        "--price_per_gib_month",
        type=float,
        default=0.0,
        help="for --preview_captions: storage price per GiB and month, in any currency",
    )
    return parser


def _preview_captions(args: argparse.Namespace) -> None:
    from imagen_jax.weights.text_encoders import load_tokenize

    tokenize, dim = load_tokenize(args.encoder, args.max_length)
    preview_captions(
        open_source(args),
        tokenize,
        dim,
        args.preview_captions,
        args.shard_size,
        args.captions_per_second,
        args.chips,
        args.price_per_gib_month,
    )


def _load_encoder(name: str, max_length: int):
    """Loads the text encoder on all devices of this process."""
    from imagen_jax.weights.text_encoders import load_text_encoder, local_mesh

    return load_text_encoder(name, max_length, place=local_mesh)


if __name__ == "__main__":
    main()
