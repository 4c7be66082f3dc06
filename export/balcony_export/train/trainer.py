"""Distillation of balconies (paper, sections 3 and 4.1): the frozen model teaches one decoder layer per exit.

Owns the loop: the rows and positions of a step, the loss (equation 2: the sum over exits of KL(full ‖ exit), a token mean over
positions without padding), how hard states are drawn, held-out evaluation, checkpoints. Data is
:mod:`balcony_export.data.corpus`, the backbone's states :mod:`.states`, the loss :mod:`.loss`, an exit's optimizers and average
:mod:`.learner`, rates :mod:`.schedule`, the run's files :mod:`.run_files`, tables and plots :mod:`.report`.

Everything random follows from seed and step, so a resumed run repeats what the killed run would have done. Every exit has its
own optimizer and clipping, so training exits together or alone gives the same weights, except that a position with a massive
activation at any exit is skipped for all of them.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]  # accelerate ships no types
from transformers import PreTrainedModel

from balcony_edge.errors import InputError, TrainingError, is_out_of_memory
from balcony_edge.files import locked
from balcony_export.data.corpus import Corpus, Order, Rows
from balcony_export.model.architecture import cast_weights
from balcony_export.model.balcony import Balcony, init_balconies
from balcony_export.model.balcony_files import check_directory, fingerprint, is_whole, of_other_runs, save_balconies
from balcony_export.model.exits import ExitModel
from balcony_export.train.attention import can_compile, use_block_attention
from balcony_export.train.config import TrainConfig
from balcony_export.train.learner import Learner
from balcony_export.train.loss import HeadLoss, VocabularyPart, VocabularySample
from balcony_export.train.parallel import Processes
from balcony_export.train.positions import pick_positions
from balcony_export.train.precision import DTYPES
from balcony_export.train.report import Judged, StepReport
from balcony_export.train.run_files import (
    CHECKPOINT,
    END,
    load_run,
    log_step,
    read_state,
    run_directory,
    save_run,
    trim_metrics,
)
from balcony_export.train.schedule import Schedule
from balcony_export.train.states import BackboneStates, StateCache, full_model, head_of

METRICS = "metrics.jsonl"
#: Rows on which the full model's most probable tokens are ranked: 8,192 positions rank the first 4,096 well.
_RANKING_ROWS = 16
#: Steps whose mean time is the run's speed.
_SPEED_STEPS = 200


class Start(NamedTuple):
    """Balconies that a run starts from, the rows of the corpus that they have learned from, and their directory."""

    balconies: dict[int, Balcony]
    rows_seen: int = 0
    home: Path | None = None


class Trainer:
    """One run. ``run()`` trains to the end and writes into ``output``.

    Args:
        model: The base model on the CPU, with attention implementation ``sdpa`` or ``eager``. It is frozen, converted to the
            recipe's precision, and moved to the device of the process.
        corpus: Rows to train on and held-out rows.
        config: The recipe.
        output: Directory for balconies, checkpoint and metrics.
        start: Balconies of all exits to start from; by default new ones, as the recipe says. The run begins after the rows
            that they have seen.
        teacher: Model that the exits learn from, treated as ``model`` is; by default the base model's own full depth.
        work: Directory of checkpoint and metrics; by default below ``output``, named after the exits.
        compiled: See :class:`HeadLoss`.

    Attributes:
        clock: Monotonic clock, seconds.
        factor: Fraction of the peak rate that the last step had.
        interrupted: Set by a signal handler or a report: the run ends after the step, and saves it.
        stopped: Whether the run ended so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        corpus: Corpus,
        config: TrainConfig,
        output: Path,
        *,
        start: Start | None = None,
        teacher: PreTrainedModel | None = None,
        work: Path | None = None,
        compiled: bool | None = None,
    ) -> None:
        self.processes = Processes()
        config.check()
        config.check_processes(self.processes.count)
        self.config, self.corpus, self.output = config, corpus, output
        self.clock: Callable[[], float] = time.monotonic
        self.factor, self.interrupted, self.stopped = 0.0, False, False
        self.work = work or run_directory(output, config.exits)
        self.base_facts = fingerprint(model)
        seed = config.seed if config.start == "random" else None
        self.exits = ExitModel(
            model, start.balconies if start else init_balconies(model, config.exits, config.module, random=seed)
        )
        self.full = full_model(self.exits, teacher)
        self.teacher_facts = None if teacher is None else fingerprint(teacher)
        self.balconies = self.exits.balconies
        self.start = start
        check_directory(output, self.base_facts, next(iter(self.balconies.values())))  # before the training
        self.device = self.processes.device
        self.dtype = dtype = DTYPES[config.precision]
        frozen = (self.exits,) if self.full is self.exits else (self.exits, self.full)
        for one in frozen:
            if self.device.type == "cpu" and (can_compile() if compiled is None else compiled):
                use_block_attention(*one.modules)
            one.model.requires_grad_(False)
        # taken in float32, before the conversion: positions are angles, and bfloat16 has three digits
        with torch.no_grad():
            self.layer_arguments = send_to_device(self.exits.layer_arguments(config.seq_len), self.device)
        for one in frozen:
            cast_weights(one.model, dtype)  # before it goes to the device, which may hold no more than that
            if self.processes.sharded:
                self.processes.shard(one.model, one.parts.decoder)
            else:
                one.model.to(self.device)  # type: ignore[arg-type]
        full_head = None if self.full is self.exits else head_of(self.full)
        self.head = HeadLoss(head_of(self.exits), full_head, dtype=dtype, compiled=compiled, kind=config.loss)
        self.learners = {e: Learner(balcony, config, dtype, self.device) for e, balcony in self.balconies.items()}
        self.schedule = Schedule(config.schedule, config.warmup_steps, config.decay_share)
        self.order = self._order(start.rows_seen if start else 0)
        self.step, self.wall_s = 0, 0.0  # wall_s: spent training, resumed parts included
        self.begun, self.begun_s = 0, 0.0  # step, and time of the clock, at which the rate's plan began
        self.best: dict[int, tuple[float, float]] = {}  # exit -> held-out KL and agreement of the written balcony
        self.states = BackboneStates(self.exits, self.full, corpus.train.tokens)
        self._held_out: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.sample = self._vocabulary_sample()

    # -- data

    def _order(self, first_row: int) -> Order:
        return Order(len(self.corpus.train.tokens), self.config.batch_rows, self.config.seed, first_row)

    def _vocabulary_sample(self) -> VocabularySample | None:
        """Sampler of a step's vocabulary, ranked on the first rows of the corpus; None to compare the whole vocabulary."""
        if not 0 < self.config.vocabulary < len(self.head.whole.weight) or self.config.loss == "ce":
            return None
        return VocabularySample(self.config.vocabulary, self.head.ranking(self._first_states()))

    def _first_states(self) -> torch.Tensor:
        """States before the head of the full model, of the first rows of the corpus  # (n, D)"""
        rows, seen = self.corpus.train.take(_RANKING_ROWS), []
        for first in range(0, len(rows.tokens), self.config.micro_rows):
            part = slice(first, first + self.config.micro_rows)
            states = self.states.of(rows.tokens[part])[-1]  # (B, T, D)
            used = torch.arange(self.config.seq_len)[None] < torch.from_numpy(rows.lengths[part])[:, None]  # (B, T)
            seen.append(states[used.to(states.device)])
        return torch.cat(seen)

    def _part(self, rows: npt.NDArray[np.int64]) -> VocabularyPart | None:
        """Part of the vocabulary that this step compares; from all of its rows, so the same in all passes and processes."""
        if self.sample is None:
            return None
        text = torch.from_numpy(self.corpus.train.tokens[rows]).long().flatten()
        return self.sample.draw(self.head.whole, text, [self.config.seed, self.step])

    def _open_cache(self) -> StateCache | None:
        shape = (len(self.config.exits) + 1, self.config.seq_len, self.exits.model.config.hidden_size)
        # the precision of the passes, too: where the residual sum is float32, the states of both have that type
        of = [self.base_facts, self.teacher_facts, self.config.precision, list(self.config.exits), self.corpus.digest]
        key = json.dumps([4, *of])  # 3: a teacher or none; 4: the precision
        most = len(self.corpus.train.tokens)
        dtype = self._held_out_states()[0][0].dtype  # some backbones keep their residual sum in float32
        return StateCache.within(self.config.cache_gb, self.work / "states.bin", most, shape, dtype, key)

    def positions_of(self, rows: Rows, states: torch.Tensor, seeds: list[list[int]]) -> torch.Tensor:
        """Flat indices of the positions in the loss: see :func:`pick_positions`  # (n,)"""
        return pick_positions(rows, states, seeds, self.config.positions, self.config.loss).to(self.device)

    # -- one step

    def _students(self, states: torch.Tensor, where: torch.Tensor) -> list[torch.Tensor]:
        """Normed states of every exit at flat positions  # (n, D) each"""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            pairs = zip(self.balconies.values(), states, strict=False)  # the last states are the full model's
            return [balcony.rows(state, where, **self.layer_arguments) for balcony, state in pairs]

    def train_step(self) -> dict[int, float]:
        """One optimizer step of every exit; returns the loss of each exit."""
        config, self.factor = self.config, self.schedule.factor(self.step, self.done)
        train, rows = self.corpus.train, self.order.rows(self.step)
        chunks = np.split(np.arange(config.batch_rows), config.batch_rows // config.micro_rows)
        # loss per exit, number of positions, number of processes that were interrupted
        sums = torch.zeros(len(config.exits) + 2, dtype=torch.float64, device=self.device)
        part, pull = self._part(rows), config.state_weight * (1 - self.done)
        for number in self.processes.share(len(chunks)):
            which = rows[chunks[number]]
            states, picked = self.states.at(which), Rows(train.tokens[which], train.lengths[which])
            where = self.positions_of(
                picked, states, [[config.seed, self.step, index] for index in chunks[number].tolist()]
            )
            sums[-2] += len(where)
            full = states[-1].flatten(0, 1)[where]
            # the position after each; the very last one has none, and no loss on the text uses it
            following = (where + 1).clamp(max=picked.tokens.size - 1)
            labels = torch.from_numpy(picked.tokens).long().to(self.device).flatten()[following]
            sums[:-2] += sums.new_tensor(self.head.backward(full, self._students(states, where), labels, part, pull))
        sums[-1] = self.interrupted  # now, and not before the passes, which may take a minute
        self.processes.sum([sums])
        *kls, counted, interrupts = sums.tolist()
        counted, self.stopped = max(counted, 1.0), interrupts > 0
        losses = {exit_layer: kl / counted for exit_layer, kl in zip(config.exits, kls, strict=True)}
        for exit_layer, learner in self.learners.items():
            self._require_finite(exit_layer, losses[exit_layer])
            gradients = self.processes.gradients(learner.balcony)
            self.processes.sum(gradients)
            for gradient in gradients:
                gradient.div_(counted)
            learner.update(self.step, self.factor)
        self.step += 1
        return losses

    @torch.no_grad()
    def evaluate(self, averaged: bool = False) -> dict[int, tuple[float, float]]:
        """``exit layer -> (KL, top-1 agreement)`` on the held-out rows, at as many positions of each row as in training."""
        totals = {e: [0.0, 0] for e in self.config.exits}
        count = 0
        exchanged = self.learners.values() if averaged else ()
        for learner in exchanged:
            learner.exchange()
        for states, where in self._held_out_states():
            full = states[-1].flatten(0, 1)[where]
            count += len(where)
            compared = self.head.compare(full, self._students(states, where))
            for exit_layer, (kl, same) in zip(self.config.exits, compared, strict=True):
                totals[exit_layer][0] += float(kl.sum())
                totals[exit_layer][1] += int(same.sum())
        for learner in exchanged:
            learner.exchange()
        return {e: (kl / count, hits / count) for e, (kl, hits) in totals.items()}

    def judged(self) -> dict[int, Judged]:
        """Quality of every exit on the held-out rows, with its averaged or its current weights, whichever are better.

        Raises:
            TrainingError: The KL of an exit is not finite: the last step was too large.
        """
        raw, averaged = self.evaluate(), self.evaluate(averaged=True)
        for exit_layer, (kl, _) in raw.items():
            self._require_finite(exit_layer, kl)
        return {e: min(Judged(*raw[e], False), Judged(*averaged[e], True), key=lambda one: one.kl) for e in raw}

    def _measured(self, others: dict[int, dict[str, torch.Tensor]]) -> dict[int, tuple[float, float]]:
        """Quality of other balconies of some exits, which take the place of the averages meanwhile."""
        kept = {e: self.learners[e].average for e in others}
        for exit_layer, one in others.items():
            self.learners[exit_layer].average = {name: value.to(self.device).float() for name, value in one.items()}
        found = self.evaluate(averaged=True) if others else {}
        for exit_layer, average in kept.items():
            self.learners[exit_layer].average = average
        return {e: found[e] for e in others}

    def _held_out_states(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``(states, positions)`` of the held-out rows, pass by pass. They are kept: 2.4 MB a row for the demo model."""
        if self._held_out is None:
            rows, size = self.corpus.held_out, self.config.micro_rows
            held_out = []
            for start in range(0, len(rows.tokens), size):
                part = Rows(rows.tokens[start : start + size], rows.lengths[start : start + size])
                states = self.states.of(part.tokens)
                held_out.append(
                    (states, self.positions_of(part, states, [[start + row] for row in range(len(part.tokens))]))
                )
            if not any(len(where) for _, where in held_out):
                raise InputError("the held-out rows have no position for the loss: give more text")
            self._held_out = held_out
        return self._held_out

    # -- the run

    @property
    def done(self) -> float:
        """Share of the run that is over, of its steps or of its minutes, 0 to 1."""
        if self.config.steps is not None:
            return (self.step - self.begun) / (self.config.steps - self.begun)
        assert self.config.minutes is not None
        return min(1.0, (self.clock() - self.begun_s) / (60 * self.config.minutes))

    @property
    def tokens(self) -> int:
        """Tokens that the run has seen, with repeats."""
        return self.step * self.config.batch_rows * self.config.seq_len

    def resume(self) -> bool:
        """Continue from the checkpoint in the work directory; returns False if there is none."""
        state = read_state(self.work)
        if state is None:
            return False
        # the balconies that a run began from no longer matter
        self.config = replace(self.config, start=state["recipe"]["start"])
        recipe = self.config.recipe()
        differing = [key for key in recipe if recipe[key] != state["recipe"].get(key)]
        differing += ["base model"] if state["base"] != self.base_facts else []
        differing += ["teacher"] if state["teacher"] != self.teacher_facts else []
        differing += ["data"] if state["corpus"] != self.corpus.digest else []
        if differing:
            raise TrainingError(
                f"{self.work}: its checkpoint was made with another {', '.join(differing)}: "
                "give the same options, model and data, or another output directory"
            )
        load_run(self.work, self.learners)
        self.step, self.wall_s = state["step"], state["wall_s"]
        self.order = self._order(state["first_row"])
        # without balconies that a killed run has half replaced: the next checkpoint writes them again
        self.best = {int(e): (kl, hits) for e, (kl, hits) in state["best"].items() if is_whole(self.output, int(e))}
        self.best |= self._measured(of_other_runs(self.output, self.config.exits, recipe))
        steps, planned = self.config.steps, state["steps"]
        if steps is not None and steps <= self.step and steps != planned:
            raise InputError(f"{steps} steps (--steps or --tokens): {self.step} are already done: give more")
        # the rate begins anew after the last step of a plan, and after minutes
        begins_anew = planned is None or (steps != planned and self.step >= planned)
        self.begun = self.step if begins_anew else state["begun"]
        return True

    def checkpoint(self, judged: dict[int, Judged] | None = None) -> None:
        """Write the run's state if it is finite, and those judged balconies that are better than the ones written before."""
        for exit_layer, balcony in self.balconies.items():
            self._require_finite(exit_layer, sum(float(one.detach().double().sum()) for one in balcony.parameters()))
        for exit_layer, one in (judged or {}).items() if self.processes.writes else ():
            if exit_layer not in self.best or one.kl <= self.best[exit_layer][0]:
                self.best[exit_layer] = one[:2]
                self._write(self.output, exit_layer, one)
        state = {
            "step": self.step,
            "wall_s": self.wall_s,
            "best": self.best,
            "steps": self.config.steps,
            "begun": self.begun,
            "recipe": self.config.recipe(),
            "base": self.base_facts,
            "teacher": self.teacher_facts,
            "corpus": self.corpus.digest,
            "first_row": self.order.first,
        }
        if self.processes.writes:
            self.states.sync()
            save_run(self.work, self.learners, state)

    def _write(self, directory: Path, exit_layer: int, judged: Judged) -> None:
        learner = self.learners[exit_layer]
        if judged.averaged:
            learner.exchange()
        save_balconies(directory, {exit_layer: learner.balcony}, self.base_facts, self.facts(judged[:2]))
        if judged.averaged:
            learner.exchange()

    def _begin(self) -> None:
        """Open the cache, cut the metrics off at this step, and keep the balconies that a new run starts from."""
        self.states.cache = self._open_cache()
        trim_metrics(self.work / METRICS, self.step)
        if self.start is None or self.step:
            return
        self.best = self.evaluate()
        if self.processes.writes and self.start.home != self.output.resolve():
            for exit_layer, held_out in self.best.items():
                self._write(self.output, exit_layer, Judged(*held_out, False))

    def facts(self, held_out: tuple[float, float]) -> dict[str, Any]:
        """Record of the training for balconies.json."""
        return {
            "recipe": self.config.recipe(),
            "teacher": self.teacher_facts,
            "step": self.step,
            "tokens": self.tokens,
            "corpus_tokens": self.corpus.train.num_tokens,
            "epochs": round(self.step * self.config.batch_rows / len(self.corpus.train.tokens), 3),
            "held_out_kl": round(held_out[0], 4),
            "held_out_agreement": round(held_out[1], 4),
            "data": self.corpus.sources,
            "corpus": self.corpus.digest,
            "rows": self.order.learned(self.step),  # of the corpus; a next run begins after them
        }

    def run(self, report: Callable[[StepReport], None] = lambda progress: None) -> None:
        """Train to the planned end.

        Args:
            report: Called after every step.

        Raises:
            TrainingError: A loss is not finite, a file cannot be written, memory ran out, or another run writes there; the
                last checkpoint stays.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        taken = TrainingError(f"{self.work}: another training writes there: wait for its end, or give another -o")
        with locked(self.work, taken) if self.processes.writes else nullcontext():
            self._run(report)

    def _run(self, report: Callable[[StepReport], None]) -> None:
        first, before = self.step, self.wall_s
        try:
            # now, to refuse rows that cannot be judged, and because several processes must do this at the same time
            self._held_out_states()
            self._begin()
            self.begun_s = last_checkpoint = self.clock()
            ends: deque[float] = deque([self.begun_s], maxlen=_SPEED_STEPS)
            judged: dict[int, Judged] | None = None
            while self.done < 1:
                loss = self.train_step()
                ends.append(now := self.clock())
                self.wall_s = before + now - self.begun_s
                if self.step == first + 2:
                    ends.popleft()  # the first step compiles the loss
                per_step_s = (now - ends[0]) / (len(ends) - 1)
                due = now - last_checkpoint >= 60 * self.config.checkpoint_minutes
                judged = self.judged() if self.step % self.config.evaluate_every == 0 else None
                held_out = None if judged is None else {e: one.kl for e, one in judged.items()}
                tokens_per_s = self.config.batch_rows * self.config.seq_len / per_step_s
                progress = StepReport(self.step, self.done, loss, held_out, tokens_per_s, self._left_s(per_step_s))
                if self.processes.writes:
                    log_step(self.work / METRICS, progress, tokens=self.tokens, factor=self.factor, wall_s=self.wall_s)
                self.stopped = self.stopped and self.done < 1
                if due or judged or self.stopped:  # after the metrics, which a resumed run cuts off at the checkpoint
                    self.checkpoint(judged)
                    last_checkpoint = self.clock()
                if self.processes.writes:
                    report(progress)  # last: rich ends the process where the reader of a pipe has gone
                if self.stopped:
                    return
            judged = judged or self.judged()
            self.checkpoint(judged)
            for exit_layer, one in judged.items() if self.processes.writes else ():
                self._write(self.work / END, exit_layer, one)  # for `average`, also where the start was better
        except OSError as error:
            what = f"writing failed ({error.strerror or error}): {self._kept()}: free space, then {self._again()}"
            raise TrainingError(f"{self.work}: {what}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory() from error

    def _left_s(self, per_step_s: float) -> float:
        """Time to the end of the run, seconds."""
        if self.config.steps is not None:
            return (self.config.steps - self.step) * per_step_s
        assert self.config.minutes is not None
        return max(0.0, self.begun_s + 60 * self.config.minutes - self.clock())

    def _require_finite(self, exit_layer: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {self.step}: the loss of exit {exit_layer} is {loss}: {self._kept()}: start again in "
                "another directory with a lower --rate" + (f", --start {self.output}" if self.best else "")
            )

    def _kept(self) -> str:
        return "the last checkpoint is kept" if (self.work / CHECKPOINT).is_file() else "there was no checkpoint yet"

    def _again(self) -> str:
        return "continue with --resume" if (self.work / CHECKPOINT).is_file() else "train again"

    def _out_of_memory(self) -> TrainingError:
        config = self.config
        cure = "lower --micro-rows" if config.micro_rows > 1 else "free memory"
        return TrainingError(
            f"step {self.step}: out of memory at {config.micro_rows} rows of {config.seq_len} tokens a pass: {self._kept()}: "
            f"{cure} and {self._again()}; a new run may use a smaller --seq-len"
        )
