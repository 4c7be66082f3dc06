"""Prefixes on disk: rows of earlier replies that a new process begins with.

Owns one directory: which file fits a prompt, and which go when there are too many bytes. Files that a user named stay, and so
do those of other bundles.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
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
        self.directory = directory
        self._engine, self._most_bytes = engine, most_bytes
        self._begin = f"{OWN}{engine.manifest.fingerprint[:12]}-"
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[IntArray, int]] = {}  # file → its tokens (n,), and its bytes
        with contextlib.suppress(OSError):  # the directory is not there yet
            # Also of saves under a name: clients choose names, and nobody might ever write that one again.
            remove_leftovers(directory, ".")
        for path in sorted(path for path, _ in self._files("[!.]*")):  # a user may give any name
            self._look(path)

    def add(self, path: Path) -> None:
        """Take notice of a file, and no more of those that others have removed: what their tokens take would only grow."""
        with self._lock:
            known = list(self._known)
        with contextlib.suppress(OSError):  # the directory may not be entered any more
            for gone in [one for one in known if not one.exists()]:
                self.forget(gone)
        self._look(path)

    def _look(self, path: Path) -> None:
        """Take notice of a file; one of another bundle, or a damaged one, is left alone."""
        try:
            self._know(path, file.look(path, self._engine))
        except (BalconyError, OSError) as error:
            _log.info("%s", error)

    def _know(self, path: Path, session: file.Session) -> None:
        size = path.stat().st_size
        with self._lock:  # tokens that never ran have no rows
            self._known[path] = session.tokens[0, : session.notes.stage_rows[0]].copy(), size

    def longest(self, tokens: IntArray, most_bytes: float) -> tuple[Path | None, int]:
        """The file of at most so many bytes that shares the longest prefix with some tokens (n,), and the length of that."""
        best, longest = None, 0
        with self._lock:
            for path, (known, size) in self._known.items():
                if size <= most_bytes and (shared := common_length(known, tokens)) > longest:
                    best, longest = path, shared
        return best, longest

    def forget(self, path: Path) -> None:
        """Do not look at a file again."""
        with self._lock:
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
            self._touch(path)
            self._know(path, session)  # another process may have written it anew

    def keep(self, sequence: TokenSequence, age: int = 0) -> None:
        """Write a sequence, unless a file has rows of all its tokens, and remove what is then too much.

        Args:
            sequence: the sequence; nobody else may use it meanwhile.
            age: number of sequences that were used after it.

        Raises:
            InputError: the file cannot be written.
        """
        tokens = sequence.tokens[0, : sequence.stage_cursor[0]]  # those of an end that was forced never ran
        path, shared = self.longest(tokens, self._most_bytes)  # larger files are never read
        if path is not None and shared == len(tokens) and path.exists():
            self._touch(path, age)
            return
        name = hashlib.blake2b(tokens.tobytes(), digest_size=12).hexdigest()
        path = self.directory / f"{self._begin}{name}{SUFFIX}"
        file.save(path, sequence, rows=len(tokens))
        self._touch(path, age)
        self.add(path)
        self._trim(path)

    def _trim(self, written: Path) -> None:
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

    def _touch(self, path: Path, age: int = 0) -> None:
        """Note that a file was used; ``age`` others were used after it, each of which counts as a second.

        It is then not older than the others: a device without a clock of its own begins again in 1970 at every start.
        """
        with contextlib.suppress(OSError):
            newest = max((status.st_mtime for other, status in self._own() if other != path), default=0.0)
            os.utime(path, (max(time.time(), newest + 0.001) - age,) * 2)
