"""The trials of a study: balance, controls, repeats, and names that say nothing."""

import collections
import itertools

import numpy as np
import pytest

from imagen_jax.evals.rating import design
from imagen_jax.evals.rating.design import BROKEN, IDENTICAL, REGULAR, REPEAT
from imagen_jax.evals.rating.protocols import REFERENCE
from tests.evals.rating import studies


def shown(run):
    """(rater, trial, sets as displayed) of all raters of a run, in order."""
    for rater, schedule in enumerate(run.schedules):
        for index, swapped in schedule:
            trial = run.trials[index]
            yield rater, trial, trial.sets[::-1] if swapped else trial.sets


def test_every_rater_sees_every_trial_once_and_sides_are_balanced():
    """Catches a prompt that a rater misses, and a system that is on one side more often."""
    (run,), _, _ = studies.make(raters=6)
    left = collections.Counter()
    seen = collections.Counter()
    for rater, trial, sets in shown(run):
        seen[rater, trial.token] += 1
        if trial.kind == REGULAR:
            left[trial.prompt, sets[0].system] += 1
    assert set(seen.values()) == {1}
    prompts = {(trial.prompt) for trial in run.trials if trial.kind == REGULAR}
    assert prompts == set(range(12))
    assert all(left[prompt, name] == 3 for prompt in prompts for name in ("zebra", "okapi"))


@pytest.mark.parametrize("raters, block", [(5, 0), (7, 5), (4, 3)])
def test_blocks_are_balanced(raters, block):
    """Catches blocks that show some trials to more raters than others, or one trial twice."""
    (run,), _, _ = studies.make(raters=raters, block=block, controls=0)
    counts = collections.Counter(trial.token for _, trial, _ in shown(run))
    assert max(counts.values()) - min(counts[trial.token] for trial in run.trials) <= 1
    assert {len(set(schedule)) for schedule in run.schedules} == {block or 12}
    sides = collections.Counter((trial.token, sets[0].system) for _, trial, sets in shown(run))
    for trial in run.trials:
        names = [part.system for part in trial.sets]
        assert abs(sides[trial.token, names[0]] - sides[trial.token, names[1]]) <= 1


def test_control_trials_have_a_known_answer():
    """Catches a broken set that is not of another prompt, identical sets that are not, and files
    that give a control away because two sets share a name.
    """
    (run,), _, _ = studies.make()
    kinds = collections.Counter(trial.kind for trial in run.trials)
    assert kinds[IDENTICAL] == kinds[BROKEN] == 2
    for trial in run.trials:
        assert len({part.token for part in trial.sets}) == 2
        if trial.kind == IDENTICAL:
            assert len({(part.system, part.prompt) for part in trial.sets}) == 1
        if trial.kind == BROKEN:
            right = trial.sets[trial.answer]
            (wrong,) = (part for part in trial.sets if part is not right)
            assert (right.prompt, right.scrambled) == (trial.prompt, False)
            assert wrong.prompt != trial.prompt and wrong.scrambled


def test_control_trials_do_not_tell_the_first_system():
    """Catches controls that always show the first system: their files equal those of one side of a
    regular trial, which would then be known without looking.
    """
    shown = collections.Counter()
    for seed in range(60):
        (run,), _, _ = studies.make(prompts=3, raters=1, controls=1, seed=seed)
        for trial in run.trials:
            if trial.kind in (IDENTICAL, BROKEN):
                shown[trial.kind, trial.sets[trial.answer or 0].system] += 1
    assert len(shown) == 4 and all(15 < count < 45 for count in shown.values())


