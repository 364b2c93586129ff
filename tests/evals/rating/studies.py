"""Studies without pictures, for tests of trials and analysis."""

import dataclasses
import json

from absl import flags

from imagen_jax import rate
from imagen_jax.evals.rating import design, rating_exports, study
from imagen_jax.evals.rating.design import Item, Settings

SETTINGS = Settings(
    protocol="drawbench",
    per_side=1,
    raters=6,
    block=0,
    controls=2,
    by_category=False,
    pairs="all",
    order="hidden",
    seed=12345,
)


def items(count, categories=2):
    """Prompts 0, 1, ... in turn in categories."""
    return [Item(i, f"a picture of the number {i}", f"c{i % categories}") for i in range(count)]


def settings(**fields):
    return dataclasses.replace(SETTINGS, **fields)


def make(prompts=12, systems=("zebra", "okapi"), **fields):
    """(runs, pages by run, key) of a study."""
    chosen, listed = settings(**fields), items(prompts)
    runs = design.make_runs(listed, systems, chosen)
    captions = {item.id: item.text for item in listed}
    tokens = {part.token for run in runs for trial in run.trials for part in trial.sets}
    paths = {token: [f"{token}.png"] for token in tokens}
    texts = study.Texts()
    pages = {run.number: study._manifest(run, captions, paths, "hidden", texts) for run in runs}
    pages = {number: page | {"study": "ab" * 32} for number, page in pages.items()}
    key = {
        "format": study.FORMAT,
        "study": "ab" * 32,
        "settings": {},
        "systems": [{"name": name} for name in systems],
        "runs": [study._run_record(run, listed) for run in runs],
    }
    return runs, pages, key


def read_key(content, directory):
    """A key through its file."""
    path = directory / "key.json"
    path.write_text(json.dumps(content))
    return rating_exports.read_key(path)


def write_exports(filled, directory):
    """Writes the lines of `simulated_raters.fill_in`, and returns the directory."""
    directory.mkdir(exist_ok=True)
    for rater, lines in filled:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{rater}.jsonl").write_text(text)
    return directory


def call(verb, arguments):
    """Runs a verb of `rate` in this process, and returns its exit code."""
    before = set(flags.FLAGS)
    rate.VERBS[verb].define_flags()
    try:
        rest = flags.FLAGS(["rate", *arguments])[1:]
        assert rate.VERBS[verb].positional or not rest
        return rate.VERBS[verb].main(*[rest] * rate.VERBS[verb].positional)
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
