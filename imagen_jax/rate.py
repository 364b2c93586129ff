r"""Compares pictures of several systems by human raters, in the protocol of DrawBench.

    python -m imagen_jax.rate make --pictures ours=DIR --pictures theirs=DIR --suite drawbench \
        --suite_file FILE --output STUDY
    python -m imagen_jax.rate analyse EXPORTS --key STUDY/key.json --output RESULT
    python -m imagen_jax.rate export --pictures DIR --suite geneval --suite_file FILE \
        --layout geneval --output DIR

`make` writes pages that work from a disk or a static host, and a key. `analyse` reads the files
that raters send back. `export` writes pictures for scorers that are not part of this package.
docs/rating.md describes all of them. The commands run in one process, without an accelerator.
"""

import dataclasses
import logging
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from imagen_jax import cli, output_paths
from imagen_jax.storage import check_local

COCO_PAIRS = 200  # of Imagen's section 3
log = logging.getLogger("imagen_jax.rate")


def define_make_flags() -> None:
    """The flags of `make`."""
    from imagen_jax.evals.rating.design import PAIRINGS
    from imagen_jax.evals.rating.protocols import PER_SIDE, PROTOCOLS

    define_suite_flags()
    flags.DEFINE_multi_string(
        "pictures", [], "NAME=PATH per system: a folder, or output of `sample` or `evaluate`"
    )
    flags.DEFINE_string("output", None, "directory of the study; new or empty")
    flags.DEFINE_enum(
        "protocol",
        "drawbench",
        list(PROTOCOLS),
        "drawbench: set against set; coco: picture against reference photograph",
    )
    flags.DEFINE_enum(
        "per_side", "", ["", *map(str, PER_SIDE)], "pictures per set; default 8, protocol coco 1"
    )
    flags.DEFINE_integer("raters", 25, "raters per run", lower_bound=1)
    flags.DEFINE_integer(
        "block",
        None,
        "trials per rater, control trials not counted; 0: all of the run; default 0, protocol"
        " coco 50",
        lower_bound=0,
    )
    flags.DEFINE_integer("controls", 2, "control trials per kind and rater", lower_bound=0)
    flags.DEFINE_boolean("by_category", True, "one run, with its own raters, per category")
    flags.DEFINE_enum("pairs", "all", list(PAIRINGS), "compare all pairs, or the first with each")
    flags.DEFINE_enum(
        "order",
        "hidden",
        ["hidden", "together"],
        "hidden: the caption appears after the question about quality; together: both questions"
        " with the caption, as in the paper",
    )
    flags.DEFINE_integer(
        "size",
        0,
        "height in pixels to which all pictures are scaled, bicubic; 0: sizes must be equal",
        lower_bound=0,
    )
    flags.DEFINE_boolean(
        "leave_out", False, "leave out prompts with missing, damaged or unequal pictures"
    )
    flags.DEFINE_boolean("single_file", False, "one HTML file per run that contains its pictures")
    flags.DEFINE_string("consent", "", "text file with your own consent text")
    flags.DEFINE_string("warning", None, "content warning; empty: none")
    flags.DEFINE_string("seed", "", "the hexadecimal seed of an earlier key; default: random")


def define_suite_flags() -> None:
    """The flags of the prompt suite."""
    flags.DEFINE_string("suite", "", "prompts: drawbench, coco, partiprompts, embedded ...")
    flags.DEFINE_string("suite_file", "", "the suite's list of prompts; embedded needs none")
    flags.DEFINE_integer(
        "prompts",
        0,
        "prompts to draw with --draw_seed; 0: all, suite coco 200",
        lower_bound=0,
    )
    flags.DEFINE_integer("draw_seed", 0, "seed of the draw of prompts", lower_bound=0)
    flags.DEFINE_string("images", "", "folder of the reference images, for the protocol coco")


