"""Environments and model files of the peers, under ``.cache/peers``: one command makes them once.

Each peer has a virtual environment of its own with the pinned versions of ``requirements/NAME.txt``. Each model is made
inside its peer's environment from the demo's model: llama.cpp's from the GGUF file, the others from a Hugging Face
directory that holds the same weights, dequantized. Existing files are kept. A file gets its final name only when it is
complete.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from balcony_edge.errors import MissingDependencyError

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "peers"
MODELS = CACHE / "models"
CHECKPOINT = MODELS / "checkpoint"
#: npm package with llama.cpp v0.5.0, prebuilt with a CPU backend for every x86-64 generation.
NATIVE = "@node-llama-cpp/linux-x64@3.22.1"
#: Environment → the module of :mod:`benchmarks.peer_workers` that runs in it.
WORKERS = {
    "llama-cpp": "llama_cpp",
    "onnxruntime-genai": "onnxruntime_genai",
    "openvino-genai": "openvino_genai",
    "transformers": "transformers_torch",
}


@dataclass(frozen=True)
class PeerModel:
    """One model of one peer.

    Attributes:
        name: name in the results.
        peer: environment of the model.
        path: file or directory; None for the demo's own GGUF.
        make: command of the environment that makes the model from ``{source}`` at ``{target}``; None if there is nothing
            to make.
        options: settings that the figures depend on; passed to the worker and reported.
    """

    name: str
    peer: str
    path: Path | None
    make: tuple[str, ...] | None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def located(self) -> Path:
        """Path of the model."""
        if self.path is not None:
            return self.path
        from balcony_export.model.checkpoint import demo_model_path  # noqa: PLC0415 - torch is slow to import

        return demo_model_path()

    def weight_bytes(self) -> int:
        """Bytes of the tensors in a GGUF file, or of the weight files in a directory."""
        path = self.located()
        if path.is_file():
            return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
        files = [*path.glob("*.safetensors"), *path.glob("model.onnx.data"), *path.glob("openvino_model.bin")]
        return sum(file.stat().st_size for file in files)


def _gguf(kind: str) -> tuple[str, ...]:
    return ("python", "-m", "benchmarks.peer_workers.llama_cpp", kind, "{source}", "{target}")


def _genai(precision: str, *options: str) -> tuple[str, ...]:
    module = "onnxruntime_genai.models.builder"
    command = ("python", "-m", module, "-i", "{source}", "-o", "{target}", "-p", precision, "-e", "cpu")
    return (*command, "--extra_options", "prune_lm_head=true", *options)


_OPENVINO = (
    *("optimum-cli", "export", "openvino", "--model", "{source}", "--task", "text-generation-with-past"),
    *("--weight-format", "int4", "--group-size", "64", "--ratio", "1.0", "{target}"),
)

#: Models in the order of the table. ``head`` is the type of the stored token table, which is also the LM head.
PEER_MODELS = (
    PeerModel(
        "llama.cpp Q4_0", "llama-cpp", MODELS / "q4_0.gguf", _gguf("q4_0"),
        {"precision": "int4", "block_size": 32, "symmetric": True, "head": "Q8_0", "activations": "int8"},
    ),
    PeerModel(
        "llama.cpp Q4_1 (as shipped)", "llama-cpp", None, None,
        {"precision": "int4", "block_size": 32, "symmetric": False, "head": "Q8_0", "activations": "int8"},
    ),
    PeerModel(
        "llama.cpp Q8_0", "llama-cpp", MODELS / "q8_0.gguf", _gguf("q8_0"),
        {"precision": "int8", "block_size": 32, "symmetric": True, "head": "Q8_0", "activations": "int8"},
    ),
    PeerModel(
        "ONNX Runtime GenAI int4", "onnxruntime-genai", MODELS / "genai-int4",
        _genai("int4", "block_size=64", "accuracy_level=4", "fuse_mlp_gate_up=true"),
        {"precision": "int4", "block_size": 64, "symmetric": True, "head": "int4", "activations": "int8"},
    ),
    PeerModel(
        "ONNX Runtime GenAI int4 (block 128)", "onnxruntime-genai", MODELS / "genai-int4-128",
        _genai("int4", "block_size=128", "accuracy_level=4", "fuse_mlp_gate_up=true"),
        {"precision": "int4", "block_size": 128, "symmetric": True, "head": "int4", "activations": "int8"},
    ),
    PeerModel(
        "ONNX Runtime GenAI fp32", "onnxruntime-genai", MODELS / "genai-fp32", _genai("fp32"),
        {"precision": "float32", "head": "float32", "activations": "float32"},
    ),
    PeerModel(
        "OpenVINO GenAI int4", "openvino-genai", MODELS / "openvino-int4", _OPENVINO,
        {"precision": "int4", "block_size": 64, "symmetric": False, "head": "int8", "activations": "int8",
         "kv_cache": "uint8", "hint": "f32", "attention": "SDPA"},
    ),
    PeerModel("transformers fp32", "transformers", CHECKPOINT, None, {"precision": "float32"}),
    PeerModel("transformers bf16", "transformers", CHECKPOINT, None, {"precision": "bfloat16"}),
)  # fmt: skip


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment."""
    return CACHE / peer / "bin" / "python"


