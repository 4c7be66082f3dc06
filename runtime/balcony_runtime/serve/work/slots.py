"""Slots on disk: the rows of a reply, saved and restored under a name, in the shape of llama.cpp's server.

Owns which tokens a slot had after its reply ended. The files are those of :mod:`balcony_runtime.sessions`.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balcony_edge.errors import InputError
from balcony_runtime.llm import LLM
from balcony_runtime.scheduling.pool import SequencePool
from balcony_runtime.serve.bodies.refusal import RefusedError, bad
from balcony_runtime.serve.work.jobs import Job
from balcony_runtime.sessions.prefixes import OWN, SUFFIX, PrefixFiles

_log = logging.getLogger(__name__)
#: Replies that have ended and whose slots are still known.
MOST_ENDED = 64
ACTIONS = ("save", "restore", "erase")


class Slots:
    """Files of slots. The event loop notes replies; the actions are for threads.

    Args:
        llm: the loaded bundle.
        most_bytes: bytes of files with names, from which on no more are saved.
    """

    def __init__(self, llm: LLM, most_bytes: int) -> None:
        self._llm, self._most_bytes = llm, most_bytes
        #: Slot → tokens of the prompt, and those of the reply. If a client has left it, its step may still add some.
        self._ended: OrderedDict[int, tuple[Sequence[int], Sequence[int]]] = OrderedDict()

    def ended(self, job: Job) -> None:
        """Remember a reply that has ended."""
        self._ended[job.key] = job.ids, () if job.stream is None else job.stream.ids
        while len(self._ended) > MOST_ENDED:
            self._ended.popitem(last=False)

    def act(self, action: str, key: int, name: object) -> dict[str, Any]:
        """Save, restore or erase the rows of a slot; returns llama.cpp's object.

        Args:
            action: one of ``ACTIONS``.
            key: number of the slot; for ``restore`` any number.
            name: name of the file; not for ``erase``.

        Raises:
            RefusedError: there is no such slot or file, the name is not one, the server has no directory, or it takes no file.
            BalconyError: the file cannot be read, or the rows are not kept any more.
        """
        pool = self._llm.pool
        if pool is None:
            raise RefusedError(
                400,
                "this engine keeps no rows of ended replies: serve with --device cpu, or fused engines; no recurrent model",
                "no_slots",
            )
        if action == "erase":
            return {"id_slot": key, "n_erased": pool.forget(self._tokens(key))}
        files = self._llm.prefix_files
        if files is None:
            raise RefusedError(400, "slots are not saved here: start the server with --prefix-dir DIR", "no_slots")
        path, begin = _path(files, name), time.perf_counter()
        try:
            if action == "save":
                self._refuse_full(files, path)
                rows, size = pool.save(self._tokens(key), path)
                files.add(path)
                done = {"n_saved": rows, "n_written": size}
            else:
                done = self._restored(pool, path)
        except InputError as error:  # clients need not know where the directory is
            told = str(error).replace(str(path), path.name)
            if action == "save" and isinstance(error.__cause__, OSError):  # a full disk is no mistake of the client
                _log.error("%s", error)
                raise RefusedError(507, told, "slots_full") from error
            raise InputError(told) from error
        took_ms = 1000 * (time.perf_counter() - begin)
        return {"id_slot": key, "filename": path.name, **done, "timings": {f"{action}_ms": took_ms}}

    def _refuse_full(self, files: PrefixFiles, path: Path) -> None:
        used, most_mb = files.named_bytes(path), self._most_bytes / 1e6
        if used >= self._most_bytes:
            raise RefusedError(
                507,
                f"{path.name}: {used / 1e6:.1f} MB are saved by name, and {most_mb:g} MB may be: replace one of them, or let "
                "the server's owner remove some or raise --saved-mb",
                "slots_full",
            )

    @staticmethod
    def _restored(pool: SequencePool, path: Path) -> dict[str, int]:
        if not path.is_file():
            raise RefusedError(404, f"filename = {path.name!r}: there is no such file: save it first", "no_such_file")
        return {"n_restored": pool.load(path), "n_read": path.stat().st_size}

    def _tokens(self, key: int) -> Sequence[int]:
        found = self._ended.get(key)
        if found is None:
            raise RefusedError(
                404,
                f"slot {key}: has no reply that has ended lately; balcony.slots of an answer has its number",
                "no_such_slot",
            )
        prompt, made = found
        return [*prompt, *made]


def _path(files: PrefixFiles, name: object) -> Path:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name) or name.startswith(OWN):
        raise bad(
            "filename",
            name,
            f"must be a plain name that does not begin with '{OWN}': give at most 100 letters, digits, '_', '.' and '-'",
        )
    return files.directory / (name if name.endswith(SUFFIX) else name + SUFFIX)
