"""Grammars: which tokens may come next in a reply of a given structure, and which are certain to come.

Owns llguidance: the tokenizer that it needs once per bundle, compiled structures, and the state of one reply. The mask of
the next token is computed when the last one is known. Most take 10 to 150 µs, less than a change of threads; where they
take longer, a helper thread computes them without Python's lock while the engine runs. This module does not know logits,
exits or sampling.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from balcony_edge.errors import InputError, MissingDependencyError
from balcony_runtime.structure.asked import GBNF, JSON_FORM, Structure

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLMatcher, LLTokenizer

BoolArray = npt.NDArray[np.bool_]
#: Compiled structures that are kept for replies to come, and the length of their texts together: a long one takes about 1 kB
#: for each character.
MOST_KEPT, MOST_KEPT_CHARACTERS = 32, 512_000
#: Threads that compute slow masks, for replies that run at once.
HELPERS = 2
#: Time of a mask from which the next one is computed on a helper thread. Waking it and taking Python's lock back costs
#: about 0.1 ms next to a busy engine (python -m benchmarks.serving.structured).
SLOW_S = 0.0003
#: Bounds of one compiled structure: 20,000 states of its lexer take about 40 MB (llguidance's default is 250,000). The
#: others are llguidance's own: 1,000,000 units of fuel to build (20 ms), 200,000 units and 50,000 items for a mask (15 ms).
MOST_STATES = 20_000
#: Characters that llama.cpp's GBNF writes as numbers. llguidance's reader drops leading zeros, after which they are none.
_ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
#: Mark of llguidance's own form. A search holds Python's lock, so these three expressions take linear time on any text. The one
#: in llguidance (``any_to_lark``) takes minutes for 200,000 blank lines.
_LARK = re.compile(r"^[^\S\n]*(%llguidance\b|!?\??start\s*[:\[])", re.MULTILINE)
#: Texts of a grammar, and names of tokens, such as ``<think>``. Escapes outside of texts are skipped as a whole: a quote that
#: ends nothing would otherwise begin a search to the end of the line at every escaped quote after it.
_NAMED = re.compile(r'\\.|"(?:\\.|[^"\\\n])*"|<[^<>\s]+>')
#: A rule of white space, as llguidance writes it.
_SPACE = re.compile(r'(?:"(?:\\[nrt]|\s)*"|/\[(?:\\[nrt]|\\x[0-9a-f]{2}|\s)*\]/|[\s()|*+?]|\{\d+,\d*\})+')
#: Most rules of a GBNF grammar.
MOST_RULES = 2000
#: Longest reason from the compiler that a message quotes.
MOST_REASON = 200


class Grammars:
    """Compiles structures for one bundle. Threads may use it at once.

    Args:
        tokenizer: gives the bundle's tokenizer.json; called at the first use.
        vocab_size: number of logits, V.
        ends: tokens that end a reply.
    """

    def __init__(self, tokenizer: Callable[[], str], vocab_size: int, ends: Sequence[int]) -> None:
        self._text, self._vocab_size, self._ends = tokenizer, vocab_size, tuple(ends)
        self._lock, self._compiling = threading.RLock(), threading.Lock()
        self._kept: OrderedDict[Structure, LLMatcher] = OrderedDict()

    def holds(self, asked: Structure) -> bool:
        """Whether a structure is compiled; it is then among the last that are forgotten."""
        with self._lock:
            if held := asked in self._kept:
                self._kept.move_to_end(asked)
            return held

    def guide(self, asked: Structure, *, keep: bool = True) -> Guide:
        """The state of a reply of this structure, before its first token. Compiles it (up to seconds) if it is new.

        ``keep``: whether it is kept for replies to come.

        Raises:
            InputError: the structure is not supported, no text has it, or it is too large.
            MissingDependencyError: llguidance is not installed.
        """
        if (found := self._copy(asked)) is not None:
            return found
        with self._compiling:  # not the other lock: replies of compiled structures begin meanwhile
            if (found := self._copy(asked)) is not None:
                return found
            matcher = self._compile(asked)
        with self._lock:
            if keep:
                self._kept[asked] = matcher
            while len(self._kept) > MOST_KEPT or sum(len(one.text) for one in self._kept) > MOST_KEPT_CHARACTERS:
                self._kept.popitem(last=False)
            return self._guide(matcher, asked)

    def _copy(self, asked: Structure) -> Guide | None:
        """The state of a reply of a structure that was compiled before."""
        with self._lock:
            return self._guide(self._kept[asked], asked) if self.holds(asked) else None

    def _guide(self, matcher: LLMatcher, asked: Structure) -> Guide:
        tokens = self._tokenizer_of(asked).vocab_size
        return Guide(matcher.deep_copy(), asked.kind, self._vocab_size, self._ends, tokens)

    def _tokenizer_of(self, asked: Structure) -> LLTokenizer:
        """The tokenizer for a structure: only a grammar names marks that are tokens, outside of its texts."""
        named = asked.kind == "grammar" and any(one[0] == "<" for one in _NAMED.findall(asked.text))
        return self._with_marks if named else self.tokenizer

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """The bundle's tokenizer as llguidance needs it, made once (0.4 s for 49,000 tokens); texts have no marks.

        Raises:
            InputError: llguidance cannot use it, or the bundle has no end-of-sequence token.
            MissingDependencyError: llguidance is not installed.
        """
        return self._made(named=False)

    @cached_property
    def _with_marks(self) -> LLTokenizer:
        """The same with the names of marks, for grammars; errors as for :attr:`tokenizer`."""
        return self._made(named=True)

    def _made(self, *, named: bool) -> LLTokenizer:
        llguidance = _llguidance()
        if not self._ends:
            raise InputError(
                "this bundle has no end-of-sequence token, with which a structured reply ends: export a model with one"
            )
        text, ends = _as_written(self._text(), named=named), list(self._ends)
        try:
            try:
                made: LLTokenizer = llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=ends)
            except ValueError:  # Gemma 3 1B has fewer logits than tokens: the last one is for images
                made = llguidance.LLTokenizer(text, eos_token=ends)
        except (ValueError, RuntimeError) as error:  # not what the handler of a signal raises
            raise InputError(
                f"this bundle's tokenizer does not work with llguidance ({_line(str(error))}): leave the structure out"
            ) from error
        return made

    def _compile(self, asked: Structure) -> LLMatcher:
        llguidance, tokenizer = _llguidance(), self._tokenizer_of(asked)
        matchers = llguidance.LLMatcher
        if asked.kind == "grammar" and asked.text.count("::=") > MOST_RULES:
            raise _refused(asked.kind, f"has more than {MOST_RULES:,} rules")
        try:
            if asked.kind == "json_schema":
                grammar = matchers.grammar_from_json_schema(asked.text, defaults=JSON_FORM)
            elif asked.kind == "regex":
                grammar = matchers.grammar_from_regex(asked.text)
            elif asked.kind == "tools":
                grammar = matchers.grammar_from_lark(asked.text)
            else:
                form = asked.text
                if GBNF.search(form) or not _LARK.search(form):
                    form = _as_lark(_ESCAPED.sub(_written_out, form))
                grammar = matchers.grammar_from_lark(form)
        except Exception as error:  # the readers of the library raise whatever a broken text makes them raise
            raise _refused(asked.kind, str(error) or type(error).__name__) from None
        limits = llguidance.LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
        matcher: LLMatcher = matchers(tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(asked.kind, matcher.get_error())
        # The first mask finds structures that are too large to run, and warms the lexer that copies share.
        first = self._guide(matcher, asked)
        if not first.forced(1):
            first.allowed()
        return matcher


class Guide:
    """The state of one reply: which tokens may come next. One thread at a time uses it.

    Args:
        matcher: state of the parser.
        kind: name of the parameter that asked for the structure, for messages.
        vocab_size: number of logits, V.
        ends: tokens that end a reply.
        tokens: number of tokens that the matcher knows, which may be more than V.
    """

    def __init__(self, matcher: LLMatcher, kind: str, vocab_size: int, ends: Sequence[int], tokens: int) -> None:
        self._matcher, self._kind, self._vocab_size, self._ends = matcher, kind, vocab_size, ends
        self._tokens, self._bits = tokens, np.zeros((tokens + 31) // 32, np.int32)
        self._address = self._bits.ctypes.data
        self._filled = False  # whether the bits are those of the next token
        self._fill_s = SLOW_S  # of the last mask; the first one is computed while the prompt runs
        self._pending: Future[None] | None = None
        self._ended = False

    def prepare(self) -> None:
        """Compute the next mask, or start to compute it on another thread if that takes long."""
        if self._filled or self._ended or self._pending is not None:
            return
        if self._fill_s < SLOW_S:
            self._fill()
        else:
            with contextlib.suppress(
                RuntimeError
            ):  # no helper once the main thread has ended: it is computed when it is needed
                self._pending = _helpers().submit(self._fill)

    def allowed(self) -> BoolArray | None:
        """Which tokens may come next, (V,); None after the end of sequence, where all may.

        Raises:
            InputError: the structure is too large to go on.
        """
        if self._ended:
            return None
        self._ready()
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        if not bits.any():
            raise _refused(self._kind, "no text fits it")
        return bits.view(bool)

    def permits(self, token: int) -> bool:
        """Whether a token may come next; errors as for :meth:`allowed`."""
        if self._ended:
            return True
        self._ready()
        return bool(self._bits.item(token >> 5) >> (token & 31) & 1)

    def accept(self, token: int) -> None:
        """Go on after a token.

        Raises:
            InputError: the token is not allowed, or the structure is too large to go on.
        """
        if self._ended:
            return
        self._settle()
        self._filled = False
        self._matcher.consume_token(token)
        self._refuse_error()
        self._ended = token in self._ends

    def forced(self, most: int) -> list[int]:
        """Go on over the tokens that are certain to come next, at most so many, and return them.

        The end of sequence is one of them if nothing else may follow.
        """
        if self._ended or most < 1:
            return []
        # Asking for forced tokens drops the parser's cached masks: look at the mask first. Of a model with several ends it has
        # all of them where nothing else may follow.
        if self._fill_s < SLOW_S and not self._matcher.is_stopped():
            self._ready()
            words = np.flatnonzero(self._bits)
            if len(words) != 1 or (self._bits.item(words[0]) & 0xFFFFFFFF).bit_count() != 1:
                return []
        self._settle()
        found = self._matcher.compute_ff_tokens()[:most]
        if found:
            self._filled = False
            self._matcher.consume_tokens(found)
        self._refuse_error()
        if len(found) < most and self._matcher.is_stopped():
            self.accept(self._ends[0])
            found.append(self._ends[0])
        return found

    def fork(self) -> Guide:
        """A copy that goes on by itself."""
        self._settle()
        other = Guide(self._matcher.deep_copy(), self._kind, self._vocab_size, self._ends, self._tokens)
        other._fill_s, other._ended = self._fill_s, self._ended
        return other

    def _fill(self) -> None:
        begin_s = time.perf_counter()
        self._matcher.unsafe_compute_mask_ptr(self._address, self._bits.nbytes)
        self._filled, self._fill_s = True, time.perf_counter() - begin_s

    def _ready(self) -> None:
        """Make sure that the bits are those of the next token."""
        self._settle()
        if not self._filled:
            self._fill()
        self._refuse_error()

    def _settle(self) -> None:
        """Wait for a mask that is being computed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _refuse_error(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._kind, self._matcher.get_error())


