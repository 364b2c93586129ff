"""An earlier result in the output directory is not overwritten by one of other settings."""

import copy
import json

import pytest

from imagen_jax import schema, storage
from imagen_jax.evals import earlier_result, suite_evaluation
from imagen_jax.evals.suites import Suite
from tests import tiny
from tests.evals.test_suite_evaluation import settings, suite

SAMPLING = schema.complete_sampling(tiny.config()["sampling"])
RECORD = {
    "stages": ["base"],
    "config": {"base": {"checkpoint": "a", "sampling": SAMPLING}, "batch_size": 8},
    "checkpoints": [{"checkpoint": "a", "sha256": "s", "which": "ema"}],
    "encoder": {"weights_sha256": "e"},
}


def described(record=RECORD, prompts="p", **changes):
    toy = Suite("toy", suite().prompts, "", {"prompts_sha256": prompts})
    return suite_evaluation.drawn_from(settings(suite=toy, **changes), record)


def changed(path, value):
    record = copy.deepcopy(RECORD)
    *parents, last = path
    place = record
    for name in parents:
        place = place[name]
    place[last] = value
    return record


@pytest.fixture
def path(tmp_path):
    storage.write_json(tmp_path / "evaluation.json", {"provenance": described()})
    return tmp_path / "evaluation.json"


def test_the_same_pictures_with_more_metrics_continue(path):
    """Catches a refusal of one more metric, of a moved checkpoint, of another batch size, and of a
    result written before a field of `sampling` existed.
    """
    content = json.loads(path.read_text())
    del content["provenance"]["config"]["base"]["sampling"]["w_interval"]
    path.write_text(json.dumps(content))
    earlier_result.check(path, described(metrics=["kid"], networks=("clip-b32", "inception")))
    earlier_result.check(path, described(changed(("checkpoints", 0, "checkpoint"), "elsewhere")))
    earlier_result.check(path, described(changed(("config", "batch_size"), 16)))
    earlier_result.check(path.with_name("none.json"), described(prompts="other"))


@pytest.mark.parametrize(
    ("new", "what"),
    [
        (described(prompts="q"), "the prompts of --suite"),
        (described(per_prompt=3), "--per_prompt"),
        (described(seed=1), "--seed"),
        (described(changed(("config", "base", "sampling", "w"), 9.0)), "base.w"),
        (described(changed(("checkpoints", 0, "sha256"), "t")), "base.checkpoint"),
        (described(changed(("checkpoints", 0, "which"), "params")), "base.checkpoint"),
    ],
)
def test_a_result_of_other_settings_is_refused(path, new, what):
    """Catches the result of a night that another command overwrites."""
    with pytest.raises(
        ValueError, match=rf"evaluation\.json is of other .*\({what} differ\): give"
    ):
        earlier_result.check(path, new)


def test_an_axis_of_a_grid_may_change(path):
    """Catches a grid that cannot get one more value."""
    new = described(changed(("config", "base", "sampling", "w"), 9.0))
    earlier_result.check(path, new, ["base.w"])
    with pytest.raises(ValueError, match=r"\(base\.w differ\)"):
        earlier_result.check(path, new, ["base.steps"])


@pytest.mark.parametrize("content", ["[]", '{"provenance": {"suite": {}}}', '{"provenance"'])
def test_what_is_no_result_is_not_overwritten(path, content):
    """Catches a traceback, and the result of evaluate --checkpoint that is overwritten."""
    path.write_text(content)
    with pytest.raises(ValueError, match=r"evaluation\.json is not .* give another --output"):
        earlier_result.check(path, described())
