"""Text in and out: prompts, the chat template in its sandbox, and stop strings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Tokenizer, normalizers, processors

import balcony_edge
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import BundleError, InputError
from balcony_runtime.telling import StopStrings
from balcony_runtime.text.codec import TextCodec
from balcony_runtime.text.template import ChatTemplate
from tests.support.properties import examples
from tests.support.templates import manifest_of, write_template


@pytest.fixture(scope="module")
def codec(tiny: Any) -> TextCodec:
    return TextCodec(Bundle.open(tiny.path))


def test_a_text_becomes_a_users_message(codec: TextCodec) -> None:
    assert codec.has_chat_template
    assert codec.decode(codec.encode("the fox")) == "<user>the fox\n<assistant>"
    assert codec.decode(codec.encode("the fox", chat=False)) == "the fox"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    assert codec.decode(codec.encode(messages)) == "<system>be brief\n<user>why?\n<assistant>"


def test_ids_are_those_of_transformers(codec: TextCodec, tiny: Any) -> None:
    for text in ("the quick brown fox", "Käse 牛乳 🦊", "  two  spaces\n\n", "1234567890"):
        assert codec.encode(text, chat=False) == tiny.tokenizer(text, add_special_tokens=True).input_ids
        chat = [{"role": "user", "content": text}]
        rendered = tiny.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert codec.encode(chat) == tiny.tokenizer(rendered, add_special_tokens=False).input_ids


def test_a_reader_of_the_format_page_makes_the_same_prompts(bundle_copy: Path) -> None:
    """With jinja2, tokenizers and the rules of the page: here a second start token is the usual mistake."""
    page = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    rules = re.sub(r"\s+", " ", page.partition("\n## Text\n")[2].partition("\n## ")[0])
    assert "the result is encoded without special tokens" in rules and "encoded with the special tokens" in rules
    named = re.findall(r"`([\w.]+)`", rules.partition("Its variables are ")[2])
    assert named[:5] == ["messages", "add_generation_prompt", "tools", "documents", "special_tokens.json"]
    file = bundle_copy / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    start = ("<end>", tokenizer.token_to_id("<end>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[start])
    file.write_text(tokenizer.to_str())
    source = (
        "{% if tools is none and documents is none %}\n  {{ eos_token }}\n{%- endif %}\n"
        "{% for m in messages %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    codec = write_template(bundle_copy, source)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    special = json.loads((bundle_copy / "special_tokens.json").read_text())
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    for prompt, told in ((messages, messages), ("the fox", [{"role": "user", "content": "the fox"}])):
        text = environment.from_string(source).render(
            messages=told, add_generation_prompt=True, tools=None, documents=None, **special
        )
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert codec.encode(prompt) == ids and ids.count(start[1]) == 1
    assert codec.encode("the fox", chat=False) == tokenizer.encode("the fox", add_special_tokens=True).ids


@pytest.mark.parametrize("prompt", ["", "  \n\t", []])
def test_empty_prompts_are_refused(codec: TextCodec, prompt: Any) -> None:
    with pytest.raises(InputError, match=r"empty|no messages"):
        codec.encode(prompt)


def test_a_prompt_that_becomes_no_token_is_refused(bundle_copy: Path) -> None:
    file = bundle_copy / "tokenizer.json"
    tokenizer = Tokenizer.from_str(file.read_text())
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    file.write_text(tokenizer.to_str())
    with pytest.raises(InputError, match="the tokenizer makes no token of it"):
        TextCodec(Bundle(bundle_copy, manifest_of(bundle_copy))).encode("\u200b", chat=False)


@pytest.mark.parametrize("messages", [[{"role": "user"}], ["text"], [{"content": "x"}], [7.5]])
def test_messages_that_are_none_are_refused(codec: TextCodec, messages: Any) -> None:
    with pytest.raises(InputError, match="must be a mapping with 'role' and 'content'"):
        codec.encode(messages)


def test_a_content_of_parts_is_their_text(codec: TextCodec) -> None:
    """A template would print the list as Python prints it, with brackets and quotes."""
    parts = [{"type": "text", "text": "the fox"}, {"type": "text", "text": "the dog"}]
    told = codec.encode([{"role": "user", "content": "the fox\nthe dog"}])
    assert codec.encode([{"role": "user", "content": parts}]) == told


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ([{"type": "image", "url": "x"}], "a list may hold only texts, such as {'type': 'text', 'text': '...'}"),
        ([{"type": "text"}], "a list may hold"),
        (["the fox"], "a list may hold"),
        (None, "message content = None: must be a text or a list of text parts"),
        (7, "message content = 7: must be a text"),
        ("a\udcff", "not valid UTF-8 at character 2"),
    ],
)
def test_contents_that_are_no_text_are_refused(codec: TextCodec, content: Any, pattern: str) -> None:
    with pytest.raises(InputError, match=re.escape(pattern)):
        codec.encode([{"role": "user", "content": content}])


def test_text_that_is_not_unicode_is_refused(codec: TextCodec) -> None:
    for chat in (None, False):
        with pytest.raises(InputError, match="the prompt is not valid UTF-8 at character 5: give it as UTF-8"):
            codec.encode("the \udcff", chat=chat)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("[1]", "must map names such as bos_token to texts"),
        ('{"messages": "x"}', "must map names"),
        ('{"bos_token": 1}', "must map names"),
        ("[" * 100_000, "not readable as JSON"),
        ("{", "not readable as JSON"),
    ],
    ids=["list", "messages", "number", "deep", "cut"],
)
def test_a_forged_table_of_special_tokens_is_named(bundle_copy: Path, content: str, pattern: str) -> None:
    (bundle_copy / "special_tokens.json").write_text(content)
    with pytest.raises(BundleError, match=rf"special_tokens\.json: {pattern}"):
        TextCodec(Bundle(bundle_copy, manifest_of(bundle_copy)))


def test_what_a_training_left_in_the_tokenizer_changes_no_prompt(bundle_copy: Path, codec: TextCodec) -> None:
    file = bundle_copy / "tokenizer.json"
    tokenizer = Tokenizer.from_str(file.read_text())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    file.write_text(tokenizer.to_str())
    changed = TextCodec(Bundle(bundle_copy, manifest_of(bundle_copy)))
    for text in ("the quick brown fox jumps over the lazy dog", "a"):
        assert changed.encode(text) == codec.encode(text)


@pytest.mark.parametrize(
    ("prompt", "chat", "before"),
    [
        ("hello", False, True),
        ("hello", None, False),
        ([{"role": "user", "content": "hello"}], None, False),
        ([7, 8], None, True),
        ([7, 8], True, False),
    ],
)
def test_the_reply_to_a_plain_text_goes_on_with_it(tiny: Any, prompt: Any, chat: bool | None, before: bool) -> None:
    seen: list[Any] = []
    with balcony_edge.load(tiny.path) as llm:
        stream = llm.codec.stream
        llm.codec.stream = lambda ids, **options: seen.append(list(ids)) or stream(ids, **options)
        llm.generate(prompt, chat=chat, max_new_tokens=1)
        assert seen == [llm.encode(prompt, chat=False) if prompt == "hello" and before else [7, 8] if before else []]


def test_a_template_gets_the_roles_that_it_knows(bundle_copy: Path) -> None:
    said = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]
    shown = "{% for m in messages %}{% if m.role in ['system', 'user'] %}{{ m.role }} {{ m.content }} {% endif %}{% endfor %}"
    text = write_template(bundle_copy, shown)
    assert text.decode(text.encode(said)).strip() == "system a user b"
    text = write_template(bundle_copy, shown.replace("'system', ", "'developer', "))
    assert text.decode(text.encode(said)).strip() == "developer a user b"
    without = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + shown  # Gemma 2's
    text = write_template(bundle_copy, without)
    assert text.decode(text.encode(said)).strip() == "user a\n\nb"


def test_templates_run_in_a_sandbox(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = [{"role": "user", "content": "x"}]
    for template in (
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ undefined_function() }}",
    ):
        with pytest.raises(InputError, match="the chat template refuses these messages"):
            write_template(bundle_copy, template).encode(message)
    forever = "{% for i in range(99999) %}{% for j in range(99999) %}"
    for template, pattern in (
        (forever + "{% endfor %}{% endfor %}", "took longer than 0.2 s"),
        (forever + "{% continue %}{% endfor %}{% endfor %}", "took longer than 0.2 s"),
        ("{{ 'x' * 5000000 }}", "a repetition is longer"),
        ("{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %}", "the text is longer"),
        ("{{ 9 ** 99999 }}", "a power of 99999"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ):
        with monkeypatch.context() as patched, pytest.raises(InputError, match=pattern):
            if "took longer" in pattern:
                patched.setattr("balcony_runtime.text.template.MAX_SECONDS", 0.2)
            write_template(bundle_copy, template).encode(message)
    with pytest.raises(BundleError, match=r"chat_template\.jinja: not readable"):
        write_template(bundle_copy, "{% for %}")
    # Tags of transformers: SmolLM3's template marks the assistant's words, others use break and continue in loops.
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
        "{% generation %}!{{ m.role }}{% endgeneration %}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
    )
    written = write_template(bundle_copy, template)
    said = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "a"), ("user", "b"))]
    assert written.decode(written.encode(said)) == "a!user"


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}x", "x"),
        ("{% if tools is defined %}x{% endif %}", "x"),
        (
            "{{ 'Knowledge cutoff: March 2024. Role: %s' % messages[0].role }}",
            "Knowledge cutoff: March 2024. Role: user",
        ),
        ("{{ 'In 2024 by {}'.format(messages[0].role) }}", "In 2024 by user"),
    ],
)
def test_templates_see_what_transformers_shows_them(bundle_copy: Path, template: str, shown: str) -> None:
    written = write_template(bundle_copy, template)
    assert written._render([{"role": "user", "content": "a"}], {}) == shown


#: Templates that take gigabytes in sandboxes that only bound single results, or none: doubling, widths, and sharing.
GREEDY = {
    "~": "{% set n = namespace(x='x' * 1000) %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "+": "{% set n = namespace(x='x' * 1000) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "+ of lists": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "join": "{% set x = 'x' * 3000000 %}{{ ([x] * 2000) | join }}",
    "join of a map": "{% set x = 'x' * 3000000 %}{{ range(2000) | map('replace', '1', x) | join | length }}",
    "str.join": "{% set x = 'x' * 3000000 %}{{ ''.join([x] * 2000) }}",
    "center": "{{ 'x' | center(2000000000) }}",
    "width after a bracket": "{{ '{0[}]:2000000000d}'.format({'}': 1}) }}",
    "computed width after a bracket": "{{ '{0[}]:{1}}'.format({'}': 1}, 2000000000) }}",
    "width after a key with parentheses": "{{ '%((x)y)2000000000d' % {'(x)y': 1} }}",
    "str.center": "{{ 'x'.center(2000000000) }}",
    "str.ljust": "{{ 'x'.ljust(2000000000) }}",
    "% width": "{{ '%2000000000d' % 1 }}",
    "% star": "{{ '%*d' % (2000000000, 1) }}",
    "% many": "{% set x = 'x' * 3000000 %}{{ ('%(x)s' * 2000) % {'x': x} }}",
    "format": "{{ '{:2000000000d}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 2000000000) }}",
    "many formats": "{% set x = 'x' * 3000000 %}{{ ('{0}' * 2000).format(x) }}",
    "the filter format": "{{ '%2000000000d' | format(1) }}",
    "replace": "{% set x = 'x' * 3000000 %}{{ x.replace('x', x) }}",
    "the filter replace": "{% set x = 'x' * 3000000 %}{{ x | replace('x', x) }}",
    "indent": "{{ ('\n' * 3000000) | indent('x' * 3000000) }}",
    "tojson": "{{ [[1] * 100000] | tojson(indent=2000000000) }}",
    "to_bytes": "{{ (5).to_bytes(2000000000, 'big') }}",
    "batch": "{{ [1] | batch(2000000000, 0) | list }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "kept texts": "{% set n = namespace(x=[]) %}{% for i in range(3000) %}{% set n.x = n.x + ['x' * 3000000] %}{% endfor %}",
    "shared lists": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "shared tuples": "{% set n = namespace(x=(1,)) %}{% for i in range(40) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x }}",
    "a namespace": "{% set x = 'x' * 3000000 %}{% set n = namespace("
    + ", ".join(f"a{i}=x" for i in range(900))
    + ") %}{{ n }}",
    "a block": "{% set x %}{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endset %}{{ x | length }}",
    "numbers": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "powers": "{{ ((9 ** 1000) ** 1000) ** 1000 }}",
    "long numbers": "{{ ('f' * 4000000) | int(0, 16) // ('f' * 2000000) | int(0, 16) }}",
    "wide times": "{{ strftime_now('%1500Y' * 200000) }}",
    "slices": "{% set x = 'x' * 3000000 %}{% set n = namespace(x=[]) %}"
    "{% for i in range(3000) %}{% set n.x = n.x + [x[1:]] %}{% endfor %}",
    "macros without a loop": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "tests without a loop": "{{ (['ab'] * 5000) | select('in', 'a' * 4000000) | list | length }}",
    "a condition": "{% set x = [1.5] * 80000 %}{% for i in range(99999) if i in x %}{% endfor %}",
    "another clock": "{% set _balcony_tick = 1 %}{% macro tick() %}{% endmacro %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}
_PROGRAM = """
import json, resource, sys, time
from balcony_runtime.text.template import ChatTemplate
import jinja2
most = {}
for name, template in json.load(sys.stdin).items():
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        ChatTemplate(template + "{{ messages }}").render({"messages": []})
        outcome = "rendered"
    except jinja2.TemplateError as error:
        outcome = str(error)
    most[name] = [outcome, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.process_time() - begin]
