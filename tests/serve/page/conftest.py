"""A real browser, and the page of the server that most tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from balcony_runtime.serve.http.server import Server

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


@pytest.fixture(scope="package")
def browser() -> Iterator[Chrome]:
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    from tests.serve.page.steps import BROWSER, DRIVER

    options = ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options, ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture
def page(browser: Chrome, server: Server) -> Iterator[Chrome]:
    """The page after it has loaded, in a window of a laptop's size. It writes nothing on the console in any test."""
    from tests.serve.page.steps import chats, complaints, until

    browser.set_window_size(1200, 900)
    browser.get(server.url)
    until(browser, lambda: chats(browser))
    yield browser
    assert complaints(browser) == []
