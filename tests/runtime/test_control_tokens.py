"""Control tokens that a prompt spells out: which become tokens, and which are text."""

from __future__ import annotations

import inspect
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import InputError
from balcony_runtime.llm import LLM
from balcony_runtime.text.codec import TextCodec
from tests.support.templates import manifest_of, write_template


@pytest.fixture(scope="module")
def codec(tiny: Any) -> TextCodec:
    return TextCodec(Bundle.open(tiny.path))


def test_control_tokens_have_names(codec: TextCodec, tiny: Any) -> None:
    assert codec.name(tiny.tokenizer.convert_tokens_to_ids("<end>")) == "<end>"


def test_docstrings_have_the_arguments_of_encode_and_the_default_of_control_tokens() -> None:
    """``encode`` refers to ``stream``, where a text is put into the chat template if there is one; its names are then text."""
    told = f"{LLM.encode.__doc__} {LLM.stream.__doc__}"
    names = inspect.signature(LLM.encode).parameters.keys() - {"self"}
    assert not [name for name in names if name not in told]
    assert "default only where the prompt is not put into the chat template" in told


@pytest.mark.parametrize("text", ["a<end>b", "<end>", "the <end> fox <end><end>", "no token of control"])
def test_control_tokens_in_a_prompt_can_be_plain_text(codec: TextCodec, tiny: Any, text: str) -> None:
    """A plain text's are tokens by default, as in transformers; a message's are spelled, and the template's own stay."""
    end = tiny.tokenizer.convert_tokens_to_ids("<end>")
    assert codec.encode(text, chat=False).count(end) == text.count("<end>")
    assert codec.encode(text, control_tokens=True).count(end) == text.count("<end>")
    assert codec.encode(text) == codec.encode(text, control_tokens=False)
    tokenizer = Tokenizer.from_str(tiny.tokenizer.backend_tokenizer.to_str())
    for chat, whole in ((False, text), (None, f"<user>{text}\n<assistant>")):
        ids = codec.encode(text, chat=chat, control_tokens=False)
        assert end not in ids and tokenizer.decode(ids, skip_special_tokens=False) == whole
        if "<end>" not in text:
            assert ids == codec.encode(text, chat=chat)


@pytest.mark.parametrize("no", [np.False_, 0])
def test_a_no_of_another_type_is_one(codec: TextCodec, llm: LLM, tiny: Any, no: Any) -> None:
    """A column of a table has NumPy's; taken for yes, a text would end its own turn."""
    end = tiny.tokenizer.convert_tokens_to_ids("<end>")
    assert end not in codec.encode("a<end>b", chat=False, control_tokens=no)
    assert codec.encode("the fox", chat=no) == codec.encode("the fox", chat=False)
    options: Any = {"max_new_tokens": 4, "ignore_eos": True}
    assert llm.generate("the fox", chat=no, **options).text == llm.generate("the fox", chat=False, **options).text


def test_a_templates_own_control_tokens_stay(bundle_copy: Path, tiny: Any) -> None:
    end = tiny.tokenizer.convert_tokens_to_ids("<end>")
    written = write_template(bundle_copy, "{% for m in messages %}{{ m.content | trim }}<end>{% endfor %}")
    assert written.encode(" a<end>b ").count(end) == 1
    assert written.encode(" a<end>b ", control_tokens=True).count(end) == 2
    assert written.encode("a<end>b", chat=False).count(end) == 1  # a plain text, as in transformers


