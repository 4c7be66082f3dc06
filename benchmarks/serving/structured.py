"""Structured replies: what a mask costs, what forced tokens save, and whether every reply follows its schema.

    python -m benchmarks.serving.structured BUNDLE [--rounds 7] [--only speed,schemas]
        [--schemas 2000] [--from DIR] [--random --ends 6]

``speed``: greedy replies of up to ``TOKENS`` tokens at the full depth, interleaved. ``free`` is text without a structure.
``masked`` is a list of texts, all of whose tokens the model chooses under a mask. ``forced`` is a list of records, with at
least 30 % of forced tokens. ``paced`` and ``unforced`` are ``free`` and ``forced`` under a pace that no token reaches, with
which forced tokens are made one by one: their ratio is the cost of masks that leave few tokens. A figure is the time from
the first token to the last, by the number of tokens after the first.

``schemas``: one reply at temperature 1 to each of many schemas, eight at once, checked by jsonschema_rs, at the full depth
and at the shallowest exit in turn. They are random ones (:mod:`.schemas`), or files, evenly from all of a directory, e.g. of
``data`` in https://github.com/guidance-ai/jsonschemabench. Replies that end at the limit of tokens are counted apart, and
refusals by their reason. Random schemas are made to be supported; those with a keyword that is not must be refused by name.
``--random`` makes the bundle first: two layers of random weights with the demo's tokenizer, which draw all tokens alike.
``--ends`` adds to the logits of tokens that begin with a quote or a closing bracket, so that such a model comes to an end.

The last line is JSON: ``ms_a_token`` and ``forced_share`` by case, ``ratios`` (medians over rounds), ``schemas``,
``bars``. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import balcony_edge
from balcony_edge.budget import Budget
from balcony_edge.device.machine import cpu_name
from balcony_edge.errors import BalconyError, InputError
from balcony_runtime.decoding.sampling import SamplingParams
from balcony_runtime.llm import LLM
from benchmarks.rounds import bar, interleave, print_bars, ratio
from benchmarks.serving import schemas

TOKENS = 128
#: Most tokens of a reply to a random schema.
MOST_TOKENS = 400
#: Replies that run at the same time.
TOGETHER = 8
QUESTION = "Write a list of people from a novel, with their ages and cities."
TEXTS = {"type": "array", "items": {"type": "string", "minLength": 60}, "minItems": 50}
RECORDS = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": {
            "first_name": {"type": "string", "maxLength": 12},
            "age_in_years": {"type": "integer", "minimum": 0, "maximum": 120},
            "home_city": {"type": "string", "maxLength": 12},
        },
        "required": ["first_name", "age_in_years", "home_city"],
        "additionalProperties": False,
    },
}
#: A pace that no token reaches; its tokens are made one by one.
ONE_BY_ONE = Budget(max_pace_tps=1e6)


def reply(llm: LLM, schema: Any, budget: Budget) -> tuple[float, float]:
    """Milliseconds a token after the first, and share of forced tokens, of one greedy reply."""
    sampling = SamplingParams(json_schema=schema)
    stream = llm.stream(QUESTION, sampling=sampling, budget=budget, max_new_tokens=TOKENS, ignore_eos=schema is None)
    next(stream)
    begin_s = time.perf_counter()
    count = sum(1 for _ in stream)
    return 1000 * (time.perf_counter() - begin_s) / count, stream.reply.forced_tokens / (count + 1)


def speed(llm: LLM, rounds: int) -> dict[str, Any]:
    """Measure item ``speed``."""
    cases: dict[str, Callable[[], tuple[float, float]]] = {
        "free": partial(reply, llm, None, Budget()),
        "masked": partial(reply, llm, TEXTS, Budget()),
        "paced": partial(reply, llm, None, ONE_BY_ONE),
        "unforced": partial(reply, llm, RECORDS, ONE_BY_ONE),
        "forced": partial(reply, llm, RECORDS, Budget()),
    }
    samples = interleave(cases, rounds)
    times = {name: [sample[0] for sample in found] for name, found in samples.items()}
    return {
        "ms_a_token": {name: round(median(found), 3) for name, found in times.items()},
        "forced_share": {name: round(found[-1][1], 3) for name, found in samples.items()},
        "ratios": {
            "masked / free": round(ratio(times["masked"], times["free"]), 3),
            "unforced / paced": round(ratio(times["unforced"], times["paced"]), 3),
            "forced / free": round(ratio(times["forced"], times["free"]), 3),
        },
    }


def make_random(path: Path) -> None:
    """Export a Llama of two layers with random weights and the demo's tokenizer."""
    import torch  # noqa: PLC0415 - of a workstation, for this option only
    import transformers  # noqa: PLC0415

    from balcony_export.export import ExportOptions, export_bundle  # noqa: PLC0415
    from balcony_export.model.checkpoint import demo_model_path, load_tokenizer  # noqa: PLC0415
    from balcony_export.model.exits import ExitModel  # noqa: PLC0415

    tokenizer = load_tokenizer(demo_model_path())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    exits = ExitModel.open(transformers.LlamaForCausalLM(config).eval(), (1,))
    export_bundle(exits, tokenizer, path, ExportOptions("random", trained=False))


