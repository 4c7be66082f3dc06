"""Prefixes on disk: rows of earlier replies that a new process begins with.

Owns one directory: which file fits a prompt, and which go when there are too many bytes. Files that a user named stay, and so
do those of other bundles.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from balcony_edge.errors import BalconyError, InputError
from balcony_edge.files import remove_leftovers, require_writable
from balcony_runtime.backends.base import IntArray
from balcony_runtime.engine import Engine
from balcony_runtime.sessions import file
from balcony_runtime.token_sequence import TokenSequence
from balcony_runtime.tokens import common_length

_log = logging.getLogger(__name__)
#: End of the names of all files, and beginning of those that are written and removed without a user.
SUFFIX, OWN = ".session", "prefix-"


class PrefixFiles:
    """The session files of a directory that belong to a bundle. Threads may use it at once.

    Args:
        directory: place of the files; it is made when the first one is written.
        engine: engine of the sequences.
        most_bytes: bytes of this bundle's files that nobody named; beyond it, those that were not used for longest are removed.

    Raises:
        InputError: the directory cannot be written.
    """

    def __init__(self, directory: Path, engine: Engine, most_bytes: int) -> None:
        require_writable(directory, f"prefix_directory {directory}", InputError, "choose another place")
        # Files are written at the end, and a program may change its own directory before.
        self.directory = directory.absolute()
        self._engine, self._most_bytes = engine, most_bytes
        self._begin = f"{OWN}{engine.manifest.fingerprint[:12]}-"
        # File → its tokens (n,), its bytes, and the rows of its stages and balconies. Each use is one call, without a lock: the
        # handler of a signal may close the bundle, which writes files, in the middle of :meth:`longest`.
        self._known: dict[Path, tuple[IntArray, int, list[int]]] = {}
        with contextlib.suppress(OSError):  # the directory is not there yet
            # Also of saves under a name: clients choose names, and nobody might ever write that one again.
            remove_leftovers(directory, ".")
        self._trim()  # not only at the end: a device may lose its power, and a process without replies writes nothing
        for path in sorted(path for path, _ in self._files("[!.]*")):  # a user may give any name
            self._look(path)

    def add(self, path: Path) -> None:
        """Take notice of a file, and no more of those that others have removed: what their tokens take would only grow."""
        with contextlib.suppress(OSError):  # the directory may not be entered any more
            for gone in [one for one in self._known.copy() if not one.exists()]:
                self.forget(gone)
        self._look(path)

    def _look(self, path: Path) -> None:
        """Take notice of a file; one of another bundle, or a damaged one, is left alone."""
        try:
            self._know(path, file.look(path, self._engine))
        except (BalconyError, OSError) as error:
            _log.info("%s", error)

    def _know(self, path: Path, session: file.Session) -> None:
        size, notes = path.stat().st_size, session.notes
        rows = [*notes.stage_rows, *notes.balcony_rows]
        self._known[path] = session.tokens[0, : rows[0]].copy(), size, rows  # tokens that never ran have no rows

    def longest(self, tokens: IntArray, most_bytes: float) -> tuple[Path | None, int]:
        """The file of at most so many bytes that shares the longest prefix with some tokens (n,), and the length of that.

        Of several, the one that has the most of it in stages and balconies.
        """
        best, most = None, (0, 0)
        for path, (known, size, rows) in self._known.copy().items():
            shared = common_length(known, tokens) if size <= most_bytes else 0
            found = shared, sum(min(count, shared) for count in rows)
            if found > most:
                best, most = path, found
        return best, most[0]

    def forget(self, path: Path) -> None:
        """Do not look at a file again."""
        self._known.pop(path, None)

    def load(self, path: Path, sequence: TokenSequence) -> None:
        """Fill an empty sequence with a file's rows; the file is then the one that was used last.

        Raises:
            BalconyError: the file is gone, damaged, or too long; it is not looked at again.
        """
        try:
            session = file.load(path, sequence)
        except BalconyError:
            self.forget(path)
            raise
        with contextlib.suppress(OSError):
            self._touch(path, self.moment())
            self._know(path, session)  # another process may have written it anew

    def keep(self, sequence: TokenSequence, used_s: float | None = None) -> None:
        """Write a sequence, unless a file has all its rows, and remove what is then too much.

        Args:
            sequence: the sequence; nobody else may use it meanwhile.
            used_s: time at which it was used, in terms of :meth:`moment`; None for now.

        Raises:
            InputError: the file cannot be written.
        """
        used_s = self.moment() if used_s is None else used_s
        tokens = sequence.tokens[0, : sequence.stage_cursor[0]]  # those of an end that was forced never ran
        path, shared = self.longest(tokens, self._most_bytes)  # larger files are never read
        if path is not None and shared == len(tokens) and path.exists():
            rows, kept = [*sequence.stage_cursor, *sequence.balcony_cursor], self._known.get(path)
            if kept is not None and all(has <= there for has, there in zip(rows, kept[2], strict=True)):
                self._touch(path, used_s)
                return
        graphs = self._engine.backend.graphs.encode()  # those of the CPU and each engine set have rows of their own
        name = hashlib.blake2b(tokens.tobytes(), digest_size=12, key=graphs).hexdigest()
        path = self.directory / f"{self._begin}{name}{SUFFIX}"
        file.save(path, sequence, rows=len(tokens))
        self._touch(path, used_s)
        self.add(path)
        self._trim(path)

    def _trim(self, written: Path | None = None) -> None:
        """Remove what is too much, but not a file that was just written: the bound may be lower than at the last start."""
        own = sorted(self._own(), key=lambda found: (found[0] == written, found[1].st_mtime_ns))
        total = sum(status.st_size for _, status in own)
        for path, status in own:
            if total <= self._most_bytes or path == written:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            self.forget(path)
            total -= status.st_size

    def _own(self) -> Iterator[tuple[Path, os.stat_result]]:
        return self._files(f"{self._begin}*{SUFFIX}")

    def _files(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        with contextlib.suppress(OSError):  # Python before 3.13 raises that of a drive that has gone
            for path in self.directory.glob(pattern):
                with contextlib.suppress(OSError):
                    if path.is_file():
                        yield path, path.stat()

    def named_bytes(self, but: Path) -> int:
        """Bytes of the files that users named, of all bundles, without one of them."""
        files = self._files(f"*{SUFFIX}")
        return sum(status.st_size for path, status in files if path != but and not path.name.startswith(OWN))

    @property
    def bytes(self) -> int:
        """Bytes of this bundle's files that nobody named."""
        return sum(status.st_size for _, status in self._own())

    def moment(self) -> float:
        """The time, and later than all files: a device without a clock of its own begins again in 1970 at every start."""
        return max(time.time(), max((status.st_mtime for _, status in self._own()), default=0.0) + 0.1)

    def _touch(self, path: Path, used_s: float) -> None:
        """Note when a file was used."""
        with contextlib.suppress(OSError):
            os.utime(path, (used_s, used_s))