def test_repeats_come_later_with_swapped_sides_and_other_names():
    """Catches a repeat with the same sides, which shows no bias, or right after its trial."""
    (run,), _, _ = studies.make(prompts=20)
    for schedule in run.schedules:
        places = {run.trials[index].token: (i, swap) for i, (index, swap) in enumerate(schedule)}
        repeats = [run.trials[index] for index, _ in schedule if run.trials[index].kind == REPEAT]
        assert len(repeats) == 2
        for trial in repeats:
            (before, swap), (after, swap_again) = places[trial.repeats], places[trial.token]
            assert after - before > design.LEAST_GAP and swap != swap_again
    by_token = {trial.token: trial for trial in run.trials}
    for trial in run.trials:
        if trial.kind == REPEAT:
            first = by_token[trial.repeats]
            assert [part.system for part in trial.sets] == [part.system for part in first.sets]
            assert not {part.token for part in trial.sets} & {part.token for part in first.sets}


def test_the_order_of_the_sets_says_nothing():
    """Catches sets in the order of the systems, or tokens that sort like them."""
    (run,), _, _ = studies.make(prompts=200, controls=0, raters=2)
    first = [trial.sets[0].system for trial in run.trials]
    assert 70 < first.count("zebra") < 130
    tokens = sorted((part.token, part.system) for trial in run.trials for part in trial.sets)
    names = [name for _, name in tokens]
    changes = sum(a != b for a, b in itertools.pairwise(names))
    assert 150 < changes < 250  # about half of 399 neighbours
    assert [trial.token for trial in run.trials] == sorted(trial.token for trial in run.trials)


def test_a_study_is_a_function_of_its_seed():
    """Catches a draw without the seed, and tokens that can be computed without it."""
    one, again, other = (studies.make(seed=seed)[0] for seed in (1, 1, 2))
    assert one == again
    tokens = lambda runs: {trial.token for run in runs for trial in run.trials}
    assert not tokens(one) & tokens(other)


def test_runs_by_category_have_raters_of_their_own():
    """Catches categories that share trials."""
    runs, _, _ = studies.make(by_category=True)
    assert [run.category for run in runs] == ["c0", "c1"]
    for run in runs:
        regular = {trial.prompt % 2 for trial in run.trials if trial.kind == REGULAR}
        assert regular == {int(run.category[1])} and len(run.schedules) == 6


def test_pairs_of_several_systems():
    """Catches pairs that are missing, and a reference that is not compared with each system."""
    names = ["a1", "b1", "c1"]
    assert design.pairs_of(names, "all") == [("a1", "b1"), ("a1", "c1"), ("b1", "c1")]
    assert design.pairs_of(names, "first") == [("a1", "b1"), ("a1", "c1")]
    assert design.pairs_of(["a1", "b1", REFERENCE], "all") == [("a1", REFERENCE), ("b1", REFERENCE)]


def test_the_coco_protocol():
    """Catches one run for both questions, blocks that are not used, and controls without answer."""
    runs, _, _ = studies.make(20, ("ours", REFERENCE), protocol="coco", block=10)
    photo, caption = runs
    assert (photo.part, caption.part) == ("photorealism", "caption")
    kinds = collections.Counter(trial.kind for trial in caption.trials)
    assert kinds == {REGULAR: 40, design.RIGHT_CAPTION: 2, design.WRONG_CAPTION: 2}
    for trial in caption.trials:
        (own,) = trial.sets
        if trial.kind != REGULAR:
            assert trial.answer == ("yes" if own.prompt == trial.prompt else "no")
            assert own.system == REFERENCE
    assert {len(schedule) for schedule in caption.schedules} == {14}
    assert not any(trial.kind == IDENTICAL for trial in photo.trials)


def test_too_little_is_refused():
    """Catches a study of one system, and controls that cannot be made."""
    with pytest.raises(ValueError, match="two systems"):
        studies.make(systems=("zebra",))
    with pytest.raises(ValueError, match="--controls 0"):
        studies.make(prompts=1)
    same = [design.Item(i, "the same text", "") for i in range(3)]
    with pytest.raises(ValueError, match="different texts"):
        design.make_runs(same, ["a1", "b1"], studies.settings())


def test_deal_uses_every_trial_before_one_twice():
    """Catches blocks that always begin with the same trials."""
    blocks = design.deal(10, 5, 4, np.random.default_rng(0))
    counts = collections.Counter(itertools.chain(*blocks))
    assert set(counts.values()) == {2} and len(counts) == 10
