r"""Generates pictures from text prompts, or up-samples an image with super-resolution stages alone.

    python -m imagen_jax.sample --config configs/cascade.py:demo --prompt "a red apple" \
        --output pictures
    python -m imagen_jax.sample --config configs/cascade.py:demo --image small.png --stages sr_1 \
        --prompt "a red apple" --output pictures

--size HEIGHTxWIDTH draws pictures of other sizes than the squares of the stages. Each picture is a
PNG file with a JSON record of the same name. The record reproduces the picture:
`--reproduce pictures/0000_a_red_apple.json`. Several commands may share one --output. All devices
of all processes sample together; an interrupted command continues when it is run again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from imagen_jax import caption_text, cli, field, output_paths, picture_set, schema, stage_sizes
from imagen_jax.checksums import sha256_file
from imagen_jax.data.sources import caption_files
from imagen_jax.object_storage import AnyPath
from imagen_jax.picture_set import Requests
from imagen_jax.stage_sizes import Size
from imagen_jax.storage import as_path, check_content, check_local, read_json

# Flags that a record replaces, with all settings of its picture.
REPLACED = ("config", "prompt", "prompts", "seed", "count", "stages", "image", "size")
# Fields of a picture's record, with their types. A picture drawn with --size has `size`, too.
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
    cli.define_processes()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "cascade config, with fields as --config.base.sampling.w=5",
        lock_config=True,
    )
    flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated")
    flags.DEFINE_string("prompts", "", "a text file with one prompt per line")
    flags.DEFINE_string(
        "output",
        None,
        "directory of the pictures, the same for all processes; earlier pictures stay",
    )
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
        "size",
        "",
        "HEIGHTxWIDTH in pixels of the pictures of the last stage that runs; default: squares of"
        " its image size",
    )
    flags.DEFINE_string(
        "reproduce",
        "",
        "JSON record of a picture to generate again; used without --config, --prompt and --seed",
    )


def main() -> int:
    args = flags.FLAGS
    cli.log_to_stderr()
    if not args.output:
        raise ValueError("--output DIR is needed")
    output = output_paths.output_directory("output", args.output)
    check_flags(args)
    if args.reproduce:
        record = read_record(as_path("--reproduce", args.reproduce))
        config, prompts, seed = record["config"], [record["prompt"]], record["seed"]
        stages, image, per_prompt = record["stages"], record["image"], 1
        size = tuple(record["size"]) if "size" in record else None
    else:
        if args.config is None:
            raise ValueError(
                "--config FILE is needed, configs/cascade.py:demo for the embedded cascade"
            )
        record, prompts = None, read_prompts(args.prompt, args.prompts)
        config = cli.cascade_config(args.config)
        stages, image, seed, per_prompt = args.stages, args.image, args.seed, args.count
        size = stage_sizes.parse(args.size) if args.size else None
    advice = "give a smaller --count, and draw the others with other commands and seeds"
    cli.check_count(len(prompts), per_prompt, advice)
    requests = Requests(prompts, per_prompt, seed)
    with cli.processes():
        return sample(config, requests, stages, image, output, record, size)


def check_flags(args: Any) -> None:
    """Raises ValueError for flags without effect, and for a directory in place of a file."""
    for name in REPLACED if args.reproduce else ():
        if args[name].present:
            raise ValueError(
                f"--{name} has no effect with --reproduce, which takes it from the record; leave it"
                " out"
            )
    for name in ("prompts", "image", "reproduce"):
        output_paths.check_file(name, args[name].value)


def read_record(path: AnyPath) -> dict[str, Any]:
    """A picture's record with a completed config. Raises ValueError if the file holds none."""
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
    if not wrong and not _is_size(record.get("size", [1, 1])):
        wrong = ["size"]
    if wrong:
        raise ValueError(
            f"--reproduce {path} is not a picture's record: it has no valid {', '.join(wrong)}"
        )
    return record | {"config": schema.complete_cascade(record["config"], f"--reproduce {path}")}


