"""The page when something goes wrong: refusals, keys, restarts, and servers that have gone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from balcony_edge.budget import Budget
from balcony_runtime.serve.http.server import Server
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
    part,
    tokens,
    until,
)

pytestmark = MARKS


def test_a_refused_message_can_be_sent_again(page: Chrome, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (chat,) = chats(page)
    monkeypatch.setattr(server.service, "draining", True)
    ask(chat, "hello")
    until(page, lambda: chat.find_elements(By.CLASS_NAME, "error"))
    assert part(chat, "text").get_property("value") == "hello"
    assert part(chat, "status-text").get_property("textContent") == "Error: the server is stopping: use another one"
    assert not chat.find_elements(By.CLASS_NAME, "you")  # the model has not heard of it
    assert page.switch_to.active_element == part(chat, "text")
    assert all(" 503 " in complaint for complaint in complaints(page))


def test_an_empty_reply_is_told_and_its_question_can_be_sent_again(page: Chrome) -> None:
    (chat,) = chats(page)
    piece = '{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"balcony":{"exit":null}}'
    page.execute_script(
        "window.fetch = async () => new Response(`data: ${arguments[0]}\\n\\ndata: [DONE]\\n\\n`)", piece
    )
    ask(chat, "hello")
    until(page, lambda: chat.find_elements(By.CLASS_NAME, "error") and ended(chat))
    assert "the model ended it at once" in part(chat, "error").text
    assert part(chat, "text").get_property("value") == "hello" and not chat.find_elements(By.CLASS_NAME, "you")


def test_a_reply_that_is_cut_off_is_told(page: Chrome) -> None:
    """As behind a proxy: the stream ends as usual, without a finish reason of the reply."""
    (chat,) = chats(page)
    piece = '{"choices":[{"index":0,"delta":{"content":"Blu"},"finish_reason":null}],"balcony":{"exit":null}}'
    page.execute_script("window.fetch = async () => new Response(`data: ${arguments[0]}\\n\\n`)", piece)
    ask(chat, "hello")
    until(page, lambda: chat.find_elements(By.CLASS_NAME, "you") and ended(chat))
    assert "cut off" in part(chat, "error").text and "cut off" in part(chat, "status-text").get_property("textContent")


def test_a_server_that_has_gone_is_named(page: Chrome) -> None:
    (chat,) = chats(page)
    page.execute_script("window.fetch = async () => { throw new TypeError('Failed to fetch') }")
    ask(chat, "hello")
    until(page, lambda: chat.find_elements(By.CLASS_NAME, "error") and ended(chat))
    assert part(chat, "error").text == "The server does not answer: Failed to fetch"


def test_a_model_that_loads_is_no_error(browser: Chrome, serve: Callable[..., Server]) -> None:
    server = serve()
    loaded, server.service._loaded = server.service._loaded, None
    browser.get(server.url)
    until(browser, lambda: "The model is loading" in browser.find_element(By.ID, "trouble").text)
    server.service._loaded = loaded
    until(browser, lambda: chats(browser))
    assert browser.find_element(By.ID, "trouble").text == ""
    assert all(" 503 " in complaint for complaint in complaints(browser))


@pytest.mark.parametrize(("body", "status", "told"), [("", 502, "HTTP 502"), ("<p>Sign in</p>", 200, "Unexpected")])
def test_a_proxy_without_its_server_is_asked_again(page: Chrome, body: str, status: int, told: str) -> None:
    answer = "{ window.fetch = real; return new Response(arguments[0], {status: arguments[1]}) }"
    page.execute_script(f"const real = fetch; window.fetch = async () => {answer}; return load()", body, status)
    trouble = page.find_element(By.ID, "trouble")
    assert trouble.text.startswith("The server does not answer: ") and told in trouble.text
    until(page, lambda: trouble.text == "")


def test_a_budget_that_was_read_again_counts(page: Chrome, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page knows the keys of the file as it was."""
    (chat,) = chats(page)
    choose(chat, "tiny:shallow")
    again = {**server.service.names.budgets, "tiny:shallow": Budget(tpot_ms=1000.0)}
    monkeypatch.setattr(server.service.names, "budgets", again)
    ask(chat, "hello")
    until(page, lambda: ended(chat))
    assert not chat.find_elements(By.CLASS_NAME, "error") and part(chat, "target").text == "1000 ms"


def test_errors_are_shown(page: Chrome) -> None:
    (chat,) = chats(page)
    choose(chat, "tiny:strict")
    ask(chat, "hello")
    until(page, lambda: chat.find_elements(By.CLASS_NAME, "error") and ended(chat))
    assert "tpot_ms = 1e-06" in part(chat, "error").text and not tokens(chat)
    # An error has the colour of the shallowest exit.
    assert page.execute_script(MARK, part(chat, "error")) == '"Error: "'
    assert [
        entry["message"].split(" ")[0] for entry in page.get_log("browser")
    ]  # the browser itself reports the status 422


def test_a_key_is_asked_for(browser: Chrome, serve: Callable[..., Server]) -> None:
    browser.get(serve(api_key="secret").url)
    until(browser, lambda: "key" in browser.find_element(By.ID, "trouble").text.lower())
    assert not chats(browser)
    browser.find_element(By.ID, "key").send_keys("wrong, \u043a\u043b\u044e\u0447", Keys.TAB)  # no header may have it
    until(browser, lambda: "not the server's key" in browser.find_element(By.ID, "trouble").text)
    key = browser.find_element(By.ID, "key")
    assert key.get_attribute("aria-invalid") == "true" and key.get_attribute("aria-describedby") == "trouble"
    told_again = "window.told = 0; new MutationObserver(() => window.told++).observe(arguments[0], {childList: true})"
    browser.execute_script(told_again, browser.find_element(By.ID, "trouble"))
    key.send_keys(" too", Keys.TAB)
    until(browser, lambda: browser.execute_script("return window.told") > 1)
    assert "not the server's key" in browser.find_element(By.ID, "trouble").text
    key.clear()
    key.send_keys("secret", Keys.TAB)
    until(browser, lambda: chats(browser))
    assert browser.find_element(By.ID, "trouble").text == "" and key.get_attribute("aria-invalid") is None
    assert "401" in complaints(browser)[0]


def test_exits_of_another_bundle_are_learned(page: Chrome) -> None:
    """As of a server that was started again under the same name."""
    (chat,) = chats(page)
    page.execute_script("props.exits = [{exit: 4, ms: 1, agreement: null}]")
    ask(chat, "hello")
    until(page, lambda: ended(chat))
    until(page, lambda: page.execute_script("return props.exits.map(one => one.exit)") == [2, 3, 5])


def test_other_names_are_offered(page: Chrome, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a server that was started again with another model, which does not know the name that was chosen."""
    (chat,) = chats(page)
    monkeypatch.setattr(server.service.names, "budgets", {"other": Budget()})
    ask(chat, "hello")
    until(page, lambda: part(chat, "model").get_property("value") == "other" and ended(chat))
    assert "there is no such model" in part(chat, "error").text
    assert all(" 404 " in complaint for complaint in complaints(page))
    ask(chat, "")  # the question is in its field again
    until(page, lambda: tokens(chat) and ended(chat))
