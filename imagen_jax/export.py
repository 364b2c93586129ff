"""Writes the weights of a checkpoint to one bf16 safetensors file, config and provenance in its header.

    python -m imagen_jax.export --checkpoint WORKDIR --output base.safetensors

`sample`, `evaluate` and `train --init_from` take the file wherever they take a checkpoint.
"""

from absl import flags

from imagen_jax import cli

FROM = flags.DEFINE_string("checkpoint", None, "a workdir (its newest intact checkpoint) or one checkpoint")
TO = flags.DEFINE_string("output", None, "the file to write, ending in .safetensors")
WHICH = flags.DEFINE_enum("which", "ema", ["ema", "params"], "which weights")


def main() -> int:
    if not FROM.value or not TO.value or not TO.value.endswith(".safetensors"):
        raise ValueError("--checkpoint PATH and --output FILE.safetensors are both needed")
    import jax

    from imagen_jax import checkpoint

    cli.log_to_stderr()
    params, meta = checkpoint.load_params(FROM.value, WHICH.value)
    checkpoint.export_params(params, meta, TO.value)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{TO.value}: {meta['config']['name']} at step {meta['step']}, {WHICH.value}, {count:,} parameters")
    return 0


if __name__ == "__main__":
    cli.run(main)