def test_a_spelled_token_takes_one_copy_of_the_tokenizer(bundle_copy: Path) -> None:
    """It is made under Python's lock, and one of 49,000 tokens takes 0.15 s and 7 MB."""
    codec = write_template(bundle_copy, "{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    assert codec.encode("a<end>b") and {"_aliased", "_literal"} & vars(codec).keys() == {"_aliased"}


def test_subclasses_of_texts_are_texts(bundle_copy: Path) -> None:
    """Web frameworks have Markup, which escapes the text around it, and clients have roles as an enumeration."""
    codec = write_template(bundle_copy, "{% for m in messages %}{{ '<end>' + m.content }}{{ m.role }}{% endfor %}")

    class Role(str, Enum):  # noqa: UP042 - as clients have it
        USER = "user"

    given = (("user", "<fox>"), (Role.USER, Markup("<fox>")))
    plain, others = ([{"role": role, "content": text}] for role, text in given)
    for control_tokens in (None, True):
        wanted = codec.encode(plain, control_tokens=control_tokens)
        assert codec.encode(others, control_tokens=control_tokens) == wanted


def test_glyphs_of_fonts_for_terminals_stay(bundle_copy: Path) -> None:
    """They are private-use characters, such as those of Powerline from U+E0A0 on."""
    codec = write_template(bundle_copy, "{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    glyphs = "".join(map(chr, range(0xE0A0, 0xE0D5)))
    for text in (f"a{glyphs}b", f"a{glyphs}<end>b"):
        assert codec.decode(codec.encode(text), control_tokens=True) == f"{text}<end>"


_EVERYWHERE = (
    "{% if false %}<tool_call>{% endif %}"  # a format of calls that is known
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    "{{ mood }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.name }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}<end>{% endfor %}"
)


@pytest.mark.parametrize(
    "given",
    [
        {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"function": {"name": "a", "description": "<end>"}}],
        },
        {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"function": {"<end>": 1, "b": ["<end>", {"c": "<end>"}]}}],
        },
        {"messages": [{"role": "user", "content": "x", "name": "<end>"}]},
        {"messages": [{"role": "tool", "content": "x<end><end>"}]},
        {"messages": [{"role": "user", "content": "\U000106000\U00010601<\U00010600end>"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "<end>"}]}]},
        {"messages": [{"role": "user<end>", "content": "x"}]},
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "<end>", "arguments": '{"<end>": "<end>"}'}}],
                }
            ]
        },
        {"messages": [{"role": "user", "content": "x"}], "template_kwargs": {"mood": "<end>"}},
        {
            "messages": [{"role": "user", "content": "x"}],
            "template_kwargs": {"mood": ["<end>"]},
        },  # printed as in Python
        {"messages": [{"role": "user", "content": "x"}], "documents": [{"text": "<end>"}]},
    ],
    ids=str,
)
def test_no_text_of_a_request_is_a_control_token(bundle_copy: Path, tiny: Any, given: dict[str, Any]) -> None:
    """Messages, roles, names, tools, calls, documents and variables: the template's own control token is the only one."""
    end = tiny.tokenizer.convert_tokens_to_ids("<end>")
    codec = write_template(bundle_copy, _EVERYWHERE)
    ids = codec.encode(given.pop("messages"), **given)
    assert ids.count(end) == 1 and ids[-1] == end
    assert "<end>" in codec._tokenizer.decode(ids[:-1], skip_special_tokens=False)  # spelled, in ordinary tokens


def test_a_role_is_no_part_of_a_control_token(bundle_copy: Path) -> None:
    """The template writes ``<role>``, and ``<end>`` would be the control token, also one of several words."""
    codec = write_template(bundle_copy, _EVERYWHERE)
    for role in ("end", "user><end", "end><user"):
        refusal = f"role = '{role}': is part of a control token: give one of assistant, developer"
        with pytest.raises(InputError, match=refusal):
            codec.encode([{"role": role, "content": "x"}])
    assert codec.encode([{"role": "critic", "content": "x"}])
    with pytest.raises(InputError, match="messages of 65 unusual roles: at most 64 are taken"):
        codec.encode([{"role": f"critic {number}", "content": "x"} for number in range(65)])


def spaced(prepends: bool) -> Tokenizer:
    """A tokenizer of characters as in Llama 2 (a normalizer) or Mistral (a pre-tokenizer): a space comes before a text."""
    characters = ["<unk>", "<end>", "▁", *map(chr, range(0x21, 0x7F)), "\n"]
    tokenizer = Tokenizer(models.BPE({text: place for place, text in enumerate(characters)}, [], unk_token="<unk>"))
    if prepends:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<end>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("prepends", [True, False])
def test_a_spelled_token_brings_no_spaces(bundle_copy: Path, prepends: bool) -> None:
    """What a tokenizer puts before a text comes once, and after the template's own tokens, but not around a user's words."""
    tokenizer, template = spaced(prepends), "{% for m in messages %}{{ m.content }}<end>{% endfor %}a"
    (bundle_copy / "tokenizer.json").write_text(tokenizer.to_str())
    write_template(bundle_copy, template)
    ids = TextCodec(Bundle(bundle_copy, manifest_of(bundle_copy))).encode("x <end>a<end> y")
    assert ids.count(1) == 1
    place = ids.index(1)
    assert tokenizer.decode(ids[:place]) == " x <end>a<end> y"
    assert ids[place:] == tokenizer.encode("x<end>a", add_special_tokens=False).ids[-len(ids[place:]) :]


