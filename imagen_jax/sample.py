r"""Draws pictures from prompts with a cascade, or up-samples an image with a super-resolution stage
alone.

    python -m imagen_jax.sample --config configs/cascade.py:demo --prompt "a red apple" \
        --output pictures
    python -m imagen_jax.sample --config configs/cascade.py:demo --image small.png --stages sr_1 \
        --prompt "a red apple" --output pictures

Each picture is a PNG with a JSON file beside it that reproduces it: `--reproduce
pictures/0000_a_red_apple.json`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from imagen_jax import caption_text, cli, schema
from imagen_jax.storage import check_local

RECORD = {
    "prompt",
    "seed",
    "stages",
    "image",
    "image_sha256",
    "config",
    "checkpoints",
    "encoder",
}  # of a picture: what its JSON file holds


def define_flags() -> None:
    """The command line, see `cli.run`."""
    cli.define_compile_cache()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "cascade config, with fields as --config.base.sampling.w=5",
        lock_config=True,
    )
    flags.DEFINE_multi_string("prompt", [], "what to draw; may be given several times")
    flags.DEFINE_string("prompts", "", "a text file with one prompt a line")
    flags.DEFINE_string("output", None, "directory for the pictures")
    flags.DEFINE_integer(
        "seed",
        0,
        "seed of the first picture; the next ones count up",
        lower_bound=0,
        upper_bound=2**31 - 1,
    )
    flags.DEFINE_integer("count", 1, "pictures a prompt", lower_bound=1)
    flags.DEFINE_list(
        "stages",
        ["base", "sr_1", "sr_2"],
        "stages to run, in order; without base an --image is needed",
    )
    flags.DEFINE_string("image", "", "image to up-sample, with --stages sr_1 or sr_1,sr_2")
    flags.DEFINE_string(
        "reproduce",
        "",
        "the JSON file of a picture to draw again; replaces --config, --prompt and --seed",
    )


def main() -> int:
    args = flags.FLAGS
    cli.log_to_stderr()
    cli.set_up_jax()
    if not args.output:
        raise ValueError("--output DIR is needed")
    cli.check_directory("output", args.output)
    if args.reproduce:
        record = read_record(Path(args.reproduce))
        return sample(
            record["config"],
            [record["prompt"]],
            [record["seed"]],
            record["stages"],
            record["image"],
            Path(args.output),
            record,
        )
    if args.config is None:
        raise ValueError(
            "--config FILE is needed, configs/cascade.py:demo for the embedded cascade"
        )
    if "base" not in args.config:
        raise ValueError("--config is not the config of a cascade, such as configs/cascade.py:demo")
    prompts = read_prompts(args.prompt, args.prompts)
    prompts = [prompt for prompt in prompts for _ in range(args.count)]
    seeds = [args.seed + i for i in range(len(prompts))]
    config = schema.complete_cascade(json.loads(args.config.to_json()), "--config")
    return sample(config, prompts, seeds, args.stages, args.image, Path(args.output))


def read_record(path: Path) -> dict[str, Any]:
    """A picture's JSON file, its config completed. Raises ValueError if it is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--reproduce {path} is not a picture's JSON file: {error}") from error
    if not isinstance(record, dict) or not record.keys() >= RECORD:
        raise ValueError(
            f"--reproduce {path} is not a picture's JSON file: it lacks"
            f" {sorted(RECORD - set(record))}"
        )
    return record | {"config": schema.complete_cascade(record["config"], f"--reproduce {path}")}


def read_prompts(options: Sequence[str], file: str) -> list[str]:
    """Returns the prompts of the command line and of a file, cleaned; blank lines are left out.

    Raises:
      ValueError: there is none, one is empty, or the file is not UTF-8.
    """
    prompts = list(options)
    if file:
        check_local("--prompts", file)
        lines = caption_text.lines(caption_text.read_text(file))
        prompts = [prompt for prompt in [*prompts, *lines] if caption_text.clean(prompt)[0]]
    if not prompts:
        raise ValueError('nothing to draw: give --prompt "..." or --prompts FILE')
    return cli.check_prompts(prompts)


