"""From pictures to preference rates, with a browser in between."""

import itertools
import json

import pytest
from selenium.webdriver.common.keys import Keys

from imagen_jax.evals.rating import study
from tests.evals.rating import chromium, studies, test_page_in_browser, test_study

pytestmark = test_page_in_browser.pytestmark
PROMPTS = [f"a picture of the number {i}" for i in range(7)]


@pytest.mark.parametrize("single_file", [False, True])
def test_ten_trials_from_pictures_to_rates(tmp_path, single_file):
    """Catches a page, an export and an analysis that do not fit together: a rater who
    prefers one system, whichever side it is on, is found to prefer it always.
    """
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    for name, seed in (("zebrafish", 0), ("okapi", 1)):
        test_study.write_pictures(tmp_path / name, seed, prompts=7, size=32)
    options = [f"--pictures={name}={tmp_path / name}" for name in ("zebrafish", "okapi")]
    options += ["--suite=prompts", f"--suite_file={tmp_path / 'prompts.txt'}", "--per_side=1"]
    options += ["--raters=3", "--controls=1", f"--output={tmp_path / 'study'}"]
    studies.call("make", options + ["--single_file"] * single_file)
    key = json.loads((tmp_path / "study" / study.KEY).read_text())
    with chromium.driver(tmp_path / "profile") as driver:
        rater = Visitor(driver, tmp_path / "study" / study.STUDY)
        rater.start("?rater=2")
        for position in range(10):
            if position == 5:
                driver.refresh()
            rater.wait_for("#trial[data-state=ready]")
            assert rater.text("#progress-text") == f"{position + 1} of 10"
            for _ in range(2):
                rater.answer(best(key, rater.tokens()))
        rater.wait_for("#download")
        rater.one("#download").click()
        name, records = rater.downloaded()
    assert len(records) == 10
    exports = rater.folder / "downloads"
    exports.mkdir(exist_ok=True)
    (exports / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    result = tmp_path / "result"
    arguments = [str(exports), f"--key={tmp_path / 'study' / study.KEY}", f"--output={result}"]
    studies.call("analyse", arguments)
    found = json.loads((result / "analysis.json").read_text())
    assert found["problems"] == [] and found["controls"]["right"]["rate"] == 1.0
    assert found["controls"]["same_on_repeat"]["rate"] == 1.0
    for question in ("fidelity", "alignment"):
        overall = found["all_raters"][question]["pairs"][0]["overall"]
        assert (overall["votes"], overall["rates"]["second"]["rate"]) == (7, 1.0)


class Visitor(chromium.Rater):
    """A rater at a page that `rate make` wrote."""

    def __init__(self, driver, folder):
        self.driver, self.folder = driver, folder
        downloads = {"behavior": "allow", "downloadPath": str(folder / "downloads")}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)

    def open(self, query=""):
        self.driver.get((self.folder / "index.html").as_uri() + query)

    def tokens(self):
        """The sets as displayed, from the study in the page and the URLs of the pictures."""
        shown = self.script(
            "return [...document.querySelectorAll('#sides .side img')].map("
            "  (image) => image.getAttribute('src'))"
        )
        content = json.loads(self.one("#study").get_property("textContent"))
        return [
            {token for token, files in content["pictures"].items() if files == [url]}
            for url in shown
        ]


def best(key, sides):
    """The key to press: for the okapi, the intact set, or neither of two equal ones."""
    (run,) = key["runs"]
    for trial in run["trials"].values():
        for left, right in itertools.permutations(trial["sets"]):
            if left in sides[0] and right in sides[1]:
                if trial["kind"] == "identical":
                    return Keys.DOWN
                return Keys.LEFT if left == (trial["answer"] or of(trial, "okapi")) else Keys.RIGHT
    raise AssertionError(sides)


def of(trial, system):
    return next(token for token, name in trial["sets"].items() if name == system)
