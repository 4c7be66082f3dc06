"""Names under which the model is served: each name has a budget, and a request may change single keys of it.

Owns the folder of budget files and the order of the three ways to ask: the model's name, then headers, then the body.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unicodedata import normalize

from balcony_edge.budget import Budget, load_budget
from balcony_edge.bundle.manifest import Manifest
from balcony_edge.errors import BudgetError, InputError
from balcony_edge.files import visible
from balcony_runtime.serve.bodies.refusal import RefusedError, bad

_log = logging.getLogger(__name__)
#: Longest name that is looked up. Unpatched versions of Python bring marks of a text into order in quadratic time, under their
#: lock (https://github.com/python/cpython/issues/149079), and a name could be as long as a body.
LONGEST_NAME = 1000
#: Header → key of a budget. Those with ``llm-d`` are llm-d's present names.
HEADERS = {
    "x-slo-ttft-ms": "ttft_ms",
    "x-slo-tpot-ms": "tpot_ms",
    "x-llm-d-slo-ttft-ms": "ttft_ms",
    "x-llm-d-slo-tpot-ms": "tpot_ms",
}


def budget_files(folder: Path | None) -> dict[Path, Budget]:
    """Path → budget of each budget file of a directory; none without a directory.

    Raises:
        BudgetError: a file is refused.
        InputError: the directory cannot be read.
    """
    if folder is None:
        return {}
    try:
        files = visible(folder, ".toml")  # of a directory that may not be read not all names are gone: that is an error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"--budgets {folder}: is not a directory: give one with budget files (*.toml)") from error
    except OSError as error:
        raise InputError(f"--budgets {folder}: cannot be read ({error.strerror}): make it readable") from error
    return {path: load_budget(path) for path in files}


class Names:
    """The names of one bundle and their budgets.

    Args:
        name: name of the model; alone it stands for the server's own budget.
        own: the server's own budget.
        manifest: the bundle's manifest.
        folder: directory of budget files, or None.

    Raises:
        BudgetError: a file is refused.
        InputError: the folder cannot be read.
    """

    def __init__(self, name: str, own: Budget, manifest: Manifest, folder: Path | None) -> None:
        self.name, self._manifest, self._folder = normalize("NFC", name), manifest, folder
        #: Name → budget; the first is the model itself.
        self.budgets: Mapping[str, Budget] = {}
        self.read(own)

    def read(self, own: Budget) -> None:
        """Read the budget files; if one is refused, all stay as they are. ``own`` is the server's own budget."""
        found = {f"exit-{layer}": Budget(exit_layer=layer) for layer in self._manifest.exit_layers}
        found["lossless"] = Budget(policy="lossless")
        calibrated = self._manifest.confidence is not None
        for path, budget in budget_files(self._folder).items():
            try:
                path.stem.encode()  # a name in JSON and in metrics
                budget.for_bundle(self._manifest.agreement, calibrated=calibrated)
            except UnicodeEncodeError:
                _log.warning("%s: is not offered: its name is not UTF-8: rename it", path)
                continue
            except BudgetError as error:
                _log.warning("%s: is not offered: %s", path, error)
                continue
            found[normalize("NFC", path.stem)] = budget  # macOS may write names in another form than clients
        self.budgets = {self.name: own, **{f"{self.name}:{key}": budget for key, budget in found.items()}}

    def listed(self, name: str | None) -> str:
        """A name in the form in which /v1/models has it; None: the model's own."""
        return normalize("NFC", name[:LONGEST_NAME]) if name else self.name

    def budget(
        self, name: str | None, headers: Mapping[str, str], body: Any, most_tokens: int | None = None
    ) -> Budget | None:
        """The budget of a request; None for the server's own.

        Args:
            name: ``model`` of the request; None for the model itself.
            headers: headers of the request, with lower-case names.
            body: object ``budget`` of the request, or None.
            most_tokens: ``max_tokens`` of the request: a deadline without ``expected_tokens`` is for so many.

        Raises:
            RefusedError: the model is unknown, or a header is not a number.
            BudgetError: a key or a value is refused.
        """
        name = self.listed(name)
        base = self.budgets.get(name)
        if base is None:
            name = name[:100]
            close = difflib.get_close_matches(name, self.budgets, n=1)
            cure = f"did you mean {close[0]}?" if close else "/v1/models lists them"
            raise RefusedError(
                404, f"model = {name!r}: there is no such model; {cure}", "model_not_found", param="model"
            )
        given = {key: _number(header, headers[header]) for header, key in HEADERS.items() if header in headers}
        if body is not None and not isinstance(body, Mapping):
            raise bad("budget", body, "must be an object with keys of a budget file; e.g. {'tpot_ms': 25}")
        given |= body or {}
        if not given:
            return None if name == self.name else base
        found = base.model_dump(exclude_unset=True) | given
        if found.get("deadline_s") is not None and most_tokens is not None:
            found.setdefault("expected_tokens", most_tokens)
        return Budget.model_validate(found)


def _number(header: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise bad(header, text, "must be a finite number above 0; give milliseconds, e.g. 25")
    return value
