"""Whether an extracted exit gives the same greedy tokens in other engines as in our runtime.

    python -m benchmarks.models.extracted [--exit 14] [--balconies DIR] [--prompts 20] [--tokens 24]

An exit of the demo model is extracted as a plain checkpoint and exported as a bundle. The checkpoint is also converted to
GGUF for llama.cpp (float32, by the ``gguf`` package), and by ONNX Runtime GenAI's own builder for GenAI. The peers'
environments are those of ``python -m benchmarks.peers --install``.

The last line is JSON: ``exit``, and for each engine ``version``, ``same_replies`` (number of equal replies) and
``same_tokens`` (share of equal tokens; after the first token that differs, the following ones usually also differ).
Engines may differ where the two best logits are closer than rounding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from itertools import permutations
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from balcony_edge.budget import Budget
from balcony_edge.errors import MissingDependencyError
from balcony_export.export import ExportOptions, export_bundle
from balcony_export.model.checkpoint import demo_model_path, load_model, load_tokenizer
from balcony_export.model.exits import ExitModel
from balcony_export.variants.extract import extract
from balcony_runtime.llm import LLM
from benchmarks.peer_workers.install import ROOT, python_of
from benchmarks.peer_workers.process import Worker

#: Environments in which the other engines run.
PEERS = ("llama-cpp", "onnxruntime-genai")
#: Nouns of the prompts.
WORDS = (
    "river", "bridge", "winter", "market", "letter", "garden", "engine", "planet", "doctor", "island", "music", "teacher",
)  # fmt: skip


def write_gguf(model: Any, source: Path, target: Path) -> None:
    """Write a Llama as GGUF in float32, with the tokenizer and the metadata of the GGUF file of its base model."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type", "llama.block_count"):
            continue
        kinds = [*field.types, field.types[-1]]
        writer.add_key_value(key, field.contents(), kinds[0], kinds[1] if len(field.types) > 1 else None)
    writer.add_uint32("llama.block_count", model.config.num_hidden_layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for key, parameter in model.named_parameters():
        name, weight = names.get_name(key, try_suffixes=(".weight",)), parameter.detach().numpy()
        assert name is not None, key
        # llama.cpp rotates pairs of neighbouring values, Hugging Face rotates the two halves of a head.
        if count := heads.get(key.split(".")[-2]):
            split = weight.reshape(count, 2, weight.shape[0] // count // 2, -1)
            weight = split.swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def texts(count: int) -> list[str]:
    """Prompts of two words each; up to 132 of them differ."""
    pairs = list(permutations(WORDS, 2))
    chosen = (pairs[7 * place % len(pairs)] for place in range(count))  # 7 and 132 have no common factor
    return [f"The {first} and the {second}" for first, second in chosen]


def peer_replies(
    peer: str, module: str, model: Path, prompts: list[list[int]], tokens: int
) -> tuple[str, list[list[int]]]:
    """Version of an engine and its replies."""
    room = {"max_length": max(map(len, prompts)) + tokens}
    with Worker(python_of(peer), module, model, room, threads=2, huge_pages=False) as worker:
        replies = []
        for prompt in prompts:
            answer = worker.ask(do="generate", variant=None, prompt=prompt, steps=tokens - 1)
            replies.append([int(token) for token in answer["tokens"]])
        return worker.version, replies


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exit", type=int, default=14)
    parser.add_argument("--balconies", type=Path, default=ROOT / "balconies" / "smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    if absent := [peer for peer in PEERS if not python_of(peer).exists()]:  # before minutes of export
        raise MissingDependencyError(f"{', '.join(absent)}: not installed: run `python benchmarks/peers.py --install`")
    model, tokenizer = load_model(demo_model_path()), load_tokenizer(demo_model_path())
    exits = ExitModel.open(model, (options.exit,), options.balconies)
    prompts = [list(tokenizer(text).input_ids) for text in texts(options.prompts)]
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        small = extract(exits, tokenizer, options.exit, home / "small")
        export_bundle(exits, tokenizer, home / "bundle", ExportOptions("demo", trained=True))
        with LLM.open(home / "bundle", budget=Budget(exit_layer=options.exit)) as llm:
            ours = [
                [token.id for token in llm.stream(prompt, max_new_tokens=options.tokens, ignore_eos=True)]
                for prompt in prompts
            ]
        found: dict[str, tuple[str, list[list[int]]]] = {}
        theirs = []
        for prompt in prompts:
            with torch.no_grad():
                out = small.generate(  # type: ignore[operator]
                    torch.tensor([prompt]), max_new_tokens=options.tokens, do_sample=False, eos_token_id=None,
                    repetition_penalty=1.0,
                )  # fmt: skip
            theirs.append(out[0, len(prompt) :].tolist())
        found["transformers"] = (f"{transformers.__version__} on PyTorch {torch.__version__}", theirs)
        write_gguf(small, demo_model_path(), home / "small.gguf")
        found["llama.cpp"] = peer_replies("llama-cpp", "llama_cpp", home / "small.gguf", prompts, options.tokens)
        builder = [python_of("onnxruntime-genai"), "-m", "onnxruntime_genai.models.builder"]
        made = ["-i", home / "small", "-o", home / "genai", "-p", "fp32", "-e", "cpu"]
        subprocess.run([str(word) for word in (*builder, *made)], check=True, capture_output=True)
        found["ONNX Runtime GenAI"] = peer_replies(
            "onnxruntime-genai", "onnxruntime_genai", home / "genai", prompts, options.tokens
        )
    engines = {
        name: {
            "version": version,
            "same_replies": sum(a == b for a, b in zip(ours, replies, strict=True)),
            "same_tokens": round(float(np.mean(np.array(ours) == np.array(replies))), 4),
        }
        for name, (version, replies) in found.items()
    }
    for name, row in engines.items():
        print(f"{name:<20} {row}")
    print(json.dumps({"benchmark": "extracted", "exit": options.exit, "prompts": len(prompts), "engines": engines}))


if __name__ == "__main__":
    main()