def of_directory(directory: Path, count: int) -> list[tuple[str, Any]]:
    """Names and schemas of ``count`` files, evenly from all of a directory's in alphabetical order."""
    files = sorted(directory.rglob("*.json"))
    if not files:
        raise InputError(f"--from {directory}: has no .json files: give a directory of schemas")
    step = max(len(files) / count, 1)
    chosen = [files[int(i * step)] for i in range(min(count, len(files)))]
    return [(str(file.relative_to(directory)), json.loads(file.read_text(encoding="utf-8"))) for file in chosen]


def _within_floats(text: str) -> float:
    """A number of JSON, of which the validator knows only those that a float holds."""
    return min(max(float(text), -sys.float_info.max), sys.float_info.max)


def valid(llm: LLM, asked: Sequence[tuple[str, Any]], ends: float = 0.0) -> dict[str, Any]:
    """Measure item ``schemas``: counts of replies by what became of them; ``ends`` as in the module's description."""
    import jsonschema_rs  # noqa: PLC0415 - of the development environment, for this item only

    bias = {}
    if ends:
        texts = ((token, llm.decode([token])) for token in range(llm.engine.manifest.model.vocab_size))
        bias = {token: ends for token, text in texts if text.startswith(('"', "}", "]"))}

    def reply(seed: int, name: str, schema: Any) -> tuple[str, int, int, str]:
        sampling = SamplingParams(json_schema=schema, temperature=1.0, seed=seed, logit_bias=bias)
        budget = Budget(exit_layer=llm.exit_layers[0]) if seed % 2 else Budget()
        try:
            found = llm.generate(QUESTION, sampling=sampling, budget=budget, max_new_tokens=MOST_TOKENS)
        except InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return "refused", 0, 0, str(error).partition(": change it")[0]
        kind = "cut" if found.finish_reason == "length" else "valid"
        if kind == "valid":
            try:
                document = json.loads(found.text, parse_float=_within_floats)
                jsonschema_rs.validator_for(schema, validate_formats=True).validate(document)
            except ValueError as error:  # of json and of jsonschema_rs
                kind = "invalid"
                print(f"{name}: {found.text!r}: {error}", file=sys.stderr)
        return kind, len(found.tokens), found.forced_tokens, ""

    with ThreadPoolExecutor(TOGETHER) as pool:
        replies = list(pool.map(reply, range(len(asked)), *zip(*asked, strict=True)))
    kinds = Counter(kind for kind, *_ in replies)
    return {
        **{kind: kinds[kind] for kind in ("valid", "invalid", "cut", "refused")},
        "forced_tokens": sum(forced for _, _, forced, _ in replies),
        "tokens": sum(tokens for _, tokens, _, _ in replies),
        "reasons": dict(Counter(reason for *_, reason in replies if reason).most_common()),
    }


def named(llm: LLM, seeds: Sequence[int]) -> int:
    """Number of schemas with an unsupported keyword that are refused by its name."""
    count = 0
    for seed in seeds:
        keyword, schema = schemas.unsupported(random.Random(seed))
        try:
            llm.compile_grammar(SamplingParams(json_schema=schema))
        except InputError as error:
            count += f'"{keyword}"' in str(error)  # each refusal has the word "not"
    return count


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--schemas", type=int, default=2000)
    parser.add_argument("--from", dest="directory", type=Path, help="directory of schemas; by default they are random")
    parser.add_argument(
        "--ends", type=float, default=0.0, help="added to the logits of tokens that end a text or a list"
    )
    parser.add_argument("--random", action="store_true", help="make the bundle first, with random weights")
    parser.add_argument("--only", default="speed,schemas")
    given = parser.parse_args()
    items = given.only.split(",")
    if unknown := set(items) - {"speed", "schemas"}:
        parser.error(f"--only {', '.join(sorted(unknown))}: must be speed, schemas or both")
    try:
        return run(given, items)
    except BalconyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(given: argparse.Namespace, items: Sequence[str]) -> int:
    """Measure and print; 1 if a bar is missed."""
    result: dict[str, Any] = {"benchmark": "structured", "cpu": cpu_name(), "bundle": given.bundle.name}
    bars: dict[str, dict[str, Any]] = {}
    if given.random:
        make_random(given.bundle)
    with balcony_edge.load(given.bundle) as llm:
        result |= {"precision": llm.engine.manifest.precision}
        if "speed" in items:
            result |= speed(llm, given.rounds)
            ratios, shares = result["ratios"], result["forced_share"]
            bars |= {
                "masked / free": bar(ratios["masked / free"], 1.03),
                "unforced / paced": bar(ratios["unforced / paced"], 1.03),
                "forced / free": bar(ratios["forced / free"], 1.0),
                "share of forced tokens": bar(shares["forced"], 0.3, at_least=True),
            }
        if "schemas" in items:
            if given.directory is not None:
                result["schemas"] = counts = valid(llm, of_directory(given.directory, given.schemas), given.ends)
                bars |= {"invalid replies": bar(counts["invalid"], 0)}
            else:
                made = [(f"schema {seed}", schemas.schema(random.Random(seed))) for seed in range(given.schemas)]
                counts = valid(llm, made, given.ends)
                refused = named(llm, range(given.schemas // 10))
                result["schemas"] = counts | {"refused_by_name": refused, "unsupported": given.schemas // 10}
                bars |= {
                    "invalid or refused replies": bar(counts["invalid"] + counts["refused"], 0),
                    "unsupported schemas refused by name": bar(refused, given.schemas // 10, at_least=True),
                }
    code = print_bars(bars)
    print(json.dumps(result | {"bars": bars}))
    return code


if __name__ == "__main__":
    sys.exit(main())
