"""The client of :mod:`.worker`: starts one engine's process, loads its model and sends requests."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from balcony_edge.closing import Closing
from balcony_edge.errors import VerificationError
from benchmarks.peer_workers.install import ROOT


class Worker(Closing):
    """A process with one model loaded. A context manager that ends it.

    Attributes:
        load_s: load time, without imports.
        config: settings that the figures depend on, as the worker reports them.
        version: version of the engine.
    """

    def __init__(
        self, python: Path, module: str, model: Path, options: dict[str, Any], *, threads: int, huge_pages: bool
    ) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        if huge_pages:
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        self._name = f"{module} {model.name}"
        self._idle_s = self._idle_cpu_s = 0.0
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.peer_workers.{module}"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            answer = self.ask(do="load", model=str(model), threads=threads, options=options)
        except BaseException:
            self.close()
            raise
        self.load_s: float = answer["load_s"]
        self.config: dict[str, Any] = answer["config"]
        self.version: str = answer["version"]
        self._idle_s = self._idle_cpu_s = 0.0  # drop the time of the imports

    @property
    def idle_cpu(self) -> float:
        """CPU seconds per second between requests: near 0 unless the engine's pool spins."""
        return self._idle_cpu_s / self._idle_s

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and return its answer.

        Raises:
            VerificationError: the process ended instead; its output on stderr says why.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise VerificationError(f"{self._name}: ended while it was asked to {request['do']}: see its output above")
        answer: dict[str, Any] = json.loads(line)
        self._idle_s += answer.pop("idle_s")
        self._idle_cpu_s += answer.pop("idle_cpu_s")
        return answer

    def close(self) -> None:
        self._process.communicate()  # closes its input, which ends the process
