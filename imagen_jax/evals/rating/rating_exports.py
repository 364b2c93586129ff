"""Reads the files that raters send back, and checks them against the key.

Each line of a file is one trial. A line that cannot be used is left out and reported; the other
lines count. A trial counts once per rater, whichever files have it.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.evals.rating.protocols import QUESTIONS
from imagen_jax.evals.rating.study import FORMAT, HANDOUT, KEY, STUDY, VERSION
from imagen_jax.storage import check_object, read_object

MOST_BYTES = 64 << 20  # of a file; a line has about 300 bytes
_NAMED = 5  # files that a note lists
_TRIAL_FIELDS = {
    "kind": str,
    "prompt": int,
    "category": str,
    "questions": list,
    "sets": dict,
    "repeats": str,
}
_KEY_FIELDS = {"format": int, "study": str, "settings": dict, "systems": list, "runs": list}
_LINE_FIELDS = {
    "version": int,
    "study": str,
    "run": int,
    "rater": str,
    "number": int,
    "trial": str,
    "left": str,
    "answers": dict,
    "ms": dict,
    "skipped": bool,
    "revision": int,
    "records": int,
}
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Key:
    """The key of a study. runs: {number: its record}. trials: {token: its record, with its run}."""

    study: str
    settings: Mapping[str, Any]
    systems: Sequence[Mapping[str, Any]]
    runs: Mapping[int, Mapping[str, Any]]
    trials: Mapping[str, Mapping[str, Any]]

    @property
    def names(self) -> list[str]:
        """The names of the systems."""
        return [system["name"] for system in self.systems]


@dataclasses.dataclass(frozen=True)
class Rating:
    """The answers of one rater to one trial.

    rater: the random id of the rater.
    number: of the rater in the run, from 1.
    trial: the token of the trial.
    left, right: the tokens of the sets as shown; right is None if there is one set.
    answers: {question: answer}; empty if the trial was skipped.
    ms: {question: response time in milliseconds}.
    skipped: whether the rater skipped the trial.
    revision: how often the rater has replaced the answers.
    """

    rater: str
    number: int
    trial: str
    left: str
    right: str | None
    answers: Mapping[str, str]
    ms: Mapping[str, float]
    skipped: bool
    revision: int


@dataclasses.dataclass(frozen=True)
class Ratings:
    """The usable lines of all files. problems: one line for each thing left out or unusual."""

    rows: Sequence[Rating]
    problems: Sequence[str]
    files: int


def read_key(path: Path) -> Key:
    """Raises ValueError if the file is no key of this version."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the key.json that `rate make` wrote")
    content = read_object(path, _KEY_FIELDS)
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {content['format']}, not {FORMAT}: analyse it with the version of"
            " the package that made it"
        )
    try:
        runs = {run["number"]: run for run in content["runs"]}
        trials = {
            token: trial | {"run": run["number"], "part": run["part"]}
            for run in content["runs"]
            for token, trial in run["trials"].items()
        }
        names = [system["name"] for system in content["systems"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); copy it again") from error
    if len(names) < 2 or not trials:
        raise ValueError(f"{path} has no trials of two systems; copy it again")
    if reason := _damage(runs, trials, names):
        raise ValueError(f"{path} is damaged ({reason}); copy it again")
    return Key(content["study"], content["settings"], content["systems"], runs, trials)


def _damage(
    runs: Mapping[int, Mapping[str, Any]],
    trials: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
) -> str:
    """What is wrong in the runs of a key; "" if nothing is."""
    if len(set(names)) < len(names):
        return "two systems have one name"
    for number, run in runs.items():
        schedules = run.get("schedules")
        if not isinstance(schedules, list) or not all(isinstance(s, list) for s in schedules):
            return f"run {number} has no schedules"
    for token, trial in trials.items():
        check_object(f"trial {token} of the key", trial, _TRIAL_FIELDS, "copy the key again")
        if unknown := set(map(str, trial["questions"])) - set(QUESTIONS):
            return f"trial {token} has an unknown question {min(unknown)!r}"
        if unknown := set(map(str, trial["sets"].values())) - set(names):
            return f"trial {token} shows {min(unknown)!r}, which is none of the systems"
        if "answer" not in trial:
            return f"trial {token} has no answer"
    return ""


def read(paths: Sequence[str], key: Key) -> Ratings:
    """All ratings of some files, or of the .jsonl files in some folders.

    Raises:
      ValueError: a path does not exist, or no line of any file can be used.
    """
    files = list(dict.fromkeys(file.resolve() for path in paths for file in _files(Path(path))))
    found: dict[tuple[str, str], Rating] = {}
    problems, conflicts = _ignored(paths), set()
    for file in files:
        ratings, file_problems = _read_file(file, key)
        problems += file_problems
        repeated = 0
        for rating in ratings:
            place = rating.rater, rating.trial
            earlier = found.get(place)
            repeated += earlier is not None
            if earlier is None or rating.revision > earlier.revision:
                found[place] = rating
                conflicts.discard(place)
            elif rating.revision == earlier.revision and rating != earlier:
                conflicts.add(place)
        if repeated:
            problems.append(
                f"{file.name}: {repeated} trials are also in an earlier file or line;"
                " each counts once"
            )
    for rater, trial in sorted(conflicts):
        problems.append(f"rater {rater}, trial {trial}: the files disagree; left out")
        del found[rater, trial]
    problems += _doubled_numbers(found.values(), key)
    if not found:
        raise ValueError(f"no line can be used: {'; '.join(problems[:5]) or 'no file has one'}")
    return Ratings(list(found.values()), problems, len(files))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise ValueError(f"{path} has no .jsonl files: give the folder with the saved files")
        return files
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the files that raters sent")
    return [path]


def _ignored(paths: Sequence[str]) -> list[str]:
    """A line for each folder with files or folders that are not read, such as *.jsonl.txt."""
    notes = []
    for path in filter(Path.is_dir, map(Path, dict.fromkeys(paths))):
        others = sorted(
            entry.name
            for entry in path.iterdir()
            if entry.suffix != ".jsonl"
            and not entry.name.startswith(".")
            and entry.name not in (KEY, HANDOUT, STUDY)
        )
        if others:
            more = ", ..." if len(others) > _NAMED else ""
            notes.append(
                f"{path}: {len(others)} other files or folders are not read, because their names do"
                f" not end in .jsonl: {', '.join(others[:_NAMED])}{more}"
            )
    return notes


def _read_file(path: Path, key: Key) -> tuple[list[Rating], list[str]]:
    """The usable lines of a file, and what is wrong with the others."""
    if path.stat().st_size > MOST_BYTES:
        return [], [
            f"{path.name}: larger than {MOST_BYTES >> 20} MiB, not a file of answers; left out"
        ]
    reasons: Counter[str] = Counter()
    first_lines: dict[str, int] = {}
    ratings = []
    records: dict[str, int] = {}  # {rater: lines that were saved}
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _note_records(row, records)
            ratings.append(_check(row, key))
        except (ValueError, RecursionError) as error:
            reason = "cut off or damaged" if _is_syntax(error) else str(error)
            reasons[reason] += 1
            first_lines.setdefault(reason, number)
    problems = [
        f"{path.name}, line {first_lines[reason]}"
        f"{f' and {count - 1} others' if count > 1 else ''}: {reason}; left out"
        for reason, count in reasons.items()
    ]
    there = Counter(rating.rater for rating in ratings)
    # A merged file has several raters. A line that is left out may be of any of them.
    lacking = sum(max(0, count - there[rater]) for rater, count in records.items())
    if lacking > (damaged := sum(reasons.values())):
        problems.append(
            f"{path.name}: {len(ratings) + damaged} of {sum(records.values())} lines are there; ask"
            " for the whole file"
        )
    if not lines:
        problems.append(f"{path.name}: empty; ask for the file again")
    return ratings, problems


def _is_syntax(error: Exception) -> bool:
    return isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, RecursionError))