def _as_written(tokenizer: str, *, named: bool) -> str:
    """A tokenizer.json that splits certain text as a structure writes it.

    One that normalizes texts (NFC in Qwen) would give tokens of other bytes. Control tokens, and added tokens such as
    ``<think>``, have other names unless they are ``named``: no text matches them in llguidance, but the tokenizer would find
    them in "<think>" or Gemma's "<table>" in a schema or an expression. Tools name them by number.
    """
    found = json.loads(tokenizer)
    first = found.get("normalizer") or {"normalizers": []}
    steps = [one for one in first.get("normalizers", [first]) if not one["type"].startswith("NF")]
    found["normalizer"] = {"type": "Sequence", "normalizers": steps}
    if named or "merges" not in (model := found["model"]):
        return json.dumps(found)
    names: dict[str, str] = {}
    for token in found.get("added_tokens") or ():
        name = token["content"]
        if token["special"] or (name.startswith("<") and name.endswith(">")):
            token["content"] = names[name] = f"<\ufdd0{token['id']}>"  # no text has this noncharacter by chance
    if names.keys() & model["vocab"].keys():  # their ids follow from the names of the pieces
        model["vocab"] = {names.get(piece, piece): id_ for piece, id_ in model["vocab"].items()}
        model["unk_token"] = names.get(model.get("unk_token"), model.get("unk_token"))
        pairs = ((one, one.split(" ") if isinstance(one, str) else one) for one in model["merges"])
        model["merges"] = [one for one, pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    return json.dumps(found)


def _written_out(found: re.Match[str]) -> str:
    """The character that an escape writes as a number, one of ASCII with two digits; other escapes as they are."""
    code = int(found[1] or found[2] or "d800", 16)
    if 0xD800 <= code < 0xE000 or code > sys.maxunicode:
        return found[0]
    return chr(code) if code >= 0x80 else f"\\x{code:02x}"


def _as_lark(grammar: str) -> str:
    """A grammar in llama.cpp's form as Lark.

    llguidance's reader looks at all rules again for each link of a chain to a later rule: 2,000 of them in 256,000 characters
    took 80 s. So it gets a rule after those that it names.
    """
    from llguidance import gbnf_to_lark as gbnf  # noqa: PLC0415 - an extra

    rules = _numbered(gbnf.GrammarParser().parse(grammar), gbnf)
    free = _part_spaces(rules, gbnf)
    users, waits = defaultdict[str, list[str]](list), dict[str, int]()
    for name, rule in rules.items():
        named = {node.name for node in _nodes(rule) if isinstance(node, gbnf.RuleRefNode)}
        waits[name] = len(named)
        for one in named:
            users[one].append(name)
    ready = [name for name, count in waits.items() if not count]
    for name in ready:
        for user in users[name]:
            waits[user] -= 1
            if not waits[user]:
                ready.append(user)
    # At the end come rules that name themselves, by way of others.
    ordered = {name: rules[name] for name in (*ready, *rules)}
    gbnf.resolve(ordered)
    for rule in ordered.values():
        for node in () if rule.rule_is_terminal else _nodes(rule):
            if isinstance(node, gbnf.RuleRefNode):
                node.target = free.get(id(node.target), node.target)
    return "%llguidance {}\n\n" + "".join(f"{rule}\n" for rule in ordered.values())


def _nodes(rule: Any) -> list[Any]:
    """All parts of a rule of llama.cpp's form."""
    nodes = list(rule.children())
    for node in nodes:
        nodes += node.children()
    return nodes


def _numbered(found: Mapping[str, Any], gbnf: Any) -> dict[str, Any]:
    """Rules by their numbers: the library would write ``start``, ``Item`` and ``a-b`` as ``root``, ``item`` and ``a_b``."""
    names = {name: f"rule{number}" for number, name in enumerate(found)} | {"root": "root"}
    for name, rule in found.items():
        rule.name = names[name]
        for node in _nodes(rule):
            if isinstance(node, gbnf.RuleRefNode):
                node.name = names.get(node.name, node.name)
            elif isinstance(node, gbnf.RegexNode) and node.rx == ".":
                node.rx = "(?s:.)"  # any character, also a line break
    return {rule.name: rule for rule in found.values()}


def _part_spaces(rules: dict[str, Any], gbnf: Any) -> dict[int, Any]:
    """Take rules of white space out of the ends of others; returns those for rules that are no expressions, by the others' ids.

    A rule without recursion becomes one expression, which takes all that it can: ``ident ::= [a-z]+ ws`` also takes the line
    break that has to follow it. White space in the middle stays a part of its expression.
    """
    spaces = {name: rule for name, rule in rules.items() if _SPACE.fullmatch(str(rule.alternatives))}
    for name, rule in [*rules.items()]:
        ends = [whole := rule.alternatives.simplify()]
        if name in spaces:  # a rule that names itself is no expression
            free = gbnf.AlternativeNode([whole, gbnf.RuleRefNode(f"{name}_free")])
            rules[f"{name}_free"] = gbnf.RuleNode(f"{name}_free", free, "")
            continue
        for node in ends:
            if getattr(node, "name", None) in spaces:
                node.name += "_free"
            ends += node.children() if isinstance(node, gbnf.AlternativeNode) else node.children()[-1:]
        parted = isinstance(whole, gbnf.SequenceNode) and getattr(whole.nodes[-1], "name", "").endswith("_free")
        if parted and name != "root":
            front = f"{name}_before_space"
            rules[front] = gbnf.RuleNode(front, gbnf.SequenceNode(whole.nodes[:-1]), "")
            rule.alternatives = gbnf.SequenceNode([gbnf.RuleRefNode(front), whole.nodes[-1]])
    return {id(rule): rules[f"{name}_free"] for name, rule in spaces.items()}


def _refused(kind: str, reason: str) -> InputError:
    return InputError(
        f"{kind}: is not supported ({_line(reason)}): change it (docs/structured.md says what is supported)"
    )


def _line(reason: str) -> str:
    """A reason of the library as one short line."""
    line = " ".join(reason.replace("<non-verbose/>", "").split())
    return line if len(line) <= MOST_REASON else f"{line[:MOST_REASON]}..."


@cache
def _helpers() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - fails once the main thread has ended

    return ThreadPoolExecutor(HELPERS, thread_name_prefix="balcony-grammar")


if hasattr(os, "register_at_fork"):  # a forked process has none of these threads, and the pool would start no others
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def _llguidance() -> Any:
    try:
        import llguidance  # noqa: PLC0415 - an extra, needed only for structured replies
    except ImportError as missing:
        raise MissingDependencyError(
            "llguidance is not installed: pip install 'balcony-edge[structured]' for JSON schemas, grammars and tools"
        ) from missing
    return llguidance
