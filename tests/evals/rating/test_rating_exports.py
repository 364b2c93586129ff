"""The files of raters: what counts, what is left out, and what is reported."""

import itertools
import json

import numpy as np
import pytest

from imagen_jax.evals.rating import rating_exports
from tests.evals.rating import studies
from tools import simulated_raters


@pytest.fixture
def study(tmp_path):
    """(key, {rater: lines} of two raters)."""
    _, pages, content = studies.make(raters=2)
    key = studies.read_key(content, tmp_path)
    world = simulated_raters.World({"zebra": 0.5})
    filled = dict(simulated_raters.fill_in(pages, key, world, np.random.default_rng(0)))
    return key, filled


def write(directory, name, lines, cut=None):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path = directory / name
    path.write_text(text if cut is None else text[:cut])
    return str(path)


def test_whole_files_count_completely(study, tmp_path):
    """Catches lines that are lost."""
    key, filled = study
    for rater, lines in filled.items():
        write(tmp_path, f"{rater}.jsonl", lines)
    ratings = rating_exports.read([str(tmp_path)], key)
    assert len(ratings.rows) == sum(map(len, filled.values()))
    assert ratings.problems == [] and ratings.files == 2


def test_nothing_counts_twice(study, tmp_path):
    """Catches a copy of a file, a file saved half-way, and the same path given twice."""
    key, filled = study
    lines = next(iter(filled.values()))
    half = [line | {"records": 5} for line in lines[:5]]
    paths = [
        write(tmp_path, name, rows) for name, rows in (("a", half), ("b", lines), ("c", lines))
    ]
    ratings = rating_exports.read([paths[0], *paths, paths[1]], key)
    assert len(ratings.rows) == len(lines) and ratings.files == 3
    assert ratings.problems[0].startswith("b: 5 trials are also in an earlier file")
    assert ratings.problems[1].startswith(f"c: {len(lines)} trials are also in an earlier file")


def test_the_last_revision_counts(study, tmp_path):
    """Catches an answer that its rater has replaced since."""
    key, filled = study
    lines = next(iter(filled.values()))
    answers = {"fidelity": "left", "alignment": "right"}
    newer = [lines[0] | {"revision": 1, "answers": answers}]
    for order in ([lines, newer], [newer, lines]):
        paths = [write(tmp_path, f"{i}", rows) for i, rows in enumerate(order)]
        rows = rating_exports.read(paths, key).rows
        (changed,) = [row for row in rows if row.trial == lines[0]["trial"]]
        assert changed.answers == answers and len(rows) == len(lines)


def test_files_that_disagree_are_left_out(study, tmp_path):
    """Catches a choice between two answers of the same revision."""
    key, filled = study
    lines = next(iter(filled.values()))
    flip = {"left": "right", "right": "left", "same": "left"}
    answers = {name: flip[value] for name, value in lines[0]["answers"].items()}
    paths = [write(tmp_path, "a", lines), write(tmp_path, "b", [lines[0] | {"answers": answers}])]
    ratings = rating_exports.read(paths, key)
    assert len(ratings.rows) == len(lines) - 1
    assert any("the files disagree; left out" in text for text in ratings.problems)


def test_a_later_revision_ends_a_disagreement(study, tmp_path):
    """Catches a result that depends on the order of the files."""
    key, filled = study
    lines = next(iter(filled.values()))
    answers = lambda value: {"answers": dict.fromkeys(("fidelity", "alignment"), value)}
    versions = [(1, "left"), (1, "right"), (2, "same")]
    paths = [
        write(tmp_path, str(i), [lines[0] | answers(value) | {"revision": revision, "records": 1}])
        for i, (revision, value) in enumerate(versions)
    ]
    for order in itertools.permutations(paths):
        ratings = rating_exports.read(order, key)
        assert [row.answers["fidelity"] for row in ratings.rows] == ["same"]
        assert not any("disagree" in text for text in ratings.problems)


def test_files_that_are_not_read_are_told(study, tmp_path):
    """Catches a rater who is lost because a mail program changed the name of the file."""
    key, filled = study
    first, second = filled.values()
    write(tmp_path, "a.jsonl", first)
    write(tmp_path, "b.jsonl.txt", second)
    (tmp_path / "more").mkdir()
    (problem,) = rating_exports.read([str(tmp_path)], key).problems
    assert "2 other files or folders are not read" in problem
    assert problem.endswith("b.jsonl.txt, more")


def test_a_missing_part_of_a_merged_file_is_told(study, tmp_path):
    """Catches a rater's lines that are lost in a file of several raters."""
    key, filled = study
    first, second = filled.values()
    ratings = rating_exports.read([write(tmp_path, "a", first[:4] + second)], key)
    there, whole = 4 + len(second), len(first) + len(second)
    assert ratings.problems == [f"a: {there} of {whole} lines are there; ask for the whole file"]
    assert rating_exports.read([write(tmp_path, "b", first + second)], key).problems == []


