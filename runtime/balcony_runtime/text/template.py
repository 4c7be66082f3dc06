"""Chat templates: programs that come with a model, rendered in a sandbox with bounds on time and size.

Owns the environment: jinja2's immutable sandbox (no access to Python's attributes, no change of its input), a clock that every
loop, macro, filter and test checks, and a meter of all values that a template makes. A template is an untrusted program, and
jinja2 bounds neither its time nor its memory: doubling a text thirty times takes a gigabyte and no time. The environment
therefore only has filters and methods whose results are bounded before they are made, or are no longer than their input.
"""

from __future__ import annotations

import functools
import json
import re
import string
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

#: Longest time of a rendering. A template takes well under a millisecond; one that takes this long is in a loop.
MAX_SECONDS = 2.0
#: Most characters of a rendered conversation: far above every context, and little memory.
MAX_CHARACTERS = 4_000_000
#: Most characters of all values that one rendering makes, whether it keeps them or not; this also bounds each value.
MAX_MADE = 16 * MAX_CHARACTERS
#: Size of an element of a list, in characters: its pointer and a small object.
ELEMENT = 16
#: Most bits of an integer.
MAX_BITS = 10_000
#: Most characters of a format of the time. The C library pads fields to any width: the result may be 256 times as long.
MAX_TIME = 100

#: Filters whose results are no longer than their input, except for a few characters; the other filters are below.
# fmt: off
_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select",
    "selectattr", "sort", "string", "title", "trim", "unique", "upper", "wordcount",
)
#: Methods of texts that templates may use; the sandbox itself restricts methods of lists and mappings.
_TEXT_METHODS = {
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit", "islower",
    "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
    "title", "upper",
}
# fmt: on
_SCALARS = (str, int, float, type(None), jinja2.Undefined)
_CONTAINERS = (list, tuple, dict)


@dataclass
class _Limits:
    """Limits of one rendering, and the characters that it has made so far."""

    deadline_s: float
    made: int = 0


_LIMITS: ContextVar[_Limits | None] = ContextVar("balcony_template_limits", default=None)


