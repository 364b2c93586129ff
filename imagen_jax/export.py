"""Writes the weights of a checkpoint to one bf16 safetensors file, config and provenance in its
header.

    python -m imagen_jax.export --checkpoint WORKDIR --output base.safetensors

`sample`, `evaluate` and `train --init_from` take the file wherever they take a checkpoint.
"""

from absl import flags

from imagen_jax import cli


def define_flags() -> None:
    """The command line, see `cli.run`."""
    flags.DEFINE_string(
        "checkpoint", None, "a workdir (its newest intact checkpoint) or one checkpoint"
    )
    flags.DEFINE_string("output", None, "the file to write, ending in .safetensors")
    flags.DEFINE_string(
        "which", "ema", "which weights: ema, params, or ema_1, ema_2 ... for optim.ema_tracks"
    )


def main() -> int:
    args = flags.FLAGS
    if not args.checkpoint or not args.output:
        raise ValueError("--checkpoint PATH and --output FILE.safetensors are both needed")
    if not args.output.endswith(".safetensors"):
        raise ValueError(
            f"--output {args.output} must end in .safetensors, which is what it will be"
        )
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