print(json.dumps(most))
"""


def test_templates_that_are_greedy_are_refused_before_they_take_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps(GREEDY),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    for name, (outcome, megabytes, seconds) in json.loads(done.stdout).items():
        assert outcome != "rendered" and len(outcome.splitlines()) == 1, (name, outcome)
        assert megabytes < 700 and seconds < 20, (name, megabytes, seconds)


def test_compiling_a_template_runs_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """jinja2 would run those of constants, without a clock, and keep their results."""
    texts: list[str] = []

    def kept(text: str) -> str:
        texts.append(text)
        return text

    monkeypatch.setattr("balcony_runtime.text.template._indent", kept)
    compiled = ChatTemplate("{% set x = 'a' | indent %}{{ x }}{{ 'b' | indent }}")
    assert not texts
    assert compiled.render({}) == "ab" == "".join(texts)


@pytest.mark.parametrize(
    "template",
    [
        "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "-" * 90_000 + "1 }}",
    ],
    ids=["blocks", "brackets", "signs"],
)
def test_templates_that_are_nested_too_deep_are_named(bundle_copy: Path, template: str) -> None:
    with pytest.raises(BundleError, match=r"chat_template\.jinja: not readable \((RecursionError|.*too many)"):
        write_template(bundle_copy, template)


def test_what_real_templates_use_is_there(bundle_copy: Path) -> None:
    """Filters, methods and functions of the templates of the supported architectures, and of tool calls."""
    template = (
        "{%- set ns = namespace(found=false, text='') -%}"
        "{%- for m in messages -%}"
        "{%- set content = m.content | trim -%}"
        "{%- set ns.text = ns.text + m['role'] + '|' ~ content.split('</think>')[-1].lstrip('\n') -%}"
        "{%- if loop.last and m.role.startswith('us') and 'fox' in content -%}{%- set ns.found = true -%}{%- endif -%}"
        "{%- endfor -%}"
        "{{ ns.text }}|{{ ns.found }}|{{ messages | map(attribute='role') | join(',') }}|{{ messages[::-1][0].role | upper }}"
        "|{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|{{ {'a': [1, 2.5, none]} | tojson }}"
        "|{{ '%s-%d' % ('a', 3) }}|{{ '{} {:.2f}'.format('b', 1.5) }}|{{ 'a b'.replace('a', 'c').title() }}"
        "|{{ {'x': 1}.items() | list }}|{{ 'l1\nl2' | indent(2) }}|{{ not_there is defined }}|{{ strftime_now('%Y') | length }}"
        "|{{ {'b': 1, 'a': 2} | dictsort }}|{{ 'x' | default('y') }}|{{ [3, 1, 2] | sort }}|{{ range(3) | list }}"
    )
    codec = write_template(bundle_copy, template)
    got = codec._render(
        [{"role": "system", "content": "be "}, {"role": "user", "content": "a<think></think>\nfox"}], {}
    )
    assert got == (
        "system|beuser|fox|True|system,user|USER|1|{\"a\": [1, 2.5, null]}|a-3|b 1.50|C B|[('x', 1)]|l1\n  l2|False|4"
        "|[('a', 2), ('b', 1)]|x|[1, 2, 3]|[0, 1, 2]"
    )


def test_a_bundle_without_a_template_wants_text(bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / "bundle.json").read_text())
    del manifest["files"]["chat_template.jinja"]
    (bundle_copy / "bundle.json").write_text(json.dumps(manifest))
    codec = TextCodec(Bundle.open(bundle_copy))
    assert codec.decode(codec.encode("the fox")) == "the fox"
    with pytest.raises(InputError, match=r"has no chat template: give the prompt as a text \(.*/v1/completions\)"):
        codec.encode([{"role": "user", "content": "x"}])


def test_a_damaged_tokenizer_is_named(bundle_copy: Path) -> None:
    (bundle_copy / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: not readable as a tokenizer"):
        TextCodec(Bundle(bundle_copy, manifest_of(bundle_copy)))


@examples(300)
@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_stop_strings_cut_as_if_the_text_were_whole(text: str, stops: list[str], size: int) -> None:
    watch, shown = StopStrings(stops), ""
    for start in range(0, len(text), size):
        piece, hit = watch.push(text[start : start + size])
        shown += piece
        if hit:
            break
    else:
        shown += watch.flush()
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not places:
        assert shown == text
    else:
        # The first stop string that is complete ends the text; one with an earlier start may be completed later.
        assert text.startswith(shown) and min(places) <= len(shown) <= max(places)
        assert any(text.startswith(stop, len(shown)) for stop in stops)


@pytest.mark.parametrize("stops", ["text", [""], ["a", ""], [3]])
def test_stop_strings_that_are_none(stops: Any) -> None:
    with pytest.raises(InputError, match="must be a list of non-empty strings"):
        StopStrings(stops)


def test_a_stop_string_that_no_reply_can_have_is_refused() -> None:
    with pytest.raises(InputError, match="stop: is not valid UTF-8"):
        StopStrings(["\n", "caf\udce9"])


def test_other_threads_run_while_a_long_text_is_tokenized(codec: TextCodec) -> None:
    """One that holds Python's lock would stop the thread that makes tokens."""
    text, turns, done = "a balcony over the river " * 60_000, 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not done.wait(0.001):
            turns += 1

    thread = threading.Thread(target=count)
    thread.start()
    begin = time.perf_counter()
    tokens = codec.encode(text, chat=False)
    took_s = time.perf_counter() - begin
    done.set()
    thread.join()
    assert len(tokens) > 60_000 and turns > 20 * took_s
    assert tokens[:40] == codec.encode(text[:1000], chat=False)[:40]


def test_a_prompt_is_read_where_no_more_threads_can_be_started(
    tiny_llm: balcony_edge.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call of encode_batch_fast makes threads. Where that fails, so does every later call, with a BaseException."""
    codec = tiny_llm._requests._codec
    wanted, tokenizer = codec.encode("the fox"), codec._tokenizer

    def panic(*_: object, **__: object) -> None:
        raise type("PanicException", (BaseException,), {})("The global thread pool has not been initialized.")

    limited = SimpleNamespace(encode_batch_fast=panic, encode=tokenizer.encode)
    monkeypatch.setattr(codec, "_tokenizer", limited)
    assert codec.encode("the fox") == wanted