class ChatTemplate:
    """One compiled template.

    Args:
        source: text of the template.

    Raises:
        jinja2.TemplateError: the text is not a template.
    """

    def __init__(self, source: str) -> None:
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would compute values without the meter
            finalize=_writable,
            extensions=[loopcontrols, _Generation],
        )
        try:
            tree = _Metered().visit(environment.parse(source))
            code = environment.compile(tree)
            #: Names of the variables that the template uses.
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateError:
            raise
        except Exception as error:  # the parser or Python's compiler refuses deep nesting
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text.

        Raises:
            jinja2.TemplateError: the template refuses the messages, exceeds a bound or tries to leave the sandbox.
        """
        pieces: list[str] = []
        size = 0
        token = _LIMITS.set(_Limits(time.monotonic() + MAX_SECONDS))
        try:
            for piece in self._template.generate(dict(variables)):
                _tick()
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise jinja2.TemplateRuntimeError(f"the text is longer than {MAX_CHARACTERS:,} characters")
                pieces.append(piece)
        except jinja2.TemplateError:
            raise
        except Exception as error:  # the template is an untrusted program: treat any exception as its refusal
            raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
        finally:
            _LIMITS.reset(token)
        return "".join(pieces)


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's words for training; here it only renders them."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it without ClassVar

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    """Adds calls to the syntax tree: loops and macros check the clock, and new values pass the meter.

    The calls use attributes of the environment, which a template cannot name and therefore cannot replace.
    """

    def generic_visit(self, node: Any, *args: Any, **options: Any) -> Any:
        """Change a node after its children."""
        node = super().generic_visit(node, *args, **options)
        if isinstance(node, nodes.For) and node.test is not None:  # the body does not run where it fails
            node.test = _call("made", [node.test])
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            node.body.insert(0, nodes.ExprStmt(_call("tick", [])))
        elif isinstance(node, nodes.Concat):
            return _call("joined", node.nodes)
        elif isinstance(node, nodes.List | nodes.Dict | nodes.Compare) or (
            isinstance(node, nodes.Tuple) and node.ctx == "load"
        ):
            return _call("made", [node])
        return node


def _call(name: str, arguments: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with the globals that templates of transformers expect, and bounds on all operations that grow a value."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals = {name: self.globals[name] for name in ("range", "dict", "cycler", "joiner", "namespace")}
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        own: dict[str, Callable[..., Any]] = {
            "tojson": _to_json, "join": _join, "replace": _replace, "indent": _indent, "format": _percent
        }  # fmt: skip
        self.filters = {
            name: _measured(filter_) for name, filter_ in (self.filters | own).items() if name in (*_FILTERS, *own)
        }
        tests: dict[str, Any] = self.tests
        self.tests = {name: _timed(test) for name, test in tests.items()}
        self.tick, self.joined, self.made = _tick, _joined, _made

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the output of a macro or a block."""
        return _joined(*pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result can be larger than its operands, within bounds."""
        texts = (str, bytes, *_CONTAINERS)
        if operator == "*" and (isinstance(left, texts) or isinstance(right, texts)):
            sized, count = (left, right) if isinstance(left, texts) else (right, left)
            if isinstance(count, int) and _size(sized) * count > MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"a repetition is longer than {MAX_CHARACTERS:,} characters")
        elif operator == "+" and isinstance(left, texts) and isinstance(right, texts):
            _bounded(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            return _made(_percent(left, *(right if isinstance(right, tuple) else (right,))))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
            if bits > MAX_BITS:
                what = f"a power of {right}" if operator == "**" else f"a product of {bits} bits"
                raise jinja2.TemplateRuntimeError(f"{what} is not computed")
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:  # noqa: N805 - jinja2's names
        """Call a function, a macro or a method; texts only have the methods above, numbers none."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name not in _TEXT_METHODS:
                raise jinja2.TemplateRuntimeError(f"texts have no method {name} here")
            if name in ("join", "replace"):
                own: dict[str, Callable[..., str]] = {
                    "join": lambda parts: _join(parts, owner),
                    "replace": functools.partial(_replace, owner),
                }
                return _made(own[name](*args, **options))
        elif isinstance(owner, int | float | bytes):
            raise jinja2.TemplateRuntimeError(f"values of type {type(owner).__name__} have no method {name} here")
        return _made(super().call(__context, __obj, *args, **options))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` with a bound on its output; the sandbox restricts its input."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template: str = value.__self__

        def bounded(*args: Any, **options: Any) -> str:
            _check_format(template, "{", [*args, *options.values()])
            return wrapped(*args, **options)

        return bounded

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An element, or a slice, which is a new value and passes the meter; the hash of a tuple may take a while."""
        found = super().getitem(obj, argument)
        return found if isinstance(argument, str | int) else _made(found)


def _tick() -> _Limits:
    """The limits of this rendering, if its time is not over."""
    limits = _LIMITS.get()
    # Even with `optimized=False` jinja2 computes constants while it compiles, where no clock and no meter runs.
    if limits is None:
        raise jinja2.TemplateRuntimeError("nothing is computed outside a rendering")
    if time.monotonic() > limits.deadline_s:
        raise jinja2.TemplateRuntimeError(f"rendering took longer than {MAX_SECONDS:g} s")
    return limits


def _size(value: Any, known: dict[int, int] | None = None) -> int:
    """Characters of a value when printed; a part that occurs several times counts each time."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, _CONTAINERS):
        if not isinstance(value, _SCALARS):
            raise jinja2.TemplateRuntimeError(
                f"{type(value).__name__} in a list or a text: give texts, numbers and lists"
            )
        return ELEMENT
    known = {} if known is None else known
    if id(value) not in known:
        known[id(value)] = 0  # ends a cycle
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = ELEMENT + sum(ELEMENT + _size(part, known) for part in parts)
    return known[id(value)]


def _bounded(size: int) -> None:
    if size > MAX_MADE:
        raise jinja2.TemplateRuntimeError(f"a value is longer than {MAX_MADE:,} characters")


def _made(value: Any) -> Any:
    """The value, after the clock and the meter have seen it."""
    limits = _tick()
    if isinstance(value, int) and value.bit_length() > MAX_BITS:  # a division of long numbers takes minutes
        raise jinja2.TemplateRuntimeError(f"a number is longer than {MAX_BITS:,} bits")
    if isinstance(value, str | bytes):
        size = len(value)
    elif isinstance(value, _CONTAINERS):
        _bounded(_size(value))
        size = ELEMENT * len(value)
    else:
        return value
    limits.made += size
    if limits.made > MAX_MADE:
        raise jinja2.TemplateRuntimeError(f"its values are longer than {MAX_MADE:,} characters together")
    return value


def _writable(value: Any) -> Any:
    """Refuse to print anything except texts, numbers and lists: jinja2's own objects would print all their content."""
    if not isinstance(value, (*_SCALARS, *_CONTAINERS)):
        raise jinja2.TemplateRuntimeError(f"{type(value).__name__} cannot be written: give texts, numbers and lists")
    return value


def _joined(*parts: Any) -> str:
    """Join texts; the size is checked first."""
    texts = [str(_writable(part)) for part in parts]
    _bounded(sum(map(len, texts)))
    joined: str = _made("".join(texts))
    return joined


def _join(parts: Iterable[Any], between: str = "", attribute: str | None = None) -> str:
    texts: list[str] = []
    for part in parts:
        texts += [between] if texts else []
        texts.append(str(_writable(part if attribute is None else part[attribute])))
        _bounded(sum(map(len, texts[-2:])) * len(texts))
    return _joined(*texts)


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(_writable(value))
    _bounded(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    space = width if isinstance(width, str) else " " * min(width, 100)
    _bounded(len(text) + (text.count("\n") + 1) * len(space))
    head, *rest = text.split("\n")
    lines = [f"{space}{line}" if line or blank else line for line in rest]
    return "\n".join([f"{space}{head}" if first else head, *lines])


def _percent(text: str, *values: Any, **named: Any) -> str:
    _check_format(text, "%", [*values, *named.values()])
    written: str = text % (values[0] if len(values) == 1 and isinstance(values[0], dict) else named or values)
    return written


def _check_format(template: str, mark: str, values: list[Any]) -> None:
    """Refuse large or computed widths, and results that could exceed the bound."""
    if mark == "{":
        specs = "\n".join(spec or "" for _, _, spec, _ in string.Formatter().parse(template))
        wide = re.search(r"\d{4,}|\{", specs)
    else:  # keys with parentheses hide where the width is
        wide = re.search(r"%(\([^()]*\))?[^a-zA-Z%]*(\d{4,}|\*)|%\([^()]*\(", template)
    if wide:
        raise jinja2.TemplateRuntimeError("a format has a width above 999 or a computed one: write the text out")
    _bounded(len(template) + template.count(mark) * (1000 + _size(values)))


def _measured(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that accepts only plain values and whose result passes the meter."""

    @functools.wraps(filter_)  # keeps jinja2's marks for extra arguments
    def measured(*args: Any, **options: Any) -> Any:
        _tick()  # ``map`` calls a filter once for each element
        for value in (*args, *options.values()):
            if isinstance(value, jinja2.runtime.Macro | jinja2.utils.Namespace | jinja2.runtime.LoopContext):
                _writable(value)
        return _made(filter_(*args, **options))

    return measured


def _timed(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test that checks the clock: ``select`` calls it once for each element, and ``in`` may take milliseconds."""

    @functools.wraps(test)
    def timed(*args: Any, **options: Any) -> Any:
        _tick()
        return test(*args, **options)

    return timed


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As in transformers, parameters included: plain text for a model, not HTML for a page.
    wider = 1 + (0 if indent is None else abs(int(indent))) + sum(map(len, separators or ()))
    _bounded(_size(value) * wider * (6 if ensure_ascii else 1))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    if len(form) > MAX_TIME:
        raise jinja2.TemplateRuntimeError(f"a format of the time is longer than {MAX_TIME} characters")
    return datetime.now().strftime(form)
