"""Chromium at the rating page, for test_page_in_browser.py."""

import contextlib
import hashlib
import os
import pathlib
import shutil

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from imagen_jax.evals.rating import page
from tests.evals.rating import shown_studies

OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
)
# The page reads a clock that only the test moves: response times have known values.
CLOCK = "window.clock = 0; performance.now = () => window.clock;"


@contextlib.contextmanager
def driver(profile):
    """A browser with the directory `profile` of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*OPTIONS.split(), f"--user-data-dir={profile}"):
        options.add_argument(option)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as driver:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": CLOCK})
        yield driver


class Rater:
    """A person at the page of one study."""

    def __init__(self, driver, folder, study):
        name = hashlib.sha256(str(folder).encode()).hexdigest()
        self.driver, self.folder, self.study = driver, folder, {**study, "study": name}
        shown_studies.write_pictures(folder, study)
        (folder / "page.html").write_bytes(page.render(self.study))
        downloads = {"behavior": "allow", "downloadPath": str(folder / "downloads")}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)

    def open(self, query=""):
        self.driver.get((self.folder / "page.html").as_uri() + query)

    def open_again(self, query, selector):
        """Opens the page of a rater with answers, as often as three times, until it shows them.

        Chromium on a loaded machine may give a new page what is stored only at a reload.
        """
        for _ in range(3):
            self.open(query)
            with contextlib.suppress(TimeoutException):
                return WebDriverWait(self.driver, 5).until(lambda _: self.all(selector))
        pytest.fail(f"no {selector}; the page says: {self.text('body')}")

    def start(self, query="?rater=1"):
        self.open(query)
        self.press(Keys.ENTER)
        self.wait_for("#trial[data-state=ready]")

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def script(self, text):
        return self.driver.execute_script(text)

    def wait_for(self, selector):
        try:
            WebDriverWait(self.driver, 20).until(lambda _: self.all(selector))
        except TimeoutException:
            pytest.fail(f"no {selector} in 20 s; the page says: {self.text('body')}")

    def answer(self, key, ms=0):
        """Answers the question that is asked, `ms` after it could first be answered."""
        self.wait_for("#trial[data-state=ready]")
        self.script(f"window.clock += {ms}")
        self.press(key)

    def shown(self):
        """The tokens of the sides, from the left."""
        return self.script(
            "return [...document.querySelectorAll('#sides .side')].map("
            "  (side) => side.querySelector('img').getAttribute('src').match(/(\\d+)_0/)[1])"
        )

    def downloaded(self):
        """The records of the only file in the download folder, and its name. Deletes the file."""
        folder = self.folder / "downloads"
        files = lambda _: list(folder.glob("*.jsonl"))
        (file,) = WebDriverWait(self.driver, 20).until(files)
        records = shown_studies.parse_records(file.read_text(encoding="utf-8"))
        file.unlink()
        return file.name, records

    def resize(self, width, height):
        """Sets the size of the page; windows themselves are at least 500 pixels wide."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def screenshot(self, name):
        if folder := os.environ.get("RATING_SCREENSHOTS"):
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(f"{folder}/{name}.png")
