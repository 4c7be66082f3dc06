"""One reply while the budget changes twice: the exit of every token, on the terminal and as a PNG.

    python examples/budget_timeline.py BUNDLE [--output timeline.png] [--prompt TEXT] [--tokens 180]

The targets follow from the costs of the exits on this machine, so that the picture looks the same everywhere: first a target
that the full depth meets, then one that only the shallower exits meet, then the first again. On the way back to the full
depth, the pending rows of the deeper stages are processed in chunks next to the tokens.

The reply is sampled, because a model of 135M parameters repeats itself if it always takes the likeliest token. The picture
shows every token, and its title counts the late ones. It needs matplotlib: `pip install '.[plot]'`.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
from rich.console import Console

import balcony_edge
from balcony_edge import LLM, Reply, SamplingParams, Token

mpl.use("Agg")
from matplotlib import pyplot as plt

#: Factor between an exit's price and its target. The controller keeps 5 % free before it goes deeper; noise needs the rest.
ROOM = 1.5
#: Small models write best with a low temperature and a penalty on tokens that they have already written.
SAMPLING = SamplingParams(temperature=0.4, top_p=0.9, repetition_penalty=1.15, seed=1)


def targets(llm: LLM) -> tuple[float, float]:
    """``(generous, tight)`` in ms: the full depth has room in the first; only shallower exits have room in the second."""
    costs, exits = llm.costs, llm.exit_layers
    steady = [costs.steady_ms(exit_layer, 64) for exit_layer in exits]
    return round(steady[-1] * ROOM, 1), round(min(steady[0] * ROOM, (steady[-2] + steady[-1]) / 2), 1)


def generate(llm: LLM, prompt: str, count: int, console: Console) -> Reply:
    """Stream up to ``count`` tokens; the budget tightens after a third of them and relaxes after half."""
    generous, tight = targets(llm)
    changes = {count // 3: tight, count // 2: generous}
    styles = dict(zip(llm.exit_layers[:-1], ("red", "yellow", "green"), strict=False))
    llm.budget = balcony_edge.Budget(tpot_ms=generous)
    console.print(f"[bold]target {generous} ms a token[/]")
    stream = llm.stream(prompt, max_new_tokens=count, sampling=SAMPLING)
    for made, token in enumerate(stream, 1):
        console.print(token.text, style=styles.get(token.exit_layer, "default"), end="", markup=False, soft_wrap=True)
        if (target := changes.get(made)) is not None:
            llm.budget = balcony_edge.Budget(tpot_ms=target)
            console.print(f"\n[bold]target {target} ms a token[/]")
    console.print()
    return stream.reply


def exit_runs(tokens: tuple[Token, ...]) -> str:
    """The exits in order, with runs of the same exit counted: ``30 ×40, 14 ×20, ...``."""
    starts = [0] + [i + 1 for i, (a, b) in enumerate(pairwise(tokens)) if a.exit_layer != b.exit_layer]
    ends = [*starts[1:], len(tokens)]
    return ", ".join(f"{tokens[a].exit_layer} ×{b - a}" for a, b in zip(starts, ends, strict=True))


def plot(reply: Reply, llm: LLM, output: Path) -> None:
    """Draw two panels over the token index: milliseconds with the target, and the exit with the pending rows."""
    colours = dict(zip(llm.exit_layers, ("#d1495b", "#edae49", "#66a182", "#2e4057"), strict=False))
    tokens = reply.tokens[1:]  # the first token's time is the prompt's
    index = range(1, len(tokens) + 1)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 5.2), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    for exit_layer in llm.exit_layers:
        points = [(i, t.latency_ms) for i, t in zip(index, tokens, strict=True) if t.exit_layer == exit_layer]
        label = f"exit {exit_layer}" + (" (full depth)" if exit_layer == llm.exit_layers[-1] else "")
        if points:
            top.scatter(*zip(*points, strict=True), s=16, color=colours.get(exit_layer, "grey"), label=label)
    late = [(i, t.latency_ms) for i, t in zip(index, tokens, strict=True) if t.late]
    if late:
        top.scatter(*zip(*late, strict=True), s=30, marker="x", linewidths=1, color="black", label="late")
    caught = [(i, t.latency_ms) for i, t in zip(index, tokens, strict=True) if t.caught_up_rows]
    top.scatter(
        *zip(*caught, strict=True) if caught else ([], []),
        s=60,
        facecolors="none",
        edgecolors="grey",
        label="catching up",
    )
    top.step(index, [t.target_ms or 0 for t in tokens], where="mid", color="black", linewidth=1, label="target")
    # The axis is logarithmic: a token that took five times as long fits, and the others stay distinguishable.
    top.set(
        ylabel="ms a token", yscale="log", title=f"One reply, three budgets: {len(late)} of {len(tokens)} tokens late"
    )
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_formatter("{x:g}")
    top.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.32))
    bottom.step(index, [t.exit_layer for t in tokens], where="mid", color="#2e4057")
    bottom.set(xlabel="token", ylabel="exit layer", yticks=llm.exit_layers, ylim=(0, llm.exit_layers[-1] + 2))
    pending = bottom.twinx()
    pending.fill_between(index, [t.pending_rows for t in tokens], step="mid", color="#d1495b", alpha=0.18)
    pending.set_ylabel("rows pending", color="#d1495b")
    pending.set_ylim(bottom=0)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="One reply while the budget changes twice.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, default=Path("timeline.png"))
    parser.add_argument("--prompt", default="Describe a quiet morning in a village by the sea.")
    parser.add_argument("--tokens", type=int, default=180)
    options = parser.parse_args()
    console = Console(highlight=False)
    with balcony_edge.load(options.bundle) as llm:
        reply = generate(llm, options.prompt, options.tokens, console)
        plot(reply, llm, options.output)
    console.print(f"exits in order: {exit_runs(reply.tokens)}")
    timed = len(reply.tokens) - 1  # the first token's time is the prompt's
    console.print(f"{reply.late_tokens} of {timed} tokens late; timeline: {options.output}")


if __name__ == "__main__":
    main()
