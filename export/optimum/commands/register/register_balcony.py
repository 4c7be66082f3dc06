"""Registers ``optimum-cli export balcony`` with optimum, which looks for files in this namespace (PEP 420: no ``__init__``)."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any, get_args

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class BalconyExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum ships no types
    """The verb `balcony-edge export` under optimum's command line: the same code, its options and its errors."""

    COMMAND = CommandInfo(name="balcony", help="Export a causal LM with balconies as a Balcony Edge bundle.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options; each is the one of the same name of `balcony-edge export`."""
        parser.add_argument("model", help="Hugging Face directory, GGUF file, hub name, or 'demo'")
        parser.add_argument("output", type=Path, help="directory to make")
        parser.add_argument("--exits", required=True, help="exit layers (14,17,20) or depth factors (0.5x,0.6x,0.7x)")
        parser.add_argument("--balconies", type=Path, help="trained balconies; without them copies of the last layer")
        parser.add_argument("--precision", default="fp32", help="fp32, fp16, int8 or int4 [default: fp32]")
        parser.add_argument("--calibration", type=Path, action="append", help="text to round by; repeatable")
        parser.add_argument("--context-length", type=int, help="most tokens of a sequence")
        from balcony_edge.bundle.manifest import EnginePrecision  # noqa: PLC0415 - optimum imports this file at every start

        parser.add_argument(
            "--tensorrt", choices=get_args(EnginePrecision), help="also build TensorRT-RTX engines of this precision"
        )

    def run(self) -> None:
        """Export; a problem is one line on stderr and exit code 1."""
        from balcony_edge.cli import reported  # noqa: PLC0415 - optimum imports this file at every start
        from balcony_edge.cli.workstation.export import export  # noqa: PLC0415 - likewise

        options: dict[str, Any] = {key: value for key, value in vars(self.args).items() if key != "func"}
        reported(lambda: export(**options))


#: What optimum reads: (command, the command that it belongs under).
REGISTER_COMMANDS = [(BalconyExportCommand, ExportCommand)]
