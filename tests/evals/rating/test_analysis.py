"""Results of simulated studies: known preferences, biases and careless raters are recovered."""

import json

import numpy as np
import pytest

from imagen_jax.evals.rating import analysis, rater_checks, rating_exports, rating_report
from imagen_jax.evals.rating.protocols import REFERENCE
from tests.evals.rating import studies
from tools import simulated_raters
from tools.simulated_raters import World


def result_of(world, tmp_path, seed=0, prompts=30, systems=("zebra", "okapi"), **fields):
    """(key, result) of a study whose raters live in `world`."""
    _, pages, content = studies.make(prompts, systems, **fields)
    key = studies.read_key(content, tmp_path)
    rng = np.random.default_rng(seed)
    filled = simulated_raters.fill_in(pages, key, world, rng)
    exports = studies.write_exports(filled, tmp_path / f"exports{seed}")
    return key, analysis.analyse(key, rating_exports.read([str(exports)], key))


def overall(result, question="fidelity", raters="all_raters"):
    return result[raters][question]["pairs"][0]["overall"]


def test_a_preference_is_recovered(tmp_path):
    """Catches answers joined to the wrong side or system, and ties counted as preferences."""
    world = World({"zebra": 1.0}, prompt=0.3, rater=0.2)
    _, result = result_of(world, tmp_path, prompts=60, raters=10)
    rates = overall(result)["rates"]
    for name, expected in zip(("first", "tie", "second"), world.expected_rate("zebra", "okapi")):
        assert rates[name]["low"] < expected < rates[name]["high"]
        assert abs(rates[name]["rate"] - expected) < 0.08
    test = overall(result)["sign_test"]
    assert test["first"] > 45 and test["p"] < 1e-6
    assert result["controls"]["right"]["rate"] == 1.0
    assert result["controls"]["kept"] == result["controls"]["raters"] == 10


def test_order_of_the_systems_changes_nothing_but_the_names(tmp_path):
    """Catches a preference for the first system in the key."""
    world = World({"zebra": 1.0}, prompt=0.3, rater=0.2)
    _, result = result_of(world, tmp_path, systems=("okapi", "zebra"), raters=10)
    pair = result["all_raters"]["fidelity"]["pairs"][0]
    assert (pair["first"], pair["second"]) == ("okapi", "zebra")
    assert pair["overall"]["rates"]["second"]["rate"] > 0.6


def test_side_bias_is_found_and_cancels(tmp_path):
    """Catches a bias that is not reported, or that changes the preference."""
    world = World({}, prompt=0.1, rater=0.1, bias=1.0)
    _, result = result_of(world, tmp_path, prompts=60, raters=10)
    bias = result["all_raters"]["fidelity"]["side_bias"]
    assert bias["low"] > 0.6
    found = overall(result)
    assert abs(found["difference"]["mean"]) < 0.1
    assert result["controls"]["same_on_repeat"]["rate"] < 0.5  # sides are swapped


def test_careless_raters_are_removed(tmp_path):
    """Catches controls that are not scored, and a filter that removes careful raters."""
    world = World({"zebra": 1.5}, prompt=0.2, rater=0.2, careless=0.4)
    _, result = result_of(world, tmp_path, prompts=30, raters=40, controls=3)
    removed = 40 - result["controls"]["kept"]
    assert 8 <= removed <= 24 and len(result["controls"]["removed"]) == removed
    rate = lambda raters: overall(result, raters=raters)["rates"]["first"]["rate"]
    expected = world.expected_rate("zebra", "okapi")[0]
    assert rate("all_raters") < expected - 0.1
    assert abs(rate("filtered") - expected) < 0.06


def test_agreement():
    """Krippendorff's alpha: 1 for equal votes, near 0 for random ones, None if undefined."""
    units = np.repeat(np.arange(200), 5)
    rng = np.random.default_rng(0)
    assert rater_checks.agreement(units, (units % 3).astype(int)) == 1.0
    assert abs(rater_checks.agreement(units, rng.integers(0, 3, 1000))) < 0.05
    assert rater_checks.agreement(units, np.zeros(1000, int)) is None
    assert rater_checks.agreement(np.arange(10), np.arange(10) % 3) is None


def test_several_systems_have_strengths(tmp_path):
    """Catches strengths joined to other names, and intervals that miss the order."""
    world = World({"a1": 1.0, "b1": 0.3, "c1": -0.5}, prompt=0.2, rater=0.2)
    _, result = result_of(world, tmp_path, systems=("b1", "a1", "c1"), raters=8)
    systems = result["all_raters"]["fidelity"]["strengths"]["systems"]
    assert systems["a1"]["low"] > systems["b1"]["log_strength"] > systems["c1"]["high"]
    assert len(result["all_raters"]["fidelity"]["pairs"]) == 3


def test_undefined_strengths_are_said(tmp_path):
    """Catches a fit that ends the analysis."""
    world = World({"a1": 9.0}, prompt=0.0, rater=0.0)
    _, result = result_of(world, tmp_path, systems=("a1", "b1", "c1"), prompts=4)
    assert "no limit" in result["all_raters"]["fidelity"]["strengths"]["undefined"]