def define_analyse_flags() -> None:
    """The flags of `analyse`."""
    flags.DEFINE_string("key", None, "key.json of the study")
    flags.DEFINE_string("output", None, "directory of the results; default: only print them")
    flags.DEFINE_string("title", "", "title of the figures")


def define_export_flags() -> None:
    """The flags of `export`."""
    define_suite_flags()
    flags.DEFINE_string("pictures", None, "a folder, or output of `sample` or `evaluate`")
    flags.DEFINE_string("output", None, "directory to write; new or empty")
    flags.DEFINE_enum(
        "layout",
        "manifest",
        ["manifest", "geneval"],
        "manifest: PNG files and manifest.jsonl; geneval: the folders that its scorer reads",
    )


def load_suite():
    """The suite of the flags. Raises ValueError if it cannot be read."""
    from imagen_jax.evals import suites

    args = flags.FLAGS
    if not args.suite:
        raise ValueError(f"--suite is needed: one of {', '.join(suites.KINDS)}")
    count = args.prompts or (COCO_PAIRS if args.suite == suites.COCO else None)
    return suites.load_suite(
        args.suite, file=args.suite_file, images=args.images, count=count, seed=args.draw_seed
    )


def make() -> int:
    """`rate make`: writes the pages and the key of a study."""
    cli.log_to_stderr()
    from imagen_jax.evals.rating import study, suite_items, system_pictures
    from imagen_jax.evals.rating.protocols import PROTOCOLS, REFERENCE

    args = flags.FLAGS
    output = new_directory(args.output)
    sources = [name_and_path(text) for text in args.pictures]
    texts = texts_of(args.consent, args.warning)
    study.check_names([name for name, _ in sources], texts)
    protocol = PROTOCOLS[args.protocol]
    if len(sources) + protocol.with_reference < 2:
        raise ValueError("a comparison needs two systems: give --pictures NAME=PATH for each")
    suite = load_suite()
    items = suite_items.items_of(suite)
    settings = settings_of(args, protocol)
    systems = [system_pictures.read(name, path, items) for name, path in sources]
    if protocol.with_reference:
        systems.append(system_pictures.of_reference(REFERENCE, suite))
    checked = check_pictures(items, systems, settings.per_side)
    record = {"suite": suite.identity}
    runs = study.make(output, systems, checked, settings, texts, record, args.single_file)
    names = [system.name for system in systems]
    print(study.describe(runs, len(checked.items), names, settings))
    print(f"for the raters: {output / study.STUDY}")
    print(f"for you: {output / study.HANDOUT} (which page for whom), {output / study.KEY} (secret)")
    return 0


def check_pictures(items, systems, per_side: int):
    """The prompts that can be compared. Raises ValueError for others without --leave_out."""
    from imagen_jax.evals.rating import preparing

    args = flags.FLAGS
    for note in (note for system in systems for note in system.notes):
        log.warning("%s", note)
    checked = preparing.check(items, systems, per_side, args.size)
    if checked.left_out:
        share = f"{len(checked.left_out):,} of {len(items):,} prompts"
        if not args.leave_out:
            raise ValueError(
                f"{share} cannot be compared: {checked.explain()}; complete the pictures, give"
                " another --per_side or --size, or leave these prompts out with --leave_out"
            )
        log.warning("left out %s: %s", share, checked.explain())
    return checked


def settings_of(args, protocol):
    """The settings of a study from the flags."""
    from imagen_jax.evals.rating.design import SEED_BITS, Settings

    try:
        seed = int(args.seed, 16) if args.seed else secrets.randbits(SEED_BITS)
    except ValueError as error:
        raise ValueError(f"--seed {args.seed} is not hexadecimal: copy it from a key") from error
    if not 0 <= seed < 1 << SEED_BITS:
        raise ValueError(
            f"--seed {args.seed} is negative or has more than {SEED_BITS} bits: copy it from a key"
        )
    return Settings(
        protocol=args.protocol,
        per_side=int(args.per_side) if args.per_side else protocol.per_side,
        raters=args.raters,
        block=protocol.block if args.block is None else args.block,
        controls=args.controls,
        by_category=args.by_category and not protocol.with_reference,
        pairs=args.pairs,
        order=args.order,
        seed=seed,
    )