def missing(models: tuple[PeerModel, ...] = PEER_MODELS) -> list[str]:
    """Names of the environments and models that do not exist yet."""
    there = {model.peer: (CACHE / model.peer / "ready").exists() for model in models}
    absent = [peer for peer, ready in there.items() if not ready]
    return absent + [model.name for model in models if model.path is not None and not model.path.exists()]


def install(models: tuple[PeerModel, ...] = PEER_MODELS) -> None:
    """Make the missing environments and models; prints each command on stderr.

    It needs the extra ``[export]``, pip's index and, once, npm.

    Raises:
        MissingDependencyError: a command failed; its own output says why.
    """
    for peer in dict.fromkeys(model.peer for model in models):
        if not (CACHE / peer / "ready").exists():
            _environment(peer)
    if not CHECKPOINT.exists():
        _checkpoint()
    for model in models:
        if model.make is not None and model.path is not None and not model.path.exists():
            source = CHECKPOINT if model.peer != "llama-cpp" else PEER_MODELS[1].located()
            part = model.path.with_name(f"{model.path.name}.part")
            _remove(part)
            filled = [word.format(source=source, target=part) for word in model.make]
            _run([CACHE / model.peer / "bin" / filled[0], *filled[1:]])
            part.rename(model.path)


def _environment(peer: str) -> None:
    home = CACHE / peer
    _remove(home)
    # The environment needs no pip: the pip of the running environment installs into it.
    _run([sys.executable, "-m", "venv", "--without-pip", home])
    requirements = Path(__file__).with_name("requirements") / f"{peer}.txt"
    _run([sys.executable, "-m", "pip", "--python", python_of(peer), "install", "--quiet", "-r", requirements])
    if peer == "llama-cpp":
        with tempfile.TemporaryDirectory() as directory:
            _run(["npm", "pack", "--silent", "--pack-destination", directory, NATIVE])
            (archive,) = Path(directory).glob("*.tgz")
            with tarfile.open(archive) as file:
                file.extractall(home / "native", filter="data")
    (home / "ready").touch()


def _checkpoint() -> None:
    """Write the demo's model, dequantized, as a Hugging Face directory that transformers 4 and 5 both read."""
    from balcony_export.model.checkpoint import (  # noqa: PLC0415 - torch is slow
        demo_model_path,
        load_model,
        load_tokenizer,
        save_checkpoint,
    )

    part = CHECKPOINT.with_name("checkpoint.part")
    _remove(part)
    save_checkpoint(load_model(demo_model_path()), load_tokenizer(demo_model_path()), part)
    part.rename(CHECKPOINT)


def _run(command: list[str | Path]) -> None:
    words = [str(word) for word in command]
    print("+", *words, file=sys.stderr)
    try:
        subprocess.run(words, cwd=ROOT, check=True, stdout=sys.stderr, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    except FileNotFoundError:
        raise MissingDependencyError(f"{words[0]}: is not installed: install it, or leave out its peer") from None
    except subprocess.CalledProcessError as error:
        raise MissingDependencyError(f"{words[0]}: exit code {error.returncode}: see its output above") from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