def test_the_coco_protocol_has_scores(tmp_path):
    """Catches scores of the wrong system, and ties of a question that has no such answer."""
    world = World({"ours": -0.8, REFERENCE: 0.8}, prompt=0.2, rater=0.2)
    fields = {"protocol": "coco", "block": 20, "raters": 10}
    _, result = result_of(world, tmp_path, prompts=40, systems=("ours", REFERENCE), **fields)
    systems = result["all_raters"]["caption"]["systems"]
    assert systems["ours"]["overall"]["high"] < 50 < systems[REFERENCE]["overall"]["low"]
    assert set(systems["ours"]["categories"]) == {"c0", "c1"}
    rates = overall(result, "photorealism")["rates"]
    assert rates["tie"]["rate"] == 0.0 and rates["first"]["high"] < 0.5
    assert "neither" not in rating_report.text(result)


def test_reports_and_figures(tmp_path):
    """Catches a report that lacks a number, a figure that fails, and JSON with NaN."""
    _, result = result_of(World({"zebra": 1.0}), tmp_path)
    text = rating_report.text(result)
    assert "fidelity, all raters" in text and "alignment, raters who pass" in text
    rate = overall(result)["rates"]["first"]["rate"]
    assert f"{100 * rate:.1f} %" in text
    files = rating_report.write(result, tmp_path / "result")
    assert [path.name for path in files] == ["analysis.json", "preference.png", "categories.png"]
    assert json.loads(files[0].read_text())["all_raters"]["fidelity"]["pairs"]


def test_simulated_raters_know_their_systems(tmp_path):
    """Catches a misspelt name, whose preference would be 0."""
    _, _, content = studies.make()
    studies.read_key(content, tmp_path)
    with pytest.raises(ValueError, match="'zebre' is none of the systems zebra, okapi"):
        simulated_raters.simulate(tmp_path, World({"zebre": 1.0}), tmp_path / "exports", 0)
    assert not (tmp_path / "exports").exists()


def test_names_and_titles_are_no_formulas(tmp_path):
    """Catches a dollar sign that ends the analysis of a finished study."""
    _, result = result_of(World({}), tmp_path, systems=("$x^$", "a$b$c"), raters=2)
    rating_report.write(result | {"title": "for $1 or $x^$"}, tmp_path / "result")
    figure = rating_report.preference_figure(result | {"title": "$x^$"})
    assert figure.get_suptitle() == r"\$x^\$"


def test_enlarged_pictures_are_stated(tmp_path):
    """Catches a result that does not say that a system's pictures were enlarged."""
    _, result = result_of(World({}), tmp_path, prompts=4)
    shown = {"shown": {"1024x1024": 4}}
    sizes = {"zebra": "1024x1024", "okapi": "256x256"}
    systems = [{"name": name, "sizes": {size: 4}} | shown for name, size in sizes.items()]
    text = rating_report.text(result | {"systems": systems})
    assert "okapi: pictures of 256x256 were shown at 1024x1024" in text
    assert "zebra: pictures of" not in text


def test_an_analysis_on_the_command_line(tmp_path, capsys):
    """Catches a verb that reads other files than those it is given."""
    _, pages, content = studies.make()
    key = studies.read_key(content, tmp_path)
    filled = simulated_raters.fill_in(pages, key, World({}), np.random.default_rng(0))
    exports = studies.write_exports(filled, tmp_path / "exports")
    files = sorted(map(str, exports.iterdir()))[:2]
    assert studies.call("analyse", [*files, f"--key={tmp_path / 'key.json'}"]) == 0
    assert "in 2 files" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--key FILE"):
        studies.call("analyse", files)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, low, high", [(100, 0.88, 0.99), pytest.param(1000, 0.93, 0.97, marks=pytest.mark.long)]
)
def test_many_studies(tmp_path, number, low, high):
    """Preference, side bias, a careless rater and clusters, in many studies.

    Intervals of rates cover 95 %, the side bias is found, and the filter removes the careless
    rater and keeps the careful ones.
    """
    _, pages, content = studies.make(24, raters=12, controls=2)
    key = studies.read_key(content, tmp_path)
    world = World({"zebra": 0.4}, prompt=0.5, rater=0.4)
    biased = World({"zebra": 0.4}, prompt=0.5, rater=0.4, bias=0.5)
    expected = world.expected_rate("zebra", "okapi")
    rng = np.random.default_rng(0)
    hits, means, biases, kept = [], [], [], []
    for _ in range(number):
        rows = rows_of(simulated_raters.fill_in(pages, key, world, rng), key)
        (pair,) = analysis.preferences(
            analysis.votes_of(key, regular(rows, key), "fidelity"), key.names, ["c0", "c1"]
        )["pairs"]
        rates = pair["overall"]["rates"]
        hits += [
            rates[name]["low"] <= truth <= rates[name]["high"]
            for name, truth in zip(("first", "tie", "second"), expected)
        ]
        means.append(rates["first"]["rate"])
        rows = rows_of(simulated_raters.fill_in(pages, key, biased, rng), key)
        votes = analysis.votes_of(key, regular(rows, key), "fidelity")
        biases.append(analysis.side_bias(votes)["low"] > 0.5)
        careless = dict(simulated_raters.fill_in(pages, key, World({}, careless=1.0), rng))
        mixed = rows_of(list(careless.items())[:1], key) + [
            row for row in rows if row.rater != next(iter(careless))
        ]
        scores = rater_checks.score(mixed, key)
        kept.append(sum(score.is_kept for score in scores.values()))
    assert low < np.mean(hits) < high
    assert abs(np.mean(means) - expected[0]) < 0.02
    assert np.mean(biases) > 0.9
    assert 11 <= np.mean(kept) < 11.2


def rows_of(filled, key):
    """The ratings of filled-in pages, without files."""
    return [rating_exports._check(line, key) for _, lines in filled for line in lines]


def regular(rows, key):
    return [row for row in rows if key.trials[row.trial]["kind"] == "regular"]
