"""OpenAI's objects: chat completions and completions, whole and in pieces, with usage, timings and the cost of the replies.

Owns the names of the fields. It knows neither threads nor the web framework.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from balcony_runtime.reply import Reply, Token
from balcony_runtime.serve.bodies.asked import Asked
from balcony_runtime.serve.bodies.refusal import RefusedError
from balcony_runtime.serve.work.energy import EnergyMeter
from balcony_runtime.serve.work.jobs import Cost, Job, Scores
from balcony_runtime.structure.calls import CallReader, Piece, ToolCall
from balcony_runtime.structure.marks import ThoughtReader
from balcony_runtime.text.codec import TextCodec
from balcony_runtime.text.stream import TextStream

Best = Sequence[tuple[int, float]]
#: What a part of a character decodes to.
_PART = "\ufffd"


class Shapes:
    """The objects of one answer.

    Args:
        asked: the request.
        model: name of the model in the answer.
        codec: the bundle's tokenizer.
        prompts: text of the prompt of every choice, for ``echo``.
        meter: energy since the request.
    """

    def __init__(
        self,
        asked: Asked,
        model: str,
        codec: TextCodec,
        prompts: Sequence[str],
        meter: EnergyMeter,
    ) -> None:
        self._asked, self._codec, self._prompts, self._meter = asked, codec, prompts, meter
        self.id = ("chatcmpl-" if asked.chat else "cmpl-") + uuid.uuid4().hex
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._readers: dict[Job, CallReader | None] = {}
        self._thoughts: dict[Job, ThoughtReader | None] = {}
        self._texts: dict[Job, TextStream] = {}
        self._offsets = [0] * len(prompts)  # characters of each choice so far, for text_offset

    def opening(self, job: Job, scores: Scores | None) -> list[dict[str, Any]]:
        """Pieces before the first token of a choice: the role of a message, or the prompt that is echoed."""
        if self._asked.chat:
            return [self._piece(job, {"role": "assistant", "content": ""}, None, None)]
        if not self._asked.echo:
            return []
        return [self._piece(job, self._prompts[job.index], self.prompt_logprobs(job, scores), None)]

    def token(self, job: Job, token: Token) -> list[dict[str, Any]]:
        """The pieces of a token; none if it has nothing to say yet."""
        asked = self._asked
        texts: list[Any] = [token.text]
        reason: str | None = token.finish_reason
        if asked.chat:
            reader = self._reader(job)
            pieces = [Piece(token.text)] if reader is None else reader.push(token.id, token.text)
            if reader is not None and reason is not None:
                pieces += reader.finish()
                reason = _reason(reason, reader.calls)
            texts = _deltas(pieces)
            if (thoughts := self._thought_reader(job)) is not None:
                for delta in texts:
                    ends = reason is not None and delta is texts[-1]
                    delta.update(_thought(thoughts, delta.pop("content", ""), ends=ends))
        *named, text = texts
        if not text and reason is None and asked.logprobs is None and not asked.each_token:
            return []
        if asked.chat and not text and reason is None:
            text = {"content": ""}
        logprobs = None if token.logprob is None else self.logprobs(job, [token])
        found = [self._piece(job, one, None, None) for one in named] + [self._piece(job, text, logprobs, reason)]
        return [one | self.costs([job], [job.shown]) for one in found] if asked.each_token else found

    def _reader(self, job: Job) -> CallReader | None:
        """The reader of a choice's calls; None without tools."""
        if job not in self._readers:
            self._readers[job] = None if job.stream is None else job.stream.call_reader()
        return self._readers[job]

    def _thought_reader(self, job: Job) -> ThoughtReader | None:
        """The reader of a message's thought; None if the model has none, or the message is a document."""
        if job not in self._thoughts:
            self._thoughts[job] = None if self._asked.document else self._codec.thought_reader(job.ids)
        return self._thoughts[job]

    def empty(self, job: Job) -> dict[str, Any] | None:
        """A piece of a choice that says nothing; None where none is needed after a comment."""
        return self._piece(job, {} if self._asked.chat else "", None, None)

    def end(self, job: Job) -> dict[str, Any]:
        """The last piece of a choice that makes no tokens."""
        return self._piece(job, "", None, "length")

    def failure(self, refusal: RefusedError) -> list[dict[str, Any]]:
        """The last pieces of an answer that failed."""
        return [refusal.body]

    def settle(self, last: dict[str, Any], jobs: Sequence[Job]) -> None:
        """Add to the last piece what is known at the end: the cost."""
        last |= self.costs(jobs, [job.cost for job in jobs])

    def closing(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The piece after the last one of every choice: the usage."""
        return {**self._object(True, []), "usage": usage(jobs)}

    def whole(self, jobs: Sequence[Job], scores: Sequence[Scores | None]) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._choice(job, found) for job, found in zip(jobs, scores, strict=True)]
        found = {**self._object(False, choices), "usage": usage(jobs)}
        self.settle(found, jobs)
        return found

    def costs(self, jobs: Sequence[Job], costs: Sequence[Cost]) -> dict[str, Any]:
        """llama.cpp's ``timings``, and ``balcony``: depth, lateness, energy, the last reason and the verdicts."""
        cost = Cost.of(costs)
        facts = cost.facts() | {"joules": self._meter.joules() or None, "slots": [job.key for job in jobs]}
        facts["verdicts"] = [
            verdict.to_dict() | {"index": job.index}
            for job in jobs
            if job.ended and job.stream is not None
            for verdict in job.stream.request.watch.verdicts()
        ]
        return {"timings": cost.timings(prompt_tokens(jobs), cached_tokens(jobs)), "balcony": facts}

    def _choice(self, job: Job, scores: Scores | None) -> dict[str, Any]:
        # without tokens there is no stream
        reply = Reply("", (), 0, "length") if job.stream is None else job.stream.reply
        if self._asked.chat:
            logprobs = None if self._asked.logprobs is None else self.logprobs(job, reply.tokens)
            message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
            if (thoughts := self._thought_reader(job)) is not None:
                message |= {"content": ""} | _thought(thoughts, reply.text, ends=True)
            if calls := reply.tool_calls:
                message |= {"content": message["content"] or None, "tool_calls": [call.to_dict() for call in calls]}
            reason = _reason(reply.finish_reason, calls)
            return {"index": job.index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        logprobs = self.prompt_logprobs(job, scores) if self._asked.echo else None
        if self._asked.logprobs is not None:
            made = self.logprobs(job, reply.tokens)
            logprobs = made if logprobs is None else {key: logprobs[key] + made[key] for key in made}
        text = self._prompts[job.index] + reply.text if self._asked.echo else reply.text
        return {"index": job.index, "text": text, "logprobs": logprobs, "finish_reason": reply.finish_reason}

    def logprobs(self, job: Job, tokens: Sequence[Token]) -> dict[str, Any]:
        """Log-probabilities of tokens of a reply."""
        if self._asked.chat:
            content = [
                self._entry(token.id, token.logprob)
                | {"top_logprobs": [self._entry(*pair) for pair in token.top_logprobs]}
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        return self._listed(job, [(token.id, token.logprob, token.top_logprobs) for token in tokens])

    def prompt_logprobs(self, job: Job, scores: Scores | None) -> dict[str, Any] | None:
        """Log-probabilities of the tokens of an echoed prompt; None if they were not asked for."""
        if scores is None:
            return None
        listed = self._listed(job, list(zip(job.ids, scores.logprobs, scores.best, strict=True)))
        # The reply begins after the text of the prompt, which may differ from that of its tokens: many tokenizers normalize.
        self._texts[job], self._offsets[job.index] = self._codec.stream(job.ids), len(self._prompts[job.index])
        return listed

    def _listed(self, job: Job, tokens: Sequence[tuple[int, float | None, Best]]) -> dict[str, Any]:
        names, offsets, best = [], [], []
        if job not in self._texts:
            self._texts[job] = self._codec.stream(() if self._asked.echo else job.ids)
        for token, logprob, likeliest in tokens:
            names.append(name := self._name(token))
            offsets.append(self._offsets[job.index])
            said = self._texts[job].push(token)
            if not said and self._asked.echo:  # a control token that the prompt spells out is in its text
                spelled = self._codec.name(token)
                spells = self._prompts[job.index].startswith(spelled, self._offsets[job.index])
                said = spelled if spells and self._codec.control_token(spelled) == token else ""
            self._offsets[job.index] += len(said)
            found: dict[str, float] | None = None
            if logprob is not None:  # different tokens may have one text: the likelier one counts
                found = {}
                for other, value in likeliest:
                    found.setdefault(self._name(other), value)
                found.setdefault(name, logprob)
            best.append(found)
        return {
            "tokens": names,
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": best,
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._codec.name(token)
        name = f"token_id:{token}" if self._asked.as_ids else text
        raw = self._codec.raw(token) if _PART in text else text.encode()
        return {"token": name, "logprob": logprob, "bytes": None if raw is None else list(raw)}

    def _name(self, token: int) -> str:
        """Name of a token of a completion, which is a key: parts of characters have one text."""
        if self._asked.as_ids or _PART in (text := self._codec.name(token)):
            return f"token_id:{token}"
        return text

    def _piece(self, job: Job, text: Any, logprobs: Any, reason: str | None) -> dict[str, Any]:
        key = "delta" if self._asked.chat else "text"
        choice = {"index": job.index, key: text, "logprobs": logprobs, "finish_reason": reason}
        piece = self._object(True, [choice])
        return piece | {"usage": None} if self._asked.usage else piece

    def _object(self, piece: bool, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "text_completion"
        if self._asked.chat:
            name = "chat.completion.chunk" if piece else "chat.completion"
        return {**self._head, "object": name, "choices": choices}


def _thought(reader: ThoughtReader, text: str, *, ends: bool) -> dict[str, str]:
    """What a text adds to a message's thought and content, under llama.cpp's names."""
    thought, content = reader.push(text)
    if ends:
        thought, content = (part + last for part, last in zip((thought, content), reader.finish(), strict=True))
    return {key: value for key, value in (("reasoning_content", thought), ("content", content)) if value}


def _deltas(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """The deltas of a message, at least one. The one with a call's name has no arguments, as at OpenAI: they come after it."""
    parts: list[list[Piece]] = [[]]
    for piece in pieces:
        if parts[-1] and parts[-1][-1].begun is not None:
            parts.append([])
        parts[-1].append(piece)
    return [_delta(part) for part in parts]


def _delta(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The delta of a message: content, and calls with their names first."""
    found: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if piece.call is None:
            if piece.text:
                found["content"] = found.get("content", "") + piece.text
        elif piece.begun is not None:
            calls[piece.call] = {"index": piece.call, **piece.begun.to_dict()}
        else:
            call = calls.setdefault(piece.call, {"index": piece.call, "function": {"arguments": ""}})
            call["function"]["arguments"] += piece.text
    return found | ({"tool_calls": list(calls.values())} if calls else {})


def _reason(reason: str | None, calls: Sequence[ToolCall]) -> str | None:
    """OpenAI's name for the end of a message; a call that a stop string cut is none that a client can run."""
    return "tool_calls" if calls and reason == "stop" and calls[-1].whole else reason


def prompt_tokens(jobs: Sequence[Job]) -> int:
    """Tokens of the prompts of an answer; a prompt with several replies counts once, as OpenAI has it."""
    return sum(len(ids) for ids in {id(job.ids): job.ids for job in jobs}.values())


def cached_tokens(jobs: Sequence[Job]) -> int:
    """Tokens of these prompts whose rows were there before the request; a prompt that was scored was computed for it."""
    first = [job for job in {id(job.ids): job for job in reversed(jobs)}.values() if job.score is None]
    return sum(0 if job.stream is None else job.stream.request.cached for job in first)


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """OpenAI's object ``usage``."""
    prompts, made = prompt_tokens(jobs), sum(job.cost.tokens for job in jobs)
    details = {"cached_tokens": cached_tokens(jobs)}
    return {
        "prompt_tokens": prompts,
        "completion_tokens": made,
        "total_tokens": prompts + made,
        "prompt_tokens_details": details,
    }