def texts_of(consent: str, warning: str | None):
    """What raters read first. Raises ValueError for a consent file that cannot be read."""
    from imagen_jax.caption_text import read_text
    from imagen_jax.evals.rating.study import Texts

    texts = Texts()
    if consent:
        texts = dataclasses.replace(texts, consent=read_text(consent).strip())
    return texts if warning is None else dataclasses.replace(texts, warning=warning)


def name_and_path(text: str) -> tuple[str, str]:
    """The parts of NAME=PATH. Raises ValueError for anything else."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"--pictures {text} must be NAME=PATH, such as ours=eval/cascade")
    return name, path


def new_directory(path: str | None) -> Path:
    """--output as a path. Raises ValueError if it is not new or empty."""
    if not path:
        raise ValueError("--output DIRECTORY is needed")
    check_local("--output", path)
    output_paths.check_directory("output", path)
    output = Path(path)
    if output.is_symlink() or not output.name:
        raise ValueError(
            f"--output {path} is a link or the current directory, which cannot be replaced by a"
            " finished one: give a new directory"
        )
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--output {path} is not empty: give another directory")
    return output


def analyse(exports: Sequence[str]) -> int:
    """`rate analyse`: reports the results of the files or folders `exports`."""
    cli.log_to_stderr()
    from imagen_jax.evals.rating import analysis, rating_exports, rating_report

    args = flags.FLAGS
    if not args.key:
        raise ValueError("--key FILE is needed: the key.json of the study")
    if not exports:
        raise ValueError("give the files that raters sent, or a folder with them")
    if args.output:
        output_paths.check_directory("output", args.output)
    key = rating_exports.read_key(Path(args.key))
    ratings = rating_exports.read(exports, key)
    result = analysis.analyse(key, ratings) | {"title": args.title}
    print(rating_report.text(result))
    if args.output:
        output_paths.make_directory("output", args.output)
        for path in rating_report.write(result, Path(args.output)):
            print(path)
    return 0


def export() -> int:
    """`rate export`: writes the pictures of one system for other scorers."""
    cli.log_to_stderr()
    from imagen_jax.evals.rating import picture_exports, suite_items, system_pictures

    args = flags.FLAGS
    output = new_directory(args.output)
    if not args.pictures:
        raise ValueError("--pictures PATH is needed: a folder, or a set of pictures")
    suite = load_suite()
    system = system_pictures.read("pictures", args.pictures, suite_items.items_of(suite))
    for note in system.notes:
        log.warning("%s", note)
    write = {"geneval": picture_exports.write_geneval, "manifest": picture_exports.write_manifest}
    print(write[args.layout](system, suite, output))
    return 0


class Verb(NamedTuple):
    """One of the commands. positional: `main` takes the list of positional arguments."""

    define_flags: Callable[[], None]
    main: Callable[..., int]
    positional: bool = False


VERBS = {
    "make": Verb(define_make_flags, make),
    "analyse": Verb(define_analyse_flags, analyse, positional=True),
    "export": Verb(define_export_flags, export),
}


def main() -> None:
    """Runs the command that the first argument names."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in ("-h", "--help", "--helpshort", "--helpfull"):
        print(__doc__.strip(), "\n\n`rate make --help` and so on list the flags.")
        sys.exit(0)
    if verb not in VERBS:
        problem = f"{verb!r} is none of" if verb else "the first argument must be one of"
        sys.exit(cli.fail(f"{problem} {', '.join(VERBS)}: see --help"))
    del sys.argv[1]
    cli.run(*VERBS[verb])


if __name__ == "__main__":
    main()