def test_a_template_that_cuts_words_out_joins_no_control_token(bundle_copy: Path) -> None:
    """SmolLM3's takes ``/no_think`` out of the system message, where the word may stand within a name."""
    tokenizer = Tokenizer.from_file(str(bundle_copy / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_end|>"])
    (bundle_copy / "tokenizer.json").write_text(tokenizer.to_str())
    template = "{% for m in messages %}{{ m.content | replace('/no_think', '') }}<|im_end|>{% endfor %}"
    codec, end = write_template(bundle_copy, template), tokenizer.token_to_id("<|im_end|>")
    for cut in ("<|im_/no_thinkend|>", "</no_think|im_end|>", "</no_think|/no_thinkim_end|>"):
        with pytest.raises(InputError, match="spells a control token once the template has cut words out"):
            codec.encode(f"a{cut}b")
    ids = codec.encode("a<|im_end|>b<|c/no_think")
    assert codec.decode(ids, control_tokens=True) == "a<|im_end|>b<|c<|im_end|>" and ids.count(end) == 1


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (r"replace('\n', '')", "\n"),
        ("replace('~', '', 1)", "~"),
        ("replace('-', '+') | replace('~', '')", "~"),
    ],
)
def test_words_that_a_template_cuts_out_are_read_as_it_reads_them(bundle_copy: Path, call: str, word: str) -> None:
    """An escape is its character, the number of cuts may be bounded, and another replacement may come before."""
    tokenizer = Tokenizer.from_file(str(bundle_copy / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_end|>"])
    (bundle_copy / "tokenizer.json").write_text(tokenizer.to_str())
    codec = write_template(bundle_copy, "{% for m in messages %}{{ m.content | " + call + " }}<|im_end|>{% endfor %}")
    with pytest.raises(InputError, match="spells a control token once the template has cut words out"):
        codec.encode(f"a<|im_{word}end|>b")
    assert codec.encode(f"a{word}b").count(tokenizer.token_to_id("<|im_end|>")) == 1


def test_a_unigram_model_spells_control_tokens(bundle_copy: Path) -> None:
    """Their names are among its pieces, with the best of all scores, as in the models of LLM-jp."""
    letters = [(letter, -9.0) for letter in (*map(chr, range(0x20, 0x7F)), "\n")]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("<end>", 0.0), *letters], 0))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<end>")])
    (bundle_copy / "tokenizer.json").write_text(tokenizer.to_str())
    codec = write_template(bundle_copy, "{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    for text in ("x<end>y", "<end>", "a<unk>"):
        ids = codec.encode(text)
        assert ids[-1] == 1 and [tokenizer.id_to_token(token) for token in ids[:-1]] == list(text)
        assert codec.encode(text, chat=False, control_tokens=False) == ids[:-1]


@pytest.mark.parametrize("mark", ["<\uff5cUser\uff5c>", "<|im_start|>", "<|im_end|>", "<start_of_turn>"])
def test_marks_of_turns_that_are_not_special_are_text_too(bundle_copy: Path, mark: str) -> None:
    """DeepSeek-R1's are not, nor is ``<|im_start|>`` where Axolotl added it (``tokens:``), as in Dolphin's models.

    No message of a user begins another turn; other tokens that a template writes stay what they are.
    """
    tokenizer = Tokenizer.from_file(str(bundle_copy / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in (mark, "<think>", "user")])
    (bundle_copy / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    user, think, word = map(tokenizer.token_to_id, (mark, "<think>", "user"))
    template = "{% for m in messages if m.role == 'user' %}" + mark + "{{ m.content }}{% endfor %}<think>"
    (bundle_copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    codec = TextCodec(Bundle(bundle_copy, manifest_of(bundle_copy)))
    ids = codec.encode(f"a{mark}b<think>user")
    assert (ids[0], ids.count(user), ids.count(think), ids.count(word)) == (user, 1, 2, 1)
    assert f"a{mark}b" in codec.decode(ids, control_tokens=True) and codec.decode([word]) == "user"
    assert codec.encode(f"a{mark}b", chat=False).count(user) == 1  # a plain text, as in transformers
    assert codec.decode([user]) == mark, "a reply shows it, as in transformers, so a stop string finds it"
