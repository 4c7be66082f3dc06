"""Chat templates: programs that come with a model, rendered in a sandbox with bounds on time and size.

Owns the environment: jinja2's immutable sandbox (no attribute that leads to Python, no change of what it is given), a clock
that every loop looks at, and a bound on what operators and the whole text may grow to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: A template takes well under a millisecond; one that takes this long loops.
MAX_SECONDS = 2.0
#: Characters of a rendered conversation: far beyond every context, far below what hurts.
MAX_CHARACTERS = 4_000_000
_TICK = "_balcony_tick"


class ChatTemplate:
    """One compiled template.

    Args:
        source: the template's text.

    Raises:
        jinja2.TemplateError: it is no template.
    """

    def __init__(self, source: str) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(call))
        code = environment.compile(tree)
        self._environment = environment
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text.

        Raises:
            jinja2.TemplateError: the template refuses, breaks a bound or leaves the sandbox.
        """
        deadline = time.monotonic() + MAX_SECONDS

        def tick() -> None:
            if time.monotonic() > deadline:
                raise jinja2.TemplateRuntimeError(f"rendering took longer than {MAX_SECONDS:g} s")

        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate({**variables, _TICK: tick}):
                tick()
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise jinja2.TemplateRuntimeError(f"the text is longer than {MAX_CHARACTERS:,} characters")
                pieces.append(piece)
        except jinja2.TemplateError:
            raise
        except Exception as error:  # a template is a stranger's program: whatever it raises is its refusal
            raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
        return "".join(pieces)


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's words for training: here, what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 has it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with what transformers' templates expect, and bounds on operators that grow."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
        self.filters["tojson"] = _to_json

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``*`` and ``**`` within bounds."""
        sized = left if isinstance(left, Sequence) else right if isinstance(right, Sequence) else None
        if operator == "*" and sized is not None:
            count = right if sized is left else left
            if isinstance(count, int) and len(sized) * count > MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"a repetition is longer than {MAX_CHARACTERS:,} characters")
        if operator == "**" and isinstance(right, int) and abs(right) > 1000:
            raise jinja2.TemplateRuntimeError(f"a power of {right} is not computed")
        return super().call_binop(context, operator, left, right)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # as transformers does: plain text for a model, not markup for a page
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
