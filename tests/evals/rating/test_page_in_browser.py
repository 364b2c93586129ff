"""The rating page in Chromium, opened from disk and used by keyboard.

RATING_SCREENSHOTS=<folder> keeps a screenshot of each screen.
"""

import json
import re
import shutil

import pytest

from tests.evals.rating import shown_studies

pytest.importorskip("selenium", reason="selenium is not installed; it is in the extra `test`")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.evals.rating import chromium
from tests.evals.rating.chromium import Rater

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed"),
]
REFUSE_STORAGE = "Storage.prototype.setItem = () => { throw new Error('refused'); };"
MEANING = {"1": "left", "2": "same", "3": "right"}
MEANING |= {Keys.LEFT: "left", Keys.DOWN: "same", Keys.RIGHT: "right"}
SIZES = ((1280, 800), (360, 740))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium.driver(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def record(rater, position, answers=(), ms=(), **changed):
    """The line of the file for one trial, from the study alone."""
    index, swapped = rater.study["schedules"][-1][position]
    trial = rater.study["trials"][index]
    sides = list(reversed(trial["sets"])) if swapped else trial["sets"]
    fields = {
        "version": 1,
        "study": rater.study["study"],
        "run": 3,
        "number": len(rater.study["schedules"]),
        "position": position,
        "trial": trial["id"],
        "prompt": trial["prompt"],
        "left": sides[0],
        "right": sides[1] if len(sides) > 1 else None,
        "answers": dict(zip(trial["questions"], answers, strict=False)),
        "ms": dict(zip(trial["questions"], ms, strict=False)),
        "skipped": False,
        "revision": 0,
    }
    return fields | changed


def rate(rater, position, keys, ms, **changed):
    """Rates a trial of two questions, the caption hidden at first; returns its line."""
    expected = record(rater, position, [MEANING[key] for key in keys], ms, **changed)
    caption = rater.study["trials"][rater.study["schedules"][-1][position][0]]["caption"]
    rater.wait_for("#trial[data-state=ready]")
    assert rater.text("#progress-text") == f"{position + 1} of 10"
    assert rater.shown() == [expected["left"], expected["right"]]
    for key, time, question, text in zip(
        keys, ms, ("fidelity", "alignment"), ("", caption), strict=True
    ):
        assert rater.one(".asked").get_attribute("data-question") == question
        assert rater.text("#caption") == text
        rater.answer(key, time)
    return expected


def without_rater(records, rater_id):
    """Checks the two fields that all lines share."""
    assert {line["rater"] for line in records} == {rater_id}
    assert {line["records"] for line in records} == {len(records)}
    return [{k: v for k, v in line.items() if k not in {"rater", "records"}} for line in records]


def parts(file_name):
    """The run, the number and the id of the rater."""
    return re.fullmatch(r"ratings_(\d+)_(\d+)_([0-9a-f]{12})\.jsonl", file_name).groups()


def ten_trials():
    trials = [shown_studies.make_trial(index) for index in range(10)]
    own = [[3, 1], [0, 0], [7, 1], [1, 1], [9, 0], [2, 0], [4, 1], [8, 0], [6, 1], [5, 0]]
    return shown_studies.make_study(trials, [[[i, 0] for i in range(10)], own], count=4)


def test_ten_trials(driver, tmp_path):
    """Catches an answer of the other side, answers lost by a reload or by going back, and a file
    that differs from what was typed.
    """
    rater = Rater(driver, tmp_path, ten_trials())
    keys = list(MEANING)
    typed = [(keys[p % 6], keys[(5 * p + 1) % 6]) for p in range(10)]
    times = [(1000 + p, 200 + 10 * p) for p in range(10)]
    rater.open("?rater=99")
    assert "no rater number 99" in rater.text("#error")
    rater.press("11", Keys.ENTER)
    assert "no rater number 11: enter a number from 1 to 2" in rater.text("#error")
    rater.press(Keys.BACKSPACE * 2, "2", Keys.ENTER)
    lines = [rate(rater, p, typed[p], times[p]) for p in range(4)]

    rater.answer(Keys.RIGHT, 70)  # then a reload: the next question is asked
    rater.driver.refresh()
    rater.wait_for("#trial[data-state=ready]")
    assert rater.text("#progress-text") == "5 of 10"
    assert rater.text("#caption") == rater.study["trials"][9]["caption"]
    rater.answer("2", 80)
    lines += [record(rater, 4, ("right", "same"), (70, 80))]
    lines += [rate(rater, p, typed[p], times[p]) for p in (5, 6)]

    rater.answer("1", 90)  # an open answer, which going back keeps
    rater.press(Keys.BACKSPACE)
    lines[6] = rate(rater, 6, ("3", "1"), (50, 60), revision=1)
    rater.press(Keys.BACKSPACE, "k")  # back, and nothing changes
    assert rater.text("#progress-text") == "8 of 10"
    rater.answer("2", 95)
    lines += [record(rater, 7, ("left", "same"), (90, 95))]

    rater.answer("1")
    rater.press("s")
    lines += [record(rater, 8, skipped=True), rate(rater, 9, typed[9], times[9])]
    rater.press(Keys.ENTER)  # the download button has the focus
    name, records = rater.downloaded()
    run, number, rater_id = parts(name)
    assert (run, number) == ("3", "2")
    assert without_rater(records, rater_id) == lines
    assert shown_studies.parse_records(rater.one("#lines").get_property("value")) == records


def test_a_finished_number_stays_finished(driver, tmp_path):
    """Catches a second rater id for a number that was rated in this browser, and a last trial that
    cannot be corrected.
    """
    study = shown_studies.make_study([shown_studies.make_trial(0, ["fidelity"])], [[[0, 0]]])
    rater = Rater(driver, tmp_path, study)
    rater.start()
    rater.answer("1", 5)
    rater.one("#download").click()
    first, _ = rater.downloaded()
    rater.open_again("?rater=1", "body[data-screen='end']")
    rater.one("#end-back").click()
    rater.answer("3", 6)
    rater.one("#download").click()
    second, records = rater.downloaded()
    assert first == second
    assert without_rater(records, parts(first)[2]) == [record(rater, 0, ["right"], [6], revision=1)]


def mixed_trials(order):
    trials = [
        shown_studies.make_trial(0, ["caption"], sides=1),
        shown_studies.make_trial(1, ["fidelity", "alignment"]),
        shown_studies.make_trial(2, ["fidelity"]),
        shown_studies.make_trial(3, ["preferred"]),
    ]
    two_answers = {"text": "Which one?", "caption": False, "answers": shown_studies.PAIR[::2]}
    questions = shown_studies.QUESTIONS | {"preferred": two_answers}
    return shown_studies.make_study(
        trials, [[[i, 0] for i in range(4)]], order=order, questions=questions
    )


def test_questions_together_and_single_sets(driver, tmp_path):
    """Catches a caption that appears late or on a trial that does not ask about it, a second
    question that accepts the first answer, and arrow keys for answers that are not sides.
    """
    rater = Rater(driver, tmp_path, mixed_trials("together"))
    rater.start()
    assert rater.text("#caption") == rater.study["trials"][0]["caption"]
    assert len(rater.all("#sides .side")) == 1
    rater.press(Keys.DOWN, Keys.RIGHT)  # no answers
    rater.answer("2", 10)
    rater.wait_for("#trial[data-state=ready] [data-question=alignment]")
    assert rater.text("#caption") == rater.study["trials"][1]["caption"]
    enabled = lambda: [b.is_enabled() for b in rater.all(".answers button")]
    assert enabled() == [True] * 3 + [False] * 3
    rater.answer("3", 20)
    assert enabled() == [False] * 3 + [True] * 3
    rater.answer("2", 30)
    rater.wait_for("#trial[data-state=ready]")
    assert rater.text("#caption") == ""
    rater.press("s")
    rater.wait_for("#trial[data-state=ready]")
    rater.press("3", Keys.DOWN)  # no answers
    rater.answer("2", 40)
    rater.one("#download").click()
    name, records = rater.downloaded()
    assert without_rater(records, parts(name)[2]) == [
        record(rater, 0, ["somewhat"], [10]),
        record(rater, 1, ["right", "same"], [20, 30]),
        record(rater, 2, skipped=True),
        record(rater, 3, ["right"], [40]),
    ]


def test_a_broken_picture_can_only_be_skipped(driver, tmp_path):
    """Catches an answer to a trial of which a picture is missing, and a file that contains the
    open trial.
    """
    trials = [shown_studies.make_trial(index) for index in range(2)]
    rater = Rater(driver, tmp_path, shown_studies.make_study(trials, [[[0, 0], [1, 0]]], count=4))
    (tmp_path / "pictures" / "01_3.png").unlink()
    rater.open("?rater=1")
    rater.press(Keys.ENTER)
    rater.wait_for("#trial[data-state=broken]")
    assert "could not be loaded" in rater.text("#status")
    rater.press("1", "1", "z")
    assert not rater.one("#zoom").is_displayed()
    assert not rater.one("#save").is_enabled()
    rater.press("s")
    rater.answer("1")
    rater.one("#save").click()
    name, records = rater.downloaded()
    assert without_rater(records, parts(name)[2]) == [record(rater, 0, skipped=True)]


def test_a_picture_is_loaded_again(driver, tmp_path):
    """Catches a trial that a short failure of the network makes unusable."""
    study = shown_studies.make_study([shown_studies.make_trial(0, ["fidelity"])], [[[0, 0]]])
    rater = Rater(driver, tmp_path, study)
    picture, elsewhere = tmp_path / "pictures" / "00_0.png", tmp_path / "elsewhere.png"
    picture.rename(elsewhere)
    rater.open("?rater=1")
    rater.script(
        "pause = () => new Promise((resolve) => {"
        "  document.body.classList.add('failed'); window.endPause = resolve; });"
    )
    rater.press(Keys.ENTER)
    rater.wait_for("body.failed #trial[data-state=loading]")
    elsewhere.rename(picture)
    rater.script("endPause();")
    rater.wait_for("#trial[data-state=ready]")


def test_answers_wait_for_the_pictures(driver, tmp_path):
    """Catches an answer before the pictures are visible, and a time that includes their loading."""
    study = shown_studies.make_study([shown_studies.make_trial(0, ["fidelity"])], [[[0, 0]]])
    rater = Rater(driver, tmp_path, study)
    rater.open("?rater=1")
    # Loading ends when the test says so.
    rater.script("window.delay = new Promise((resolve) => (window.endDelay = resolve));")
    rater.script("const load = loaded; loaded = async (img) => (await delay, load(img));")
    rater.press(Keys.ENTER, "1")
    assert rater.one("#trial").get_attribute("data-state") == "loading"
    assert not rater.one(".answers button").is_enabled()
    assert not any(img.is_displayed() for img in rater.all("#sides img"))
    rater.script("window.clock += 5000; endDelay();")
    rater.answer("3", 7)
    rater.one("#download").click()
    name, records = rater.downloaded()
    assert without_rater(records, parts(name)[2]) == [record(rater, 0, ["right"], [7])]


def test_a_browser_without_storage(driver, tmp_path):
    """Catches a page that fails without localStorage, or says nothing."""
    study = shown_studies.make_study([shown_studies.make_trial(0, ["fidelity"])], [[[0, 0]]])
    rater = Rater(driver, tmp_path, study)
    rater.open()
    assert not rater.one("#notice").is_displayed()
    source = {"source": REFUSE_STORAGE}
    script = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", source)
    try:
        rater.start("")  # no number: one is drawn
        assert "cannot keep your progress" in rater.text("#notice")
        rater.answer("1", 3)
        rater.one("#download").click()
        name, records = rater.downloaded()
        assert without_rater(records, parts(name)[2]) == [record(rater, 0, ["left"], [3])]
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_two_tabs_of_one_number(driver, tmp_path):
    """Catches a tab that overwrites the answers of another one."""
    trials = [shown_studies.make_trial(index, ["fidelity"]) for index in range(3)]
    rater = Rater(driver, tmp_path, shown_studies.make_study(trials, [[[i, 0] for i in range(3)]]))
    rater.start()
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    try:
        rater.open_again("?rater=1", "#trial[data-state=ready]")
        rater.answer("1")
        rater.wait_for("#trial[data-state=ready] #progress[value='1']")
    finally:
        driver.close()
        driver.switch_to.window(first)
    rater.wait_for("#trial[data-state=ready] #progress[value='1']")


def test_start_screen_follows_another_tab(driver, tmp_path):
    """Catches a second tab that asks to start again because it was open before the answers were.

    What the other tab stores, and the event of it, are made here: Chromium may be late with both.
    """
    trials = [shown_studies.make_trial(index, ["fidelity"]) for index in range(3)]
    rater = Rater(driver, tmp_path, shown_studies.make_study(trials, [[[i, 0] for i in range(3)]]))
    rater.open("?rater=1")
    assert rater.script("return document.body.dataset.screen") == "start"
    answered = {"answers": {"fidelity": "left"}, "ms": {"fidelity": 5}, "skipped": False}
    session = {"rater": "ab", "position": 1, "records": [answered | {"revision": 0}], "open": {}}
    driver.execute_script(
        "localStorage.setItem(`${STORE}/1`, arguments[0]);"
        "window.dispatchEvent(new StorageEvent('storage', {key: `${STORE}/1`}));",
        json.dumps(session),
    )
    rater.wait_for("#trial[data-state=ready] #progress[value='1']")


def test_zoom_shows_the_same_picture_of_both_sides(driver, tmp_path):
    """Catches a zoom of one side, of different pictures or sizes, and an answer during the zoom."""
    study = shown_studies.make_study([shown_studies.make_trial(0)], [[[0, 1]]], count=4)
    rater = Rater(driver, tmp_path, study)
    rater.start()
    sources = lambda: [
        img.get_attribute("src").rpartition("/")[2] for img in rater.all("#zoom img")
    ]
    rater.all("#sides .side")[1].find_elements(By.TAG_NAME, "button")[2].click()
    assert sources() == ["01_2.png", "00_2.png"]
    rater.press("1", Keys.DOWN)
    assert sources() == ["01_3.png", "00_3.png"]
    rater.press(Keys.UP, Keys.UP)
    assert sources() == ["01_1.png", "00_1.png"]
    assert len({str(img.size) for img in rater.all("#zoom img")}) == 1
    for toggle in (Keys.ESCAPE, "z"):
        rater.press(toggle)
        assert not rater.one("#zoom").is_displayed()
        rater.press("z")
        assert sources() == ["01_0.png", "00_0.png"]
    rater.one("#zoom img").click()
    assert not rater.one("#zoom").is_displayed()
    assert rater.one(".asked").get_attribute("data-question") == "fidelity"


def check_layout(rater, name, parent="main"):
    """No horizontal scrolling; the pictures have one size, and the sides one height."""
    rater.screenshot(name)
    fits = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert rater.script(fits), name
    pictures = [img for img in rater.all(f"{parent} img") if img.is_displayed()]
    assert len({(img.rect["width"], img.rect["height"]) for img in pictures}) <= 1, name
    sides = [side for side in rater.all(f"{parent} .side") if side.is_displayed()]
    assert len({(side.rect["y"], side.rect["width"]) for side in sides}) <= 1, name
    return [img.rect for img in pictures]


def columns(rects):
    return len({rect["x"] for rect in rects})


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(("count", "wide", "narrow"), [(1, 2, 2), (4, 4, 4), (8, 8, 4)])
def test_layout(driver, tmp_path, size, count, wide, narrow):
    """Catches sides of different sizes, a page larger than the window, and pictures or answers that
    move when the caption appears or at the next trial.
    """
    long = shown_studies.CAPTION + ", which stands on a table beside a window"
    trials = [shown_studies.make_trial(0), shown_studies.make_trial(1, caption=long)]
    rater = Rater(
        driver, tmp_path, shown_studies.make_study(trials, [[[0, 0], [1, 0]]], count=count)
    )
    rater.resize(*size)
    try:
        rater.open()
        check_layout(rater, f"start_{count}_{size[0]}")
        rater.press("1", Keys.ENTER)
        rater.wait_for("#trial[data-state=ready]")
        rects = check_layout(rater, f"trial_{count}_{size[0]}")
        assert len(rects) == 2 * count
        assert columns(rects) == (wide if size[0] > 700 else narrow)
        answers = lambda: [button.rect for button in rater.all(".asked button")]
        places = answers()
        rater.answer("1")
        assert check_layout(rater, f"caption_{count}_{size[0]}") == rects
        assert answers() == places
        assert rater.script("return document.documentElement.scrollHeight <= innerHeight")
        rater.press("z")
        assert len(check_layout(rater, f"zoom_{count}_{size[0]}", "#zoom")) == 2
        rater.press("z", "1")
        rater.wait_for("#trial[data-state=ready]")
        assert check_layout(rater, f"next_{count}_{size[0]}") == rects
        assert answers() == places
        rater.press("s")
        check_layout(rater, f"end_{count}_{size[0]}")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_layout_of_other_trials(driver, tmp_path, size):
    """Catches a page wider than the window with two questions at once, with one set, with a picture
    that is missing, or after going back.
    """
    study = mixed_trials("together")
    rater = Rater(driver, tmp_path, study)
    (tmp_path / "pictures" / "20_0.png").unlink()
    rater.resize(*size)
    try:
        rater.start()
        check_layout(rater, f"single_{size[0]}")
        rater.answer("1")
        rater.answer("1")
        check_layout(rater, f"together_{size[0]}")
        rater.press("2")
        rater.wait_for("#trial[data-state=broken]")
        check_layout(rater, f"broken_{size[0]}")
        rater.press(Keys.BACKSPACE)
        rater.wait_for("#trial[data-state=ready]")
        check_layout(rater, f"revisited_{size[0]}")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
