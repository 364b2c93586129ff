"""Exports the weights of a checkpoint as one bfloat16 safetensors file.

    python -m imagen_jax.export --checkpoint WORKDIR --output base.safetensors

The file's header holds the config and the provenance. `sample`, `evaluate`, `train --init_from`
and `launch.sweep --checkpoint` accept the file in place of a checkpoint.
"""

import os

from absl import flags

from imagen_jax import cli, output_paths
from imagen_jax.object_storage import check_bucket, in_bucket
from imagen_jax.storage import as_path


def define_flags() -> None:
    """Defines the command line, see `cli.run`."""
    flags.DEFINE_string(
        "checkpoint", None, "a workdir (its newest intact checkpoint) or one checkpoint"
    )
    flags.DEFINE_string("output", None, "the file to write; its name ends in .safetensors")
    flags.DEFINE_string(
        "which", "ema", "which weights: ema, params, or ema_1, ema_2 ... for optim.ema_tracks"
    )


def main() -> int:
    args = flags.FLAGS
    if not args.checkpoint or not args.output:
        raise ValueError("--checkpoint PATH and --output FILE.safetensors are both needed")
    if not args.output.endswith(".safetensors"):
        raise ValueError(f"--output {args.output} must end in .safetensors, the file's format")
    output = as_path("--output", args.output)
    output_paths.output_directory("output", os.fspath(output.parent))
    if not in_bucket(output) and output.is_dir():
        raise ValueError(f"--output {args.output} is a directory; give a file name")
    check_bucket("--checkpoint", as_path("--checkpoint", args.checkpoint))
    import jax

    from imagen_jax.weights import checkpoint, exports

    cli.log_to_stderr()
    params, meta = checkpoint.load_params(args.checkpoint, args.which)
    exports.export_params(params, meta, args.output)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{args.output}: {meta['config']['name']} at step {meta['step']}, {args.which}, {count:,}"
        " parameters"
    )
    return 0


if __name__ == "__main__":
    cli.run(define_flags, main)
