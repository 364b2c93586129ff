"""Makes a study: the pages and pictures that raters receive, and the key that stays with its owner.

study/                 for the raters: index.html or run_01.html ..., and pictures/
key.json               for the analysis: systems, trials, the seed; keep it from the raters
handout.csv            one line per rater: run, part, category, page with the rater's number
"""

import base64
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.checksums import sha256_file
from imagen_jax.evals.rating import page, preparing
from imagen_jax.evals.rating.design import REGULAR, Item, Run, Settings, make_runs, pairs_of
from imagen_jax.evals.rating.preparing import Checked
from imagen_jax.evals.rating.protocols import PROTOCOLS, QUESTIONS, REFERENCE
from imagen_jax.evals.rating.system_pictures import SystemPictures
from imagen_jax.locks import whole_directory
from imagen_jax.storage import write_atomically, write_json

MOST_EMBEDDED = 200 << 20  # bytes of pictures inside one page
FORMAT = 1  # of keys
VERSION = 1  # of pages and exports
STUDY, PICTURES, KEY, HANDOUT = "study", "pictures", "key.json", "handout.csv"
CONSENT = (
    "You will judge pictures, some or all of them made by computers. Taking part is voluntary, and"
    " you can stop at any time. Your answers and response times are kept under a random number,"
    " without your name or any other personal data. They stay in this browser until you send the"
    " saved file."
)
WARNING = "Some texts and pictures show people, and some may be disturbing or offensive."
INTRA_PROMPT = 0.2  # assumed correlation of the votes on one prompt, for the expected error
_NAME = re.compile(r"[^\s=/\\][^=/\\]*")


@dataclasses.dataclass(frozen=True)
class Texts:
    """What raters read before they begin."""

    consent: str = CONSENT
    warning: str = WARNING


def check_names(names: Sequence[str], texts: Texts) -> None:
    """Raises ValueError for names that are repeated, malformed, or words of the page itself.

    With such a word, a search for the names in the page could not show that it is blind.
    """
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two systems are called {min(repeated)!r}: give each its own name")
    manifest = _manifest(Run(1, "", "", [], [[]]), {}, {}, "together", texts) | {"study": "0" * 64}
    words = page.render(manifest).decode()
    for name in names:
        if not _NAME.fullmatch(name) or not name.isprintable() or name == REFERENCE:
            raise ValueError(
                f"{name!a} cannot be the name of a system: use letters and digits;"
                f" {REFERENCE!r} is reserved"
            )
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", words, re.IGNORECASE):
            raise ValueError(
                f"the page itself has the word {name!r}, so a search cannot show that the page is"
                " blind: give the system another name"
            )


def make(
    output: Path,
    systems: Sequence[SystemPictures],
    checked: Checked,
    settings: Settings,
    texts: Texts,
    record: Mapping[str, Any],
    single_file: bool,
) -> list[Run]:
    """Writes a study to a new directory, whole or not at all, and returns its runs.

    record: further fields of the key. single_file: pages contain their pictures.
    """
    if not checked.items:
        raise ValueError("no prompt is left: complete the pictures of all systems")
    runs = make_runs(checked.items, [system.name for system in systems], settings)
    with whole_directory(output, "making a study in") as work:
        pictures = work / STUDY / PICTURES
        pictures.mkdir(parents=True)
        preparing.write(runs, systems, checked.sizes, settings, pictures)
        study = _write_pages(runs, checked.items, settings, texts, work, single_file)
        if single_file:
            shutil.rmtree(pictures)
        key = {"format": FORMAT, "study": study, "settings": _settings_record(settings)}
        key |= _systems_record(systems, checked) | dict(record)
        key |= {"runs": [_run_record(run, checked.items) for run in runs]}
        write_json(work / KEY, key)
        _write_handout(work / HANDOUT, runs)
    return runs


def _write_pages(
    runs: Sequence[Run],
    items: Sequence[Item],
    settings: Settings,
    texts: Texts,
    work: Path,
    single_file: bool,
) -> str:
    """Writes the page of every run. Returns the id of the study.

    The id is the SHA-256 of all manifests and pictures. It includes the pictures because ratings of
    other pictures, by a study with the same seed, must not count.
    """
    captions = {item.id: item.text for item in items}
    names = preparing.file_names(runs, settings)
    paths = {token: [f"{PICTURES}/{name}" for name in files] for token, files in names.items()}
    manifests = [_manifest(run, captions, paths, settings.order, texts) for run in runs]
    sums = {file.name: sha256_file(file) for file in (work / STUDY / PICTURES).iterdir()}
    content = json.dumps([manifests, sums], sort_keys=True)
    study = hashlib.sha256(content.encode()).hexdigest()
    for run, manifest in zip(runs, manifests):
        if single_file:
            manifest = manifest | {"pictures": _embed(work / STUDY, manifest["pictures"])}
        path = work / STUDY / page_name(run, len(runs))
        write_atomically(path, page.render(manifest | {"study": study}))
        os.utime(path, (preparing.DATE, preparing.DATE))
    return study


