"""A headless Chromium that a test drives, and what it has said and asked for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromium-driver, Debian's packages"
)
_FLAGS = (
    *("--headless", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--hide-scrollbars"),
)


class Browser:
    """One window, whose pages are waited for."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def look(self, *, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Give the window a size, also one that is narrower than Chromium's own, and a scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, page: Path) -> None:
        self.driver.get(page.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def settled(self) -> None:
        """Wait until what the page has to draw is drawn."""
        problem = self.driver.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            const moment = () => new Promise((next) => setTimeout(next, 50));
            const isSeen = (chart) => {
              const { top, bottom } = chart.getBoundingClientRect();
              return bottom > 0 && top < innerHeight && chart.checkVisibility();
            };
            (async () => {
              // That a chart has come into the window is told when the browser finds the time.
              const seen = [...document.querySelectorAll(".chart")].filter(isSeen);
              while (!seen.every((chart) => chart.dataset.drawn)) await moment();
              for (let last = null; last !== report.working;) await (last = report.working);
            })().then(() => done(null), (error) => done(String(error)));
            """
        )
        assert problem is None, f"{problem}: {self.said()}"

    def said(self) -> list[str]:
        """Return the warnings and errors of the console since the last time."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]

    def requested(self) -> list[str]:
        """Return the addresses that were asked for since the last time."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Give a browser with a profile of its own, which ends with the block."""
    options = Options()
    options.binary_location = CHROMIUM or ""
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.set_script_timeout(100)
        driver.set_page_load_timeout(100)
        yield Browser(driver)
    finally:
        driver.quit()
