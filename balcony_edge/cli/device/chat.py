"""The chat of ``balcony-edge run`` without a prompt: history, several lines, commands; Ctrl-C stops only the reply.

Owns the terminal. The conversation itself is :mod:`balcony_runtime.chat`, which catches up deeper stages while the user types.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from balcony_edge.budget import Budget
from balcony_edge.cli.console import stdout, visible
from balcony_edge.cli.device.live import show_live
from balcony_edge.cli.show import show_checks, show_stream, show_summary
from balcony_edge.errors import BalconyError, BudgetError, ContextLengthError, InputError
from balcony_edge.files import expanded
from balcony_runtime.chat import Chat

if TYPE_CHECKING:
    from balcony_runtime.llm import LLM
    from balcony_runtime.reply import Reply

HELP = """\
/budget tpot_ms=15 [probability=0.9 ...]   set a budget with any keys of a budget file; /budget alone: full depth
/exit 17      use only this exit          /stats   cost of the last reply
/reset        forget the conversation     /help    this list
/save FILE    save the conversation       /load FILE   go on with a saved one, at once
/quit         end (or press Ctrl-D)       Ctrl-C   stops a reply
A line that ends in \\ continues on the next one. To send a message that begins with /, write two: //etc/hosts."""
_FULL = "The context is full: /reset starts a new conversation; a shorter message may still fit"
#: Commands that take no arguments.
_ALONE = ("/help", "/reset", "/stats", "/quit")
#: Commands that take the name of a file.
_FILES = ("/save", "/load")


def converse(llm: LLM, styles: dict[int, str], system: str | None, options: dict[str, Any], *, live: bool) -> None:
    """Read and answer until the end of input.

    Args:
        llm: the loaded bundle.
        styles: exit layer → style of its tokens.
        system: system message, if any.
        options: options of :meth:`LLM.stream`.
        live: whether each reply is shown in the live view.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history of input(), where the platform has it

    conversation = Conversation(llm, styles, system, options, live=live)
    legend = ", ".join(f"[{style}]{layer}[/]" for layer, style in styles.items())
    colours = stdout.color_system is not None and not stdout.no_color
    stdout.print(f"Exits{' by colour' if colours else ''}: {legend}. /help lists the commands.")
    while True:
        try:
            with conversation.chat.catching_up():
                line = read_message()
        except EOFError:
            stdout.print()
            return
        except KeyboardInterrupt:
            stdout.print("\n(Ctrl-D or /quit ends the chat)")
            continue
        try:
            if not conversation.handle(line):
                return
        except KeyboardInterrupt:
            stdout.print("\n(interrupted; Ctrl-D or /quit ends the chat)")
        except ContextLengthError as error:
            stdout.print(f"Error: {_FULL}. ({error})", style="red", markup=False, soft_wrap=True)
        except BalconyError as error:
            stdout.print(f"Error: {error}", style="red", markup=False, soft_wrap=True)


class Conversation:
    """State of the chat: messages and commands act on it."""

    def __init__(
        self, llm: LLM, styles: dict[int, str], system: str | None, options: dict[str, Any], *, live: bool
    ) -> None:
        self.llm, self.styles, self.options, self.live = llm, styles, options, live
        self.chat = llm.chat(system=system)
        self.last: Reply | None = None

    def handle(self, line: str) -> bool:
        """Answer a message or execute a command; False if the chat is over."""
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if not command:
            return True
        if command in ("/quit", "\x04") and not rest:  # Ctrl-D, which is a character on Windows
            return False
        if not command.startswith("/") or command.startswith("//"):
            self._answer(line.lstrip()[1:] if command.startswith("//") else line)
            return True
        if command in _ALONE and rest:
            raise InputError(f"{command} {rest}: {command} takes no arguments: leave them out")
        if command == "/help":
            stdout.print(HELP, markup=False)
        elif command == "/reset":
            self.chat.reset()
            stdout.print("The conversation is forgotten.")
        elif command == "/stats":
            self._show_stats()
        elif command == "/exit":
            if not rest:
                exits = ", ".join(map(str, self.llm.exit_layers))
                raise InputError(
                    f"/exit: needs one of the exits {exits}: write e.g. /exit {self.llm.exit_layers[0]}; /quit ends"
                )
            self._set_budget(parse_command(f"exit_layer={rest}"))
        elif command == "/budget":
            self._set_budget(parse_command(rest))
        elif command in _FILES:
            self._use_file(command, rest)
        else:
            raise InputError(f"{command}: is not a command: see /help; to send a message that begins with /, write //")
        return True

    def _set_budget(self, budget: Budget) -> None:
        self.llm.budget = budget
        asked = ", ".join(f"{key} = {value}" for key, value in budget.model_dump(exclude_unset=True).items())
        stdout.print(f"From the next reply: {asked or 'full depth, no target'}.", markup=False)

    def _answer(self, line: str) -> None:
        stream, stopped = self.chat.send(line, **self.options), False
        try:
            stopped = show_live(stream, self.styles, self.llm) if self.live else show_stream(stream, self.styles)
        finally:  # also after an error in the middle
            stdout.print(" [dim](stopped)[/]" if stopped else "")
            reply = stream.reply
            self.last = reply if reply.tokens else self.last
        if reply.finish_reason == "length":
            # The last token has not become a row yet, so the sequence needs room for one more.
            full = self.chat.sequence.length + 1 >= self.chat.sequence.max_length
            limit = f"Cut off after {len(reply.tokens)} tokens: give --max-new-tokens for longer replies"
            stdout.print(f"({_FULL if full else limit}.)", style="dim", markup=False, soft_wrap=True)

    def _use_file(self, command: str, name: str) -> None:
        if not name:
            raise InputError(f"{command}: needs the name of a file: write e.g. {command} talk.session")
        name = str(expanded(name))
        if command == "/save":
            size = self.chat.save(name)
            stdout.print(f"Saved {len(self.chat.messages)} messages in {name} ({size / 1e6:.1f} MB).", markup=False)
        else:
            self.chat = Chat.load(self.llm, name)
            said = next((str(one.get("content") or "") for one in reversed(self.chat.messages)), "nothing yet")
            stdout.print(f"{len(self.chat.messages)} messages; the last: {visible(said)}", markup=False)

    def _show_stats(self) -> None:
        if self.last is None:
            raise InputError("/stats: there is no reply yet: send a message first")
        show_summary(self.last, self.styles, stdout)
        show_checks(self.llm.quality, stdout)


def read_message() -> str:
    """Read one message from the terminal; a line that ends in a backslash continues on the next one."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines)


def parse_command(text: str) -> Budget:
    """Read a budget from ``key=value`` words.

    Raises:
        BudgetError: a word has another form, or :class:`Budget` refuses a value.
    """
    keys: dict[str, Any] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals:
            raise BudgetError(f"{word}: must be key=value, e.g. tpot_ms=15: write no spaces around '='")
        keys[key] = _value(value)
    return Budget.model_validate(keys)


def _value(text: str) -> bool | int | float | str:
    """Convert a value as a budget file would; words need no quotes, but may have those of messages and budget files."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text.strip("'\"")