def _embed(study: Path, files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The pictures of the sets of a run as data URLs. Raises ValueError if they are too large."""
    size = sum((study / file).stat().st_size for paths in files.values() for file in paths)
    if size > MOST_EMBEDDED:
        raise ValueError(
            f"a page with {size >> 20} MiB of pictures inside is more than browsers open"
            f" ({MOST_EMBEDDED >> 20} MiB): leave out --single_file"
        )
    url = lambda file: base64.b64encode((study / file).read_bytes()).decode()
    return {
        token: [f"data:image/png;base64,{url(file)}" for file in paths]
        for token, paths in files.items()
    }


def _manifest(
    run: Run,
    captions: Mapping[int, str],
    paths: Mapping[str, Sequence[str]],
    order: str,
    texts: Texts,
) -> dict[str, Any]:
    """The content of the page of a run. Nothing in it says which system a set is from."""
    # `check_names` passes a run without trials, to search the words of all questions.
    asked = {name for trial in run.trials for name in trial.questions} or set(QUESTIONS)
    trials = [
        {
            "id": trial.token,
            "prompt": trial.prompt,
            "caption": captions[trial.prompt],
            "questions": list(trial.questions),
            "sets": [part.token for part in trial.sets],
        }
        for trial in run.trials
    ]
    shown = sorted({part.token for trial in run.trials for part in trial.sets})
    return {
        "version": VERSION,
        "run": run.number,
        "order": order,
        "questions": {name: QUESTIONS[name].record() for name in QUESTIONS if name in asked},
        "trials": trials,
        "pictures": {token: list(paths[token]) for token in shown},
        "schedules": [[[index, int(swap)] for index, swap in rater] for rater in run.schedules],
        "consent": texts.consent,
        "warning": texts.warning,
    }


def page_name(run: Run, runs: int) -> str:
    """The file name of the page of a run."""
    return "index.html" if runs == 1 else f"run_{run.number:02d}.html"


def _settings_record(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings) | {"seed": f"{settings.seed:x}"}


def _systems_record(systems: Sequence[SystemPictures], checked: Checked) -> dict[str, Any]:
    shown = Counter(f"{width}x{height}" for height, width in checked.sizes.values())
    described = [
        {
            "name": system.name,
            "origin": dict(system.origin),
            "notes": list(system.notes),
            "sizes": dict(checked.originals[system.name]),
            "shown": dict(shown),
        }
        for system in systems
    ]
    left_out = {str(prompt): reason for prompt, reason in checked.left_out.items()}
    return {"systems": described, "left_out": left_out}


def _run_record(run: Run, items: Sequence[Item]) -> dict[str, Any]:
    categories = {item.id: item.category for item in items}
    trials = {}
    for trial in run.trials:
        answer = trial.answer
        trials[trial.token] = {
            "kind": trial.kind,
            "prompt": trial.prompt,
            "category": categories[trial.prompt],
            "questions": list(trial.questions),
            "sets": {part.token: part.system for part in trial.sets},
            "answer": trial.sets[answer].token if isinstance(answer, int) else answer,
            "repeats": trial.repeats,
        }
    tokens = [trial.token for trial in run.trials]
    return {
        "number": run.number,
        "part": run.part,
        "category": run.category,
        "trials": trials,
        "schedules": [[tokens[index] for index, _ in rater] for rater in run.schedules],
    }


def _write_handout(path: Path, runs: Sequence[Run]) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["run", "part", "category", "rater", "trials", "page"])
    for run in runs:
        for number, schedule in enumerate(run.schedules, 1):
            link = f"{page_name(run, len(runs))}?rater={number}"
            table.writerow([run.number, run.part, run.category, number, len(schedule), link])
    write_atomically(path, text.getvalue().encode())


def describe(runs: Sequence[Run], items: int, systems: Sequence[str], settings: Settings) -> str:
    """The size of a study, and the interval to expect of a rate, in a few lines."""
    trials = [len(rater) for run in runs for rater in run.schedules]
    span = " to ".join(map(str, sorted({min(trials), max(trials)})))
    lines = [
        f"prompts: {items:,}; runs: {len(runs)}; raters: {len(trials):,}; trials per rater: {span}"
    ]
    votes_by_trial = {run.number: _votes_by_trial(run) for run in runs}
    counts = [count for votes in votes_by_trial.values() for count in votes]
    if unseen := counts.count(0):
        lines.append(
            f"{unseen:,} of {len(counts):,} trials are shown to nobody: give more --raters, or a"
            " larger --block"
        )
    for part, questions in PROTOCOLS[settings.protocol].parts.items():
        if QUESTIONS[questions[0]].is_pair:
            votes = sum(sum(votes_by_trial[run.number]) for run in runs if run.part == part)
            votes /= len(pairs_of(systems, settings.pairs))
            lines.append(f"{' and '.join(questions)}: {_expected_interval(votes, items)}")
    return "\n".join(lines)


def _votes_by_trial(run: Run) -> list[int]:
    """The number of raters of each regular trial."""
    raters = Counter(index for rater in run.schedules for index, _ in rater)
    return [raters[i] for i, trial in enumerate(run.trials) if trial.kind == REGULAR]


def _expected_interval(votes: float, items: int) -> str:
    """The half-width of the 95 % interval of a rate of 50 %, for correlated votes on a prompt."""
    design_effect = 1 + max(votes / items - 1, 0) * INTRA_PROMPT
    independent = 196 * math.sqrt(0.25 / votes)
    return (
        f"{votes:,.0f} votes per pair of systems; a rate of 50 % will have a 95 % interval of about"
        f" +-{independent * math.sqrt(design_effect):.1f} points if votes on the same prompt have a"
        f" correlation of {INTRA_PROMPT:g} (+-{independent:.1f} points if they are independent)"
    )
