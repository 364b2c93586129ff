"""Writes a T5 encoder with random weights, as a control for what training a text encoder gives.

python -m tools.random_text_encoder --output DIR
"""

import argparse
import pathlib
import shutil


def write(source: str, output: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """A copy of an encoder's directory with random weights, initialised as in T5.

    source: directory of a T5 encoder, or the embedded one. Replaces `output`.
    """
    import jax
    import jax.numpy as jnp

    from imagen_jax.text.t5_network import T5Config, T5Encoder
    from imagen_jax.weights.t5_files import load_tokenizer, save_encoder
    from imagen_jax.weights.text_encoders import find_encoder

    directory = find_encoder(source)
    config = T5Config.from_json(directory / "config.json")
    tokens = jnp.zeros((1, 4), jnp.int32)
    network = T5Encoder(config, jnp.float32)
    params = network.init(jax.random.key(seed), tokens, jnp.ones((1, 4), bool))["params"]
    shutil.rmtree(output, ignore_errors=True)
    save_encoder(output, config, params, load_tokenizer(directory)[0], "float32")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", default="t5_tiny", help="directory of the encoder to copy")
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"--output {args.output} exists: give a new directory")
    print(write(args.like, args.output, args.seed))


if __name__ == "__main__":
    main()