def _note_records(row: Any, records: dict[str, int]) -> None:
    """Adds the number of lines that a line's rater has saved, if it says both."""
    if isinstance(row, dict) and type(row.get("records")) is int:
        rater = row.get("rater")
        if isinstance(rater, str):
            records[rater] = max(records.get(rater, 0), row["records"])


def _check(row: Any, key: Key) -> Rating:
    """A line as a rating. Raises ValueError with the reason if it cannot be used."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    for name, kind in _LINE_FIELDS.items():
        if type(row.get(name)) is not kind:
            raise ValueError(f"no valid {name!r}")
    if row["study"] != key.study:
        raise ValueError(f"of another study ({row['study'][:12]}, not {key.study[:12]})")
    if row["version"] != VERSION:
        raise ValueError(f"of a page of version {row['version']}, not {VERSION}")
    trial = key.trials.get(row["trial"])
    if trial is None or trial["run"] != row["run"]:
        raise ValueError("a trial that is not in the study")
    schedules = key.runs[row["run"]]["schedules"]
    if not 1 <= row["number"] <= len(schedules):
        raise ValueError(f"rater number {row['number']}, but the run has {len(schedules)} raters")
    if row["trial"] not in schedules[row["number"] - 1]:
        raise ValueError("a trial that is not in the schedule of its rater")
    sides = [row["left"], *([row["right"]] if row.get("right") is not None else [])]
    if sorted(map(str, sides)) != sorted(trial["sets"]):
        raise ValueError("sets that are not those of its trial")
    _check_answers(row, trial["questions"])
    return Rating(
        row["rater"],
        row["number"],
        row["trial"],
        row["left"],
        row.get("right"),
        dict(row["answers"]),
        {name: float(value) for name, value in row["ms"].items()},
        row["skipped"],
        row["revision"],
    )


def _check_answers(row: Mapping[str, Any], questions: Sequence[str]) -> None:
    for value in row["ms"].values():
        if type(value) not in (int, float) or not 0 <= value < 1e9:
            raise ValueError("a response time that is not a number of milliseconds")
    if row["skipped"]:
        if row["answers"]:
            raise ValueError("a skipped trial with answers")
        return
    if set(row["answers"]) != set(questions):
        raise ValueError("answers that do not fit the questions of its trial")
    for name, answer in row["answers"].items():
        if not isinstance(answer, str) or answer not in QUESTIONS[name].answers:
            raise ValueError(f"an answer that the question {name!r} does not have")


def _doubled_numbers(ratings: Iterable[Rating], key: Key) -> list[str]:
    """A line for each number that several raters used: they saw the same order and sides."""
    raters: dict[tuple[int, int], set[str]] = {}
    for rating in ratings:
        place = key.trials[rating.trial]["run"], rating.number
        raters.setdefault(place, set()).add(rating.rater)
    return [
        f"run {run}: {len(members)} raters used the number {number}; the answers of all count"
        for (run, number), members in sorted(raters.items())
        if len(members) > 1
    ]