def _is_size(value: Any) -> bool:
    """Whether this is [height, width]."""
    whole = lambda side: type(side) is int and side > 0
    return isinstance(value, list) and len(value) == 2 and all(map(whole, value))


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
    requests: Requests,
    stages: Sequence[str],
    image: str,
    output: AnyPath,
    expected: Mapping[str, Any] | None = None,
    size: Size | None = None,
) -> int:
    """Draws a set of pictures with all devices of all processes.

    expected: the record of the picture to reproduce; other weights or another image raise
    ValueError. size: of the pictures; None for squares.
    """
    import jax

    from imagen_jax import cascade, drawing, drawn_sets

    check_stages(stages, image)
    given = {"image": image, "image_sha256": check_image(image)}
    if expected:
        config = with_mesh_that_fits(config)
    drawer = drawing.Drawer(config, stages, size)
    if expected:
        check_same(expected, drawer.record["checkpoints"], given["image_sha256"])
    else:
        cascade.check_intervals(drawer.stages)
    first = drawer.stages[0].stage
    # A record from before the check of the size draws its picture again.
    low = first.lowres_of(drawer.sizes[0]) if image else (0, 0)
    lowres = None if not image else read_image(image, low, any_size=bool(expected))
    output_paths.make_directory("output", output)
    sizes = drawer.sizes
    trained = size and stage_sizes.untrained([loaded.stage for loaded in drawer.stages], sizes)
    if trained and jax.process_index() == 0:
        print(f"warning: {trained}")
    drawing.check_disk(output, drawn_sets.missing(requests, drawer.record | given, output, sizes))
    drawing.check_prompts(drawer, requests.prompts)
    manifest = drawing.draw(drawer, requests, output, given, lowres)
    if jax.process_index() == 0:
        sheets = picture_set.write_sheets(manifest, sizes, lowres)
        print(
            f"{len(requests)} pictures in {output}, listed in {manifest.name}; contact sheet:"
            f" {sheets[0]}{f' and {len(sheets) - 1} more' if len(sheets) > 1 else ''}"
        )
    return 0


def with_mesh_that_fits(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record's config, with all devices along `data` if its mesh does not fit them."""
    import jax

    from imagen_jax.sharding import mesh_sizes

    try:
        mesh_sizes(config["mesh"], jax.device_count())
    except ValueError:
        without = {name: value for name, value in config.items() if name != "mesh"}
        return schema.complete_cascade(without)
    return config


def check_stages(stages: Sequence[str], image: str) -> None:
    """Raises ValueError unless the stages are consecutive, with an image exactly if base is not
    among them.
    """
    from imagen_jax.cascade import check_stages as check_consecutive

    check_consecutive(stages)
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


def read_image(path: str, size: Size, any_size: bool = False) -> Any:
    """The --image upright, uint8 [h w 3] with (h, w) = `size`.

    It is cut to the largest window in its centre with the aspect ratio of `size`, and shrunk.

    Raises ValueError if it cannot be read or, unless any_size, if it does not cover `size`.
    """
    from imagen_jax.data.prepare.upright import first_line, upright
    from imagen_jax.data.transforms import decode_window

    try:
        image, stored = upright(Path(path).read_bytes())
        pixels = decode_window(stored, size)
    except Exception as error:  # PIL raises many kinds of exceptions for damaged files
        raise ValueError(f"--image {path} cannot be used: {first_line(error)}") from error
    if (image.height < size[0] or image.width < size[1]) and not any_size:
        raise ValueError(
            f"--image {path} is {image.width}x{image.height} (width x height), but the first stage"
            f" reads {size[1]}x{size[0]} pixels: give a larger image, or --stages that begin with"
            " an earlier stage"
        )
    return pixels


if __name__ == "__main__":
    cli.run(define_flags, main)