def test_a_truncated_line_costs_one_trial(study, tmp_path):
    """Catches a file that is lost with its last line, and a missing part that nobody notices."""
    key, filled = study
    lines = next(iter(filled.values()))
    ratings = rating_exports.read([write(tmp_path, "a", lines, cut=-20)], key)
    assert len(ratings.rows) == len(lines) - 1
    assert ratings.problems == [f"a, line {len(lines)}: cut off or damaged; left out"]
    ratings = rating_exports.read([write(tmp_path, "b", lines[:3])], key)
    assert ratings.problems == [f"b: 3 of {len(lines)} lines are there; ask for the whole file"]


DAMAGES = {
    "of another study": ({"study": "cd" * 32}, "of another study (cdcdcdcdcdcd, not abababababab)"),
    "of another page": ({"version": 2}, "of a page of version 2, not 1"),
    "an unknown trial": ({"trial": "feed"}, "a trial that is not in the study"),
    "an unknown number": ({"number": 3}, "rater number 3, but the run has 2 raters"),
    "other sets": ({"left": "feed"}, "sets that are not those of its trial"),
    "an unknown answer": (
        {"answers": {"fidelity": "best", "alignment": "left"}},
        "an answer that the question 'fidelity' does not have",
    ),
    "an answer missing": (
        {"answers": {"fidelity": "left"}},
        "answers that do not fit",
    ),
    "answers to a skipped trial": ({"skipped": True}, "a skipped trial with answers"),
    "a negative time": ({"ms": {"fidelity": -1}}, "a response time that is not a number"),
    "a number as text": ({"number": "1"}, "no valid 'number'"),
    "no time of a skipped trial": (
        {"skipped": True, "answers": {}, "ms": {"fidelity": None}},
        "a response time that is not a number",
    ),
    "an object as a time": ({"ms": {"fidelity": {}}}, "a response time that is not a number"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_has_one_clear_line(study, tmp_path, damage):
    """Catches a traceback, a line that counts all the same, and other lines that are lost."""
    key, filled = study
    changes, message = DAMAGES[damage]
    first, second = filled.values()
    path = write(tmp_path, "a", [line | changes for line in first] + second)
    ratings = rating_exports.read([path], key)
    assert len(ratings.rows) == len(second)
    (problem,) = ratings.problems
    assert problem.startswith("a, line ") and f"and {len(first) - 1} others: {message}" in problem


def test_nothing_usable_is_an_error(study, tmp_path):
    """Catches an analysis of no votes."""
    key, filled = study
    lines = [line | {"study": "cd" * 32} for line in next(iter(filled.values()))]
    with pytest.raises(ValueError, match="no line can be used.*another study"):
        rating_exports.read([write(tmp_path, "a", lines)], key)
    with pytest.raises(ValueError, match="does not exist"):
        rating_exports.read([str(tmp_path / "gone")], key)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no .jsonl files"):
        rating_exports.read([str(tmp_path / "empty")], key)


def test_files_that_are_no_exports(study, tmp_path):
    """Catches binary files and lists that end the analysis."""
    key, filled = study
    (tmp_path / "x.jsonl").write_bytes(b"\x00\xff\xfe" * 100 + b"\n[1, 2]\n3\n")
    (tmp_path / "y.jsonl").write_bytes(b"")
    (tmp_path / "z.jsonl").write_text("[" * 100_000)
    write(tmp_path, "good.jsonl", next(iter(filled.values())))
    ratings = rating_exports.read([str(tmp_path)], key)
    assert len(ratings.rows) == len(next(iter(filled.values())))
    problems = " ".join(ratings.problems)
    assert all(
        text in problems for text in ("x.jsonl, line 1", "y.jsonl: empty", "z.jsonl, line 1")
    )


def test_one_number_for_two_raters_is_reported(study, tmp_path):
    """Catches a link that was given to two people, unnoticed."""
    key, filled = study
    lines = next(iter(filled.values()))
    other = [line | {"rater": "feedfeedfeed"} for line in lines]
    ratings = rating_exports.read([write(tmp_path, "a", lines), write(tmp_path, "b", other)], key)
    assert ratings.problems == ["run 1: 2 raters used the number 1; the answers of all count"]
    assert len(ratings.rows) == 2 * len(lines)


def trial_of(content):
    """The first trial of a key."""
    return next(iter(content["runs"][0]["trials"].values()))


def test_keys_are_checked(study, tmp_path):
    """Catches a damaged key that ends in a traceback, and one of another version."""
    _, _, content = studies.make()
    for changes, message in (
        ({"format": 9}, "has format 9, not 1"),
        ({"runs": [{}]}, "is damaged"),
        ({"runs": []}, "has no trials"),
        (
            {"systems": [{"name": "zebra"}, {"name": "lion"}]},
            "'okapi', which is none of the systems",
        ),
        ({"systems": [{"name": "zebra"}] * 2}, "two systems have one name"),
        ({"runs": [content["runs"][0] | {"schedules": [1]}]}, "run 1 has no schedules"),
        *(
            ({"runs": [content["runs"][0] | {"trials": {"feed": trial}}]}, f"feed .*{name}")
            for name in trial_of(content)
            for trial in [{k: v for k, v in trial_of(content).items() if k != name}]
        ),
    ):
        with pytest.raises(ValueError, match=message):
            studies.read_key(content | changes, tmp_path)
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(ValueError, match=r"key\.json"):
        rating_exports.read_key(tmp_path / "key.json")
