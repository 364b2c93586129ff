r"""Generates pictures from text prompts, or up-samples an image with super-resolution stages alone.

    python -m imagen_jax.sample --config configs/cascade.py:demo --prompt "a red apple" \
        --output pictures
    python -m imagen_jax.sample --config configs/cascade.py:demo --image small.png --stages sr_1 \
        --prompt "a red apple" --output pictures

Each picture is a PNG file with a JSON record of the same name. The record reproduces the picture:
`--reproduce pictures/0000_a_red_apple.json`. Several processes may share one --output.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from imagen_jax import caption_text, cli, field, schema
from imagen_jax.data.sources import caption_files
from imagen_jax.storage import check_content, check_local, read_json, sha256_file, write_json

SHEET_ROWS = 100  # pictures on one contact sheet
# Fields of a picture's record, with their types.
RECORD = {
    "prompt": str,
    "seed": int,
    "stages": list,
    "image": str,
    "image_sha256": str,
    "config": dict,
    "checkpoints": list,
    "encoder": dict,
}


def define_flags() -> None:
    """Defines the command line, see `cli.run`."""
    cli.define_compile_cache()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "cascade config, with fields as --config.base.sampling.w=5",
        lock_config=True,
    )
    flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated")
    flags.DEFINE_string("prompts", "", "a text file with one prompt per line")
    flags.DEFINE_string("output", None, "directory of the pictures; earlier pictures stay")
    flags.DEFINE_integer(
        "seed",
        0,
        "seed of the first picture; the following pictures count up",
        lower_bound=0,
        upper_bound=2**31 - 1,
    )
    flags.DEFINE_integer("count", 1, "pictures per prompt", lower_bound=1)
    flags.DEFINE_list(
        "stages",
        ["base", "sr_1", "sr_2"],
        "consecutive stages to run; without base, --image is needed",
    )
    flags.DEFINE_string("image", "", "image to up-sample, with --stages sr_1 or sr_1,sr_2")
    flags.DEFINE_string(
        "reproduce",
        "",
        "JSON record of a picture to generate again; replaces --config, --prompt and --seed",
    )


def main() -> int:
    args = flags.FLAGS
    cli.log_to_stderr()
    if not args.output:
        raise ValueError("--output DIR is needed")
    cli.check_directory("output", args.output)
    cli.set_up_jax()
    cli.check_platform()
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
    config = schema.complete_cascade(json.loads(args.config.to_json()), "--config", new=True)
    return sample(config, prompts, seeds, args.stages, args.image, Path(args.output))


def read_record(path: Path) -> dict[str, Any]:
    """A picture's record with a completed config. Raises ValueError if the file holds none."""
    check_local("--reproduce", path)
    record = read_json(path)
    wrong = [
        name
        for name, kind in RECORD.items()
        if not isinstance(record, dict) or not isinstance(record.get(name), kind)
    ]
    if not wrong and not all(isinstance(entry, dict) for entry in record["checkpoints"]):
        wrong = ["checkpoints"]
    if not wrong and not field.within(record["seed"], schema.SEEDS):
        wrong = ["seed"]
    if wrong:
        raise ValueError(
            f"--reproduce {path} is not a picture's record: it has no valid {', '.join(wrong)}"
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
        lines = caption_files.prompt_lines(file)
        prompts = [prompt for prompt in [*prompts, *lines] if caption_text.clean(prompt)[0]]
    if not prompts:
        raise ValueError('no prompt: give --prompt "..." or --prompts FILE')
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
    """Samples all prompts and writes each picture as soon as its batch is done.

    expected: the record of the picture to reproduce; other weights or another image raise
    ValueError.
    """
    from imagen_jax import cascade

    check_stages(stages, image)
    image_sha256 = check_image(image)
    loaded = cascade.load_cascade(config, stages)
    identities = [dict(stage.identity) for stage in loaded]
    if expected:
        check_same(expected, identities, image_sha256)
    else:
        cascade.check_intervals(loaded)
    encoder = load_encoder(config, loaded)
    lowres = None if not image else read_image(image, loaded[0].stage.lowres_size, len(prompts))
    cli.make_directory("output", str(output))
    warn_of_prompts(encoder, prompts)
    text = encode(encoder, prompts, config["batch_size"])
    record = {
        "stages": list(stages),
        "image": image,
        "image_sha256": image_sha256,
        "config": dict(config),
        "checkpoints": identities,
        "encoder": encoder.identity,
    }
    first_stage = cascade.STAGES.index(stages[0])
    batches = cascade.generate(loaded, seeds, text, config["batch_size"], lowres, first_stage)
    sampled = write_batches(batches, prompts, seeds, record, output)
    headings = [f"{stage.stage.image_size}" for stage in loaded]
    if image:
        sampled = ((number, [lowres[0], *row]) for number, row in sampled)
        headings = [f"input {lowres.shape[1]}", *headings]
    sheets = write_sheets(sampled, prompts, headings, output)
    more = f" and {len(sheets) - 1} more" if len(sheets) > 1 else ""
    print(f"{len(prompts)} pictures added to {output}; contact sheet: {sheets[0]}{more}")
    return 0


def encode(encoder: Any, prompts: Sequence[str], batch_size: int) -> list[Any]:
    """The features of each prompt; a prompt that occurs several times is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    features = dict(zip(distinct, encoder.encode(distinct, batch_size, fill=True)))
    return [features[prompt] for prompt in prompts]


def write_batches(
    batches: Iterable[Sequence[Any]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    record: Mapping[str, Any],
    output: Path,
) -> Iterator[tuple[int, Sequence[Any]]]:
    """Writes pictures as they are sampled; yields each one's number and its images of all stages.

    record: the fields of the JSON records that all pictures share.
    """
    from imagen_jax import pictures, run_log

    remaining = zip(prompts, seeds)
    done = 0
    with run_log.Progress("pictures", len(prompts)) as progress:
        for images in batches:
            with pictures.claim_numbers(output, len(images[0])) as numbers:
                sampled = list(zip(numbers, zip(*images)))
                for (number, row), (prompt, seed) in zip(sampled, remaining):
                    write(output, number, row, {"prompt": prompt, "seed": seed} | record)
            done += len(sampled)
            progress.update(done)
            yield from sampled


def write_sheets(
    sampled: Iterable[tuple[int, Sequence[Any]]],
    prompts: Sequence[str],
    headings: Sequence[str],
    output: Path,
) -> list[Path]:
    """Writes a contact sheet for every SHEET_ROWS pictures, named after the first of them.

    Holds no more pictures than one sheet has, however many are sampled.
    """
    from imagen_jax import pictures

    sheets: list[Path] = []
    sampled = iter(sampled)
    for start in range(0, len(prompts), SHEET_ROWS):
        titles = prompts[start : start + SHEET_ROWS]
        numbers, rows = zip(*itertools.islice(sampled, len(titles)))
        cell = min(256, max(64, rows[-1][-1].shape[0]))
        sheet = pictures.contact_sheet(titles, rows, headings, cell)
        sheets.append(pictures.write_png(output / f"sheet_{numbers[0]:04d}.png", sheet))
    next(sampled, None)  # ends the progress bar
    return sheets


def load_encoder(config: Mapping[str, Any], loaded: Sequence[Any]) -> Any:
    """The text encoder of a cascade config, if it is the one its stages were trained with."""
    from imagen_jax.cascade import check_encoder
    from imagen_jax.weights.text_encoders import load_text_encoder

    length = max(s.stage.text_length for s in loaded)
    encoder = load_text_encoder(config["encoder"], length, config["encoder_dtype"])
    for stage in loaded:
        if stage.stage.text_dim:
            who = f"{stage.stage.name} and {config['encoder']}"
            check_encoder(stage.encoder, encoder.identity, who)
    return encoder


def warn_of_prompts(encoder: Any, prompts: Sequence[str]) -> None:
    """Prints a warning for each prompt that the encoder cuts or cannot read completely."""
    distinct = list(dict.fromkeys(prompts))
    _, cut = encoder.tokenize(distinct)
    for prompt, is_cut, unknown in zip(distinct, cut, encoder.unknown(distinct)):
        if is_cut:
            print(
                f"warning: prompt is longer than {encoder.max_length} tokens and was cut:"
                f" {cli.quoted(prompt)}"
            )
        if unknown:
            print(
                f"warning: the text encoder does not know {unknown!r} and reads it as the unknown"
                f" token; use other words: {cli.quoted(prompt)}"
            )


def check_stages(stages: Sequence[str], image: str) -> None:
    """Raises ValueError unless the stages are consecutive, with an image exactly if base is not
    among them.
    """
    from imagen_jax.cascade import STAGES

    runs = [STAGES[i:j] for i in range(len(STAGES)) for j in range(i + 1, len(STAGES) + 1)]
    if tuple(stages) not in runs:
        raise ValueError(
            f"--stages {','.join(stages)}: give consecutive stages of {','.join(STAGES)}"
        )
    if bool(image) != (stages[0] != "base"):
        raise ValueError("--image is needed by --stages without base, and cannot be used with base")


def check_image(image: str) -> str:
    """The SHA-256 of the --image, "" for none. Raises ValueError if it cannot be an image."""
    if not image:
        return ""
    check_local("--image", image)
    check_content(Path(image))
    return sha256_file(Path(image))


def check_same(
    expected: Mapping[str, Any], identities: Sequence[Mapping[str, Any]], image_sha256: str
) -> None:
    """Raises ValueError unless weights and image are those of a picture's record.

    Their paths may differ from the record's.
    """
    if len(expected["checkpoints"]) != len(identities):
        raise ValueError(
            f"the picture was sampled with {len(expected['checkpoints'])} stages, but its config"
            f" has {len(identities)}: the record was changed"
        )
    for before, now in zip(expected["checkpoints"], identities):
        if before.get("sha256") != now["sha256"] or before.get("which") != now["which"]:
            raise ValueError(
                f"{now['checkpoint']} does not hold the weights of the picture to reproduce:"
                f" {_weights(before)} then, {_weights(now)} now"
            )
    if expected["image_sha256"] != image_sha256:
        raise ValueError(
            f"{expected['image']} is not the image that was up-sampled: its content has changed"
        )


def _weights(identity: Mapping[str, Any]) -> str:
    sha256 = str(identity.get("sha256"))[:12]
    return f"step {identity.get('step')} ({identity.get('which')}, sha256 {sha256})"


def read_image(path: str, size: int, n: int) -> Any:
    """The --image upright, cut to its centre square, at `size` pixels, n times: uint8
    [n size size 3].
    """
    import numpy as np

    from imagen_jax.data.prepare.checks import stored_bytes
    from imagen_jax.data.prepare.upright import first_line
    from imagen_jax.data.transforms import decode_square

    data = Path(path).read_bytes()
    try:
        image = decode_square(stored_bytes(data), size)
    except Exception as error:  # PIL raises many kinds of exceptions for damaged files
        raise ValueError(f"--image {path} cannot be used: {first_line(error)}") from error
    return np.broadcast_to(image, (n, *image.shape))


def write(output: Path, number: int, row: Sequence[Any], record: Mapping[str, Any]) -> None:
    """Writes 0000_prompt.png (last stage), 0000_prompt_16.png ... (earlier stages) and the record
    0000_prompt.json.
    """
    from imagen_jax import pictures

    words = re.sub(r"[^a-z0-9]+", "_", record["prompt"].lower()).strip("_")[:60]
    stem = f"{number:04d}_{words}"
    for image in row[:-1]:
        pictures.write_png(output / f"{stem}_{image.shape[0]}.png", image)
    pictures.write_png(output / f"{stem}.png", row[-1])
    write_json(output / f"{stem}.json", record)


if __name__ == "__main__":
    cli.run(define_flags, main)
