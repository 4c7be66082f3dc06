"""The server's page in a real browser, used as a person would use it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from balcony_edge.device.readings import Reading
from balcony_runtime.serve.http.server import Server
from tests.serve.conftest import with_template
from tests.serve.page.steps import (
    MARK,
    MARKS,
    By,
    Chrome,
    Keys,
    ask,
    chats,
    choose,
    complaints,
    ended,
    held_back,
    part,
    slide,
    tokens,
    until,
)
from tests.serve.test_reach import THINKS

pytestmark = MARKS


def test_a_reply_in_the_colours_of_its_exits(page: Chrome, http: httpx.Client) -> None:
    (chat,) = chats(page)
    assert [item.text.split(",")[0] for item in page.find_elements(By.CSS_SELECTOR, "#legend li")] == [
        "■ exit 2",
        "■ exit 3",
        "■ exit 5 (full depth)",
    ]
    assert page.switch_to.active_element == part(chat, "text") and page.execute_script("return scrollY") == 0
    assert not page.find_element(By.ID, "key").is_displayed()
    ask(chat, "hello")
    until(page, lambda: tokens(chat) and ended(chat))
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    want = http.post("/v1/chat/completions", json=body).json()
    text = want["choices"][0]["message"]["content"]
    assert part(chat, "answer").get_property("textContent") == text
    assert part(chat, "status-text").get_property("textContent") == f"Reply: {text}"
    assert (
        part(chat, "exit").text == "5"
        and part(chat, "target").text == "none"
        and part(chat, "gap").text.endswith(" ms")
    )
    colours = {token.value_of_css_property("color") for token in tokens(chat)}
    legend = page.find_elements(By.CSS_SELECTOR, "#legend li")
    assert colours == {legend[2].value_of_css_property("color")}
    cost = part(chat, "cost").text
    assert cost.startswith(f"Tokens: {want['usage']['completion_tokens']} at exit 5. The first after ")
    assert ("context is full" in cost) == (want["choices"][0]["finish_reason"] == "length")
    drawn = "const c = arguments[0]; return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)"
    assert page.execute_script(drawn, part(chat, "strip"))


def test_the_slider_acts_on_the_running_reply(page: Chrome) -> None:
    (chat,) = chats(page)
    choose(chat, "tiny:slow")
    ask(chat, "a long story")
    until(page, lambda: len(tokens(chat)) > 3)
    slide(page, part(chat, "slider"), 20)
    asked = part(chat, "asked").text
    assert asked.endswith(" ms") and part(chat, "slider").get_attribute("aria-valuetext") == asked
    until(page, lambda: part(chat, "target").text == asked)
    until(page, lambda: ended(chat))
    told = [token.get_attribute("title").split(",")[0] for token in tokens(chat)]
    assert told[:3] == ["exit 3"] * 3 and set(told) != {"exit 3"} and not chat.find_elements(By.CLASS_NAME, "error")


def test_the_last_place_of_a_slider_wins(page: Chrome, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the server takes longer for an earlier one: the page sends one budget after the other."""
    (chat,) = chats(page)
    choose(chat, "tiny:slow")
    ask(chat, "a long story")
    until(page, lambda: tokens(chat))
    rebudget, calls = server.service.rebudget, []

    async def slow_at_first(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            await asyncio.sleep(0.6)
        return await rebudget(*args, **options)

    monkeypatch.setattr(server.service, "rebudget", slow_at_first)
    slide(page, part(chat, "slider"), 99)
    until(page, lambda: calls)
    slide(page, part(chat, "slider"), 98)
    until(page, lambda: len(calls) == 2)
    until(page, lambda: part(chat, "target").text == part(chat, "asked").text)
    time.sleep(0.7)
    assert part(chat, "target").text == part(chat, "asked").text and len(calls) == 2
    part(chat, "stop").click()
    until(page, lambda: ended(chat))


def test_a_slider_that_is_moved_before_the_first_token_counts(page: Chrome, server: Server, monkeypatch: Any) -> None:
    (chat,) = chats(page)
    choose(chat, "tiny:slow")
    gate = held_back(server, monkeypatch)
    ask(chat, "a long story")
    slide(page, part(chat, "slider"), 20)
    asked = part(chat, "asked").text
    time.sleep(0.2)  # the page has sent what it sends by itself
    gate.set()
    until(page, lambda: part(chat, "target").text == asked)
    part(chat, "stop").click()
    until(page, lambda: ended(chat))
    assert not chat.find_elements(By.CLASS_NAME, "error")


def test_the_end_of_a_slider_says_what_the_name_asks_for(page: Chrome) -> None:
    (chat,) = chats(page)
    assert part(chat, "asked").text == "no target"
    choose(chat, "tiny:voice")
    assert part(chat, "asked").text == part(chat, "slider").get_attribute("aria-valuetext") == "30 ms, by the name"


@pytest.mark.parametrize("name", ["tiny:shallow", "tiny:slow"])
def test_a_target_replaces_the_fixed_exit_of_a_name(page: Chrome, name: str) -> None:
    """Also if the slider is moved before the question."""
    (chat,) = chats(page)
    choose(chat, name)
    slide(page, part(chat, "slider"), 99)
    ask(chat, "hello")
    until(page, lambda: tokens(chat) and ended(chat))
    assert part(chat, "target").text == part(chat, "asked").text
    assert not chat.find_elements(By.CLASS_NAME, "error")


def test_stop_ends_the_reply(page: Chrome, server: Server) -> None:
    (chat,) = chats(page)
    choose(chat, "tiny:slow")
    ask(chat, "a long story")
    until(page, lambda: tokens(chat))
    assert not ended(chat)
    part(chat, "stop").click()
    until(page, lambda: ended(chat) and not server.service.slots)
    assert page.switch_to.active_element == part(chat, "text") and not chat.find_elements(By.CLASS_NAME, "cost")
    made = len(tokens(chat))
    ask(chat, "go on")  # the conversation goes on after what was made
    until(page, lambda: len(tokens(chat)) > made)
    part(chat, "clear").click()
    until(page, lambda: ended(chat))
    assert part(chat, "status-text").get_property("textContent") == "Cleared."
    assert part(chat, "exit").text == "–" and part(chat, "why").text == "" == part(chat, "text").get_property("value")


def test_a_question_that_is_stopped_before_its_reply_goes_back_to_its_field(
    page: Chrome, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (chat,) = chats(page)
    gate = held_back(server, monkeypatch)
    ask(chat, "my name is Ada")
    part(chat, "text").send_keys("and I am")  # the next question, already
    part(chat, "stop").click()
    until(page, lambda: ended(chat))
    gate.set()
    assert part(chat, "text").get_property("value") == "my name is Ada\nand I am"
    assert not part(chat, "log").find_elements(By.TAG_NAME, "p")


def test_the_log_follows_the_reply_unless_its_reader_scrolls_up(page: Chrome) -> None:
    (chat,) = chats(page)
    choose(chat, "tiny:slow")
    log = part(chat, "log")
    page.execute_script("arguments[0].style = 'height: 60px; width: 90px'", log)
    below = "const log = arguments[0]; return log.scrollHeight - log.scrollTop - log.clientHeight"
    ask(chat, "a long story")
    until(page, lambda: page.execute_script("return arguments[0].scrollHeight", log) > 300)
    assert page.execute_script(below, log) < 80
    page.execute_script("arguments[0].scrollTop = 0", log)
    before = len(tokens(chat))
    until(page, lambda: len(tokens(chat)) > before + 5)
    assert page.execute_script("return arguments[0].scrollTop", log) == 0
    part(chat, "clear").click()
    until(page, lambda: ended(chat))
    assert part(chat, "status-text").get_property("textContent") == "Cleared."
    ask(chat, "another story")
    until(page, lambda: page.execute_script("return arguments[0].scrollHeight", log) > 300)
    assert page.execute_script(below, log) < 80
    part(chat, "stop").click()
    until(page, lambda: ended(chat))


def test_the_end_of_a_reply_does_not_move_its_reader(page: Chrome) -> None:
    (chat,) = chats(page)
    choose(chat, "tiny:slow")
    log = part(chat, "log")
    page.execute_script("arguments[0].style = 'height: 60px; width: 90px'", log)
    ask(chat, "a long story")
    until(page, lambda: page.execute_script("return arguments[0].scrollHeight", log) > 300)
    page.execute_script("arguments[0].scrollTop = 0", log)
    choose(chat, "tiny")  # without a pace, the end comes soon
    until(page, lambda: ended(chat))
    assert part(chat, "cost") and page.execute_script("return arguments[0].scrollTop", log) == 0


def test_a_token_that_is_tapped_says_why(page: Chrome) -> None:
    (chat,) = chats(page)
    ask(chat, "hello")
    until(page, lambda: tokens(chat) and ended(chat))
    token = next(one for one in tokens(chat) if one.text.strip())
    token.click()
    assert part(chat, "why").text == token.get_attribute("title") != ""
    log, shown = part(chat, "log"), tokens(chat)
    for key, place in ((Keys.ARROW_LEFT, -1), (Keys.ARROW_LEFT, -2), (Keys.ARROW_RIGHT, -1), (Keys.ARROW_RIGHT, -1)):
        log.send_keys(key)
        assert part(chat, "why").text == shown[place].get_attribute("title")
        assert page.execute_script("return getSelection().anchorNode === arguments[0]", shown[place])
        assert shown[place].get_attribute("title") in part(chat, "status-text").get_property("textContent")
    for modifier in ("alt", "ctrl", "meta", "shift"):  # back to the page before, or a longer selection
        options = f"{{key: 'ArrowLeft', {modifier}Key: true, cancelable: true}}"
        assert page.execute_script(f"return arguments[0].dispatchEvent(new KeyboardEvent('keydown', {options}))", log)


def test_the_strip_is_drawn_anew_after_the_window_has_changed(page: Chrome) -> None:
    (chat,) = chats(page)
    fits = "const c = arguments[0]; return c.width === Math.floor(c.clientWidth * devicePixelRatio)"
    for width in (700, 1100):
        page.set_window_size(width, 900)
        until(page, lambda: page.execute_script(fits, part(chat, "strip")))


def told(page: Chrome, *pieces: tuple[dict[str, str], dict[str, Any]]) -> Any:
    """The chat after a reply of these pieces: the delta of each, and what is said of its token."""
    said: dict[str, Any] = {"exit": 5, "latency_ms": 1.0, "target_ms": None, "pending_rows": 0, "reason": ""}
    said |= {"slots": [0], "tokens_per_exit": {"5": 4}, "ttft_ms": 1.0, "mean_tpot_ms": 1.0, "late_tokens": None}
    events = ""
    for place, (delta, facts) in enumerate(pieces, 1):
        choice = {"delta": delta, "finish_reason": "stop" if place == len(pieces) else None}
        events += f"data: {json.dumps({'choices': [choice], 'balcony': said | facts})}\n\n"
    page.execute_script("const events = arguments[0]; window.fetch = async () => new Response(events)", events)
    (chat,) = chats(page)
    ask(chat, "hello")
    until(page, lambda: chat.find_elements(By.CLASS_NAME, "cost") and ended(chat))
    return chat


def test_who_speaks_and_which_exit_is_told_without_colours(page: Chrome) -> None:
    late = {"exit": 5, "latency_ms": 20.0, "target_ms": 10.0}
    pieces = [({"content": text}, facts) for text, facts in (("a", {"exit": 2}), ("b", {"exit": 2}), ("c", late))]
    chat = told(page, *pieces, ({"content": "d"}, late))
    assert page.execute_script(MARK, part(chat, "you")) == '"You: "'
    assert page.execute_script(MARK, part(chat, "answer")) == '"Reply: "'
    assert [token.get_attribute("data-exit") for token in tokens(chat)] == ["2", None, "5", None]
    assert tokens(chat)[2].get_attribute("title") == "exit 5, 20.0 ms, late: target 10 ms. "
    assert "late" not in tokens(chat)[1].get_attribute("title")
    keys = page.find_element(By.ID, part(chat, "log").get_attribute("aria-describedby"))
    assert "arrow keys" in keys.text
    assert page.execute_script(MARK, tokens(chat)[2]) == "none"
    features = [{"name": "prefers-contrast", "value": "more"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    assert page.execute_script(MARK, tokens(chat)[2]) == '"5"'
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_target_is_seen_on_the_bar_of_a_late_token(page: Chrome) -> None:
    late = {"latency_ms": 20.0, "target_ms": 10.0}
    chat = told(page, *[({"content": text}, late) for text in "abc"])
    column = (  # of the second bar, from a little below its top
        "const c = arguments[0], s = devicePixelRatio, x = Math.round(5 * s), y = Math.round(c.height / 4);"
        "const p = c.getContext('2d').getImageData(x, y, 1, c.height - y).data.filter((_, at) => at % 4 === 0);"
        "return Math.max(...p) - Math.min(...p)"
    )
    assert page.execute_script(column, part(chat, "strip")) > 100  # of 255


def test_an_answer_is_apart_from_its_thought(page: Chrome) -> None:
    deltas = ({"reasoning_content": "Blue."}, {"content": ""}, {"content": "It is"}, {"content": " blue."})
    chat = told(page, *[(delta, {}) for delta in deltas])
    assert part(chat, "answer").get_property("textContent") == "Blue.\n\nIt is blue."
    assert part(chat, "status-text").get_property("textContent") == "Reply: It is blue."
    thought = part(chat, "thought")  # paler, it would have too little contrast
    assert thought.value_of_css_property("opacity") == "1" and thought.value_of_css_property("font-style") == "italic"


def test_text_from_right_to_left_ends_at_the_left(page: Chrome) -> None:
    (chat,) = chats(page)
    assert part(chat, "text").value_of_css_property("unicode-bidi") == "plaintext"
    page.execute_script("window.fetch = () => new Promise(() => {})")
    ask(chat, "\u05e9\u05dc\u05d5\u05dd.")
    places = """
        const range = document.createRange(), text = arguments[0].firstChild;
        return [0, 4].map(at => {
          range.setStart(text, at); range.setEnd(text, at + 1);
          return range.getBoundingClientRect().left;
        });"""
    letter, stop = page.execute_script(places, part(chat, "you"))
    assert stop < letter


def test_enter_that_ends_a_conversion_sends_nothing(page: Chrome) -> None:
    """Safari's keydown comes after the end of the composition, with the key code 229 (WebKit bug 165004)."""
    (chat,) = chats(page)
    part(chat, "text").send_keys("nihon")
    press = "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true}))"
    page.execute_script(press, part(chat, "text"))
    assert not chat.find_elements(By.CLASS_NAME, "you") and part(chat, "text").get_property("value") == "nihon"


def test_chats_next_to_each_other(page: Chrome) -> None:
    page.find_element(By.ID, "add").click()
    one, other = chats(page)
    assert page.switch_to.active_element == part(other, "text")
    ask(one, "hello")
    ask(other, "hello")
    until(page, lambda: tokens(one) and tokens(other) and ended(one) and ended(other))
    assert part(one, "answer").text == part(other, "answer").text
    part(other, "clear").click()
    assert not tokens(other) and tokens(one)
    part(other, "close").click()
    assert chats(page) == [one] and page.switch_to.active_element == page.find_element(By.ID, "add")


def test_the_end_of_a_reply_takes_no_focus_from_another_chat(page: Chrome) -> None:
    page.find_element(By.ID, "add").click()
    one, other = chats(page)
    for chat in (one, other):
        choose(chat, "tiny:slow")
    ask(other, "a long story")
    part(one, "text").send_keys("a long story")
    part(one, "send").click()  # it is disabled now, and nothing has the focus
    until(page, lambda: tokens(one))
    faster = "arguments[0].value = 'tiny'; arguments[0].dispatchEvent(new Event('change'))"
    page.execute_script(faster, part(other, "model"))
    until(page, lambda: ended(other))
    assert page.switch_to.active_element != part(other, "text") and not ended(one)
    page.execute_script(faster, part(one, "model"))
    until(page, lambda: ended(one))
    assert page.switch_to.active_element == part(one, "text")


def test_one_connection_is_left_for_the_sliders(page: Chrome) -> None:
    """Browsers open six HTTP/1.1 connections to a server, and every running reply has one."""
    add = page.find_element(By.ID, "add")
    for number in range(2, 6):
        assert add.is_enabled()
        add.click()
        assert len(chats(page)) == number
    assert not add.is_enabled()
    part(chats(page)[-1], "close").click()
    assert add.is_enabled() and page.switch_to.active_element == add


def test_watts_where_a_sensor_measures_them(browser: Chrome, serve: Callable[..., Server]) -> None:
    def readings() -> tuple[Reading, ...]:
        return (Reading("ina3221:VDD_IN", "board", time.monotonic(), watts=20.0),)

    browser.get(serve(readings=readings).url)
    (chat,) = until(browser, lambda: chats(browser))
    assert part(chat, "watts").is_displayed() and part(chat, "watts-asked").text == "no ceiling"
    slide(browser, part(chat, "watts"), 99)
    assert part(chat, "watts-asked").text == "80 W" and part(chat, "for-watts").text == "Watts (board)"
    slide(browser, part(chat, "watts"), 0)
    saver = part(chat, "model").find_element(By.CSS_SELECTOR, "option[value$=':saver']")
    saver.click()  # a file with joules, on the rail that is the default
    assert part(chat, "watts-asked").text == "2 W" and part(chat, "for-watts").text == "Watts (board)"
    ask(chat, "hello")
    until(browser, lambda: tokens(chat) and ended(chat))
    assert "ceilings" in part(chat, "why").text
    assert complaints(browser) == []


def test_nothing_is_wider_than_a_phone(page: Chrome) -> None:
    page.set_window_size(500, 844)  # the narrowest window that Chromium makes
    width = "return [document.documentElement.scrollWidth, innerWidth]"
    wide, seen = page.execute_script(width)
    assert wide <= seen
    sizes = (
        "return [...document.querySelectorAll('button, select, textarea')].map(e => e.getBoundingClientRect().height)"
    )
    assert min(page.execute_script(sizes)) >= 44  # large enough for a finger (WCAG 2.5.5)
    size = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        wide, seen = page.execute_script(width)
        assert wide <= seen == 320
        (chat,) = chats(page)
        tops = []
        for words in (10, 75):  # a longer reason moves nothing under the finger
            page.execute_script("arguments[0].textContent = arguments[1]", part(chat, "why"), "x " * words)
            tops.append(page.execute_script("return arguments[0].getBoundingClientRect().top", part(chat, "stop")))
        assert tops[0] == tops[1]
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    unnamed = "return [...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).length"
    assert page.execute_script(unnamed) == 0


def test_a_thought_is_shown_and_is_no_reply(
    browser: Chrome, serve: Callable[..., Server], tiny: Any, tmp_path: Path
) -> None:
    """The tiny model never ends its thought; the question goes back to its field."""
    thinker = serve(path=with_template(tiny.path, tmp_path, THINKS), name="tiny")
    browser.get(thinker.url)
    (chat,) = until(browser, lambda: chats(browser))
    ask(chat, "hello")
    until(browser, lambda: tokens(chat) and ended(chat))
    assert any("thought" in token.get_attribute("class") for token in tokens(chat))
    assert part(chat, "error").text == "The reply ended within its thought."
    assert part(chat, "text").get_property("value") == "hello" and complaints(browser) == []
