"""What a person does with the server's page and sees on it, in Chromium without a window, driven through WebDriver."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from balcony_runtime.serve.http.server import Server

pytest.importorskip("selenium")  # `make test` installs it; tests import its names from here, where they are skipped
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
#: Script that gives what stands before an element without being part of its text.
MARK = "return getComputedStyle(arguments[0], '::before').content"
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or BROWSER is None or DRIVER is None,
        reason="no browser: apt-get install chromium chromium-driver",
    ),
]
PAGE_SECONDS = 60


def complaints(browser: Chrome) -> list[str]:
    """Warnings and errors on the page's console since the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def until(browser: Chrome, found: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, PAGE_SECONDS, poll_frequency=0.02).until(lambda _: found())


def chats(browser: Chrome) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, "#chats section")


def part(chat: WebElement, name: str) -> WebElement:
    return chat.find_element(By.CLASS_NAME, name)


def ask(chat: WebElement, text: str) -> None:
    part(chat, "text").send_keys(text, Keys.ENTER)


def choose(chat: WebElement, name: str) -> None:
    part(chat, "model").find_element(By.CSS_SELECTOR, f"option[value='{name}']").click()


def tokens(chat: WebElement) -> list[WebElement]:
    return chat.find_elements(By.CSS_SELECTOR, ".answer span")


def ended(chat: WebElement) -> bool:
    return part(chat, "send").is_enabled()


def slide(browser: Chrome, slider: WebElement, value: int) -> None:
    """Move a slider as a person does: its value changes, and the page hears of it."""
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
    browser.execute_script(script, slider, value)


def held_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold prompts back until the event that is returned is set."""
    gate, encode = threading.Event(), server.service.llm.encode

    def slowly(*args: Any, **options: Any) -> list[int]:
        assert gate.wait(60)
        return encode(*args, **options)

    monkeypatch.setattr(server.service.llm, "encode", slowly)
    return gate