def sample(
    config: Mapping[str, Any],
    prompts: Sequence[str],
    seeds: Sequence[int],
    stages: Sequence[str],
    image: str,
    output: Path,
    expected: Mapping[str, Any] | None = None,
) -> int:
    """Draws all prompts and writes pictures as they are done. `expected` is a picture's record that
    must be met.
    """
    from imagen_jax import cascade, pictures, run_log
    from imagen_jax.storage import sha256_file
    from imagen_jax.weights.text_encoders import load_text_encoder

    check_stages(stages, image)
    loaded = cascade.load_cascade(config, stages)
    identities = [dict(stage.identity) for stage in loaded]
    image_sha256 = sha256_file(Path(image)) if image else ""
    if expected:
        check_same(expected, identities, image_sha256)
    length = max(s.stage.text_length for s in loaded)
    encoder = load_text_encoder(config["encoder"], length, config["encoder_dtype"])
    for stage in loaded:
        if stage.stage.text_dim:
            cascade.check_encoder(
                stage.encoder, encoder.identity, f"{stage.stage.name} and {config['encoder']}"
            )
    _, cut = encoder.tokenize(list(prompts))
    for prompt in [p for p, c in zip(prompts, cut) if c]:
        print(f"warning: prompt is longer than {encoder.max_length} tokens and was cut: {prompt!r}")
    text = encoder.encode(list(prompts), config["batch_size"], fill=True)
    lowres = None if not image else read_image(image, loaded[0].stage.lowres_size, len(prompts))
    first_stage = cascade.STAGES.index(stages[0])
    rows, done, first = [], 0, next_index(output)
    with run_log.Progress("pictures", len(prompts)) as progress:
        for images in cascade.generate(
            loaded, seeds, text, config["batch_size"], lowres, first_stage
        ):
            for row in zip(*images):
                record = {
                    "prompt": prompts[done],
                    "seed": seeds[done],
                    "stages": list(stages),
                    "image": image,
                    "image_sha256": image_sha256,
                    "config": dict(config),
                    "checkpoints": identities,
                    "encoder": encoder.identity,
                }
                write(output, first + done, row, record)
                rows.append(([lowres[done]] if image else []) + list(row))
                done += 1
            progress.update(done)
    headings = ([f"input {lowres.shape[1]}"] if image else []) + [
        f"{s.stage.image_size}" for s in loaded
    ]
    sheet = pictures.contact_sheet(
        prompts, rows, headings, min(256, max(64, loaded[-1].stage.image_size))
    )
    print(
        f"{done} pictures added to {output}; all of them:"
        f" {pictures.write_png(output / f'sheet_{first:04d}.png', sheet)}"
    )
    return 0


def check_stages(stages: Sequence[str], image: str) -> None:
    """Raises ValueError for stages that are unknown, not consecutive, or lack an image to start
    from.
    """
    from imagen_jax.cascade import STAGES as known

    places = [known.index(stage) if stage in known else -1 for stage in stages]
    if not stages or -1 in places or places != list(range(places[0], places[0] + len(places))):
        raise ValueError(
            f"--stages {','.join(stages)}: give consecutive stages of {','.join(known)}"
        )
    if bool(image) != (stages[0] != "base"):
        raise ValueError("--image goes with --stages that begin after base, and those need one")


def check_same(
    expected: Mapping[str, Any], identities: Sequence[Mapping[str, Any]], image_sha256: str
) -> None:
    """Raises ValueError unless weights and image are those of a picture's record, wherever they are
    stored now.
    """
    for then, now in zip(expected["checkpoints"], identities, strict=True):
        if then["sha256"] != now["sha256"] or then["which"] != now["which"]:
            was, found = (
                f"step {one['step']} ({one['which']}, sha256 {one['sha256'][:12]})"
                for one in (then, now)
            )
            raise ValueError(
                f"{now['checkpoint']} does not hold the weights of the picture to reproduce: {was},"
                f" but now {found}"
            )
    if expected["image_sha256"] != image_sha256:
        raise ValueError(
            f"{expected['image']} is not the image that was up-sampled: its content has changed"
        )


def read_image(path: str, size: int, n: int) -> Any:
    """The user's image, cut square and brought to `size` pixels, n times: uint8 [n size size 3]."""
    import numpy as np
    from PIL import Image

    from imagen_jax.data.prepare.checks import stored_bytes
    from imagen_jax.data.transforms import decode_square

    try:
        image = decode_square(stored_bytes(Path(path).read_bytes()), size)
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image {path} cannot be used: {error}") from error
    except OSError as error:
        raise ValueError(
            f"--image {path} cannot be read: {error.strerror or 'it is not an image'}"
        ) from error
    return np.repeat(image[None], n, axis=0)


def next_index(output: Path) -> int:
    """One more than the highest number of a picture in the directory: earlier pictures stay."""
    numbers = [int(path.name.partition("_")[0]) for path in output.glob("[0-9]*_*.json")]
    return max(numbers, default=-1) + 1


def write(output: Path, index: int, row: Sequence[Any], record: Mapping[str, Any]) -> None:
    """0000_prompt.png (last stage), 0000_prompt_16.png ... (earlier ones), and 0000_prompt.json."""
    from imagen_jax import pictures
    from imagen_jax.storage import write_json

    words = re.sub(r"[^a-z0-9]+", "_", record["prompt"].lower()).strip("_")[:60]
    stem = f"{index:04d}_{words}"
    for image in row[:-1]:
        pictures.write_png(output / f"{stem}_{image.shape[0]}.png", image)
    pictures.write_png(output / f"{stem}.png", row[-1])
    write_json(output / f"{stem}.json", record)


if __name__ == "__main__":
    cli.run(define_flags, main)
