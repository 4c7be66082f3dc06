"""Sessions on disk: what is restored is what was saved, and everything else is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from safetensors.numpy import load_file

import balcony_edge
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.errors import ContextLengthError, InputError
from balcony_runtime.chat import Chat
from balcony_runtime.engine import Engine
from balcony_runtime.llm import LLM
from balcony_runtime.reply import Reply
from balcony_runtime.sessions import file
from balcony_runtime.token_sequence import TokenSequence
from tests.support.properties import CHANCE, examples
from tests.support.schedules import assert_equal, from_scratch
from tests.support.templates import write_template


@pytest.fixture(scope="module")
def saved(tiny_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenSequence]:
    """A file, and the sequence that it was made of: its stages and balconies have taken in different numbers of rows."""
    sequence = tiny_engine.new_sequence(max_length=200)
    sequence.advance(5, np.arange(60) % 320)
    sequence.advance(2, np.arange(30) % 320)
    sequence.run_stage(1, 11)
    sequence.append([5, 6])
    path = tmp_path_factory.mktemp("session") / "talk.session"
    assert file.save(path, sequence) == path.stat().st_size
    return path, sequence


def test_the_page_of_sessions_names_what_a_file_says_of_itself() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sessions.md").read_text(encoding="utf-8")
    assert not [key for key in ("balcony_session", "notes", *file.Notes.model_fields) if f"`{key}`" not in page]


def said(chat: Chat, text: str, **options: Any) -> Reply:
    stream = chat.send(text, max_new_tokens=12, ignore_eos=True, logprobs=2, **options)
    for _ in stream:
        pass
    return stream.reply


def test_a_conversation_goes_on_where_it_was(llm: LLM, tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "talk.session"
    chat = llm.chat(system="be brief")
    said(chat, "the quick brown fox jumps over the lazy dog")
    next(chat.send("and the dog?", max_new_tokens=12))  # a reply that was not read to its end belongs to it
    chat.save(path)
    want = said(chat, "why")
    with balcony_edge.load(tiny.path) as other:
        again = Chat.load(other, path)
        assert again.messages == chat.messages[:-2]
        rows = again.sequence.rows_run
        reply = said(again, "why")
        assert [(token.id, token.logprob) for token in reply.tokens] == [(t.id, t.logprob) for t in want.tokens]
        assert reply.cached_tokens == want.cached_tokens > 60, "the earlier turns were not computed again"
        assert again.sequence.rows_run - rows < 4 * (reply.prompt_tokens - reply.cached_tokens + 12) + 4
        again.reset()
        assert again.messages == [{"role": "system", "content": "be brief"}]
        again.save(path)
        left = other.decode(file.look(path, other.engine).tokens[0].tolist())
        assert "be brief" in left and "fox" not in left, "what was forgotten is not saved"


def test_all_that_a_sequence_is_comes_back(tiny_engine: Engine, saved: tuple[Path, TokenSequence]) -> None:
    path, sequence = saved
    back = tiny_engine.new_sequence(max_length=120)
    file.load(path, back)
    assert (back.tokens == sequence.tokens).all()
    assert (back.stage_rows, back.balcony_rows) == (sequence.stage_rows, sequence.balcony_rows)
    for exit_layer in (2, 3, 5):
        got = back.advance(exit_layer, [], num_logits=9)
        assert_equal(got, from_scratch(tiny_engine, exit_layer, sequence.tokens, 9))
    assert not np.shares_memory(
        back.state.parts([1] * 3, [1] * 2)["hidden_2"], sequence.state.parts([1] * 3, [1] * 2)["hidden_2"]
    )


def test_logits_are_the_same_to_the_bit(tiny_engine: Engine, saved: tuple[Path, TokenSequence]) -> None:
    path, sequence = saved
    one, two = (tiny_engine.new_sequence() for _ in range(2))
    one.fill(sequence.tokens, *sequence.parts(sequence.length))
    file.load(path, two)
    for exit_layer in (5, 2, 3, 5):
        assert (one.step(exit_layer, np.array([7])) == two.step(exit_layer, np.array([7]))).all()


def test_the_format_is_that_of_safetensors(saved: tuple[Path, TokenSequence]) -> None:
    path, sequence = saved
    tensors = load_file(path)
    assert (tensors["tokens"] == sequence.tokens).all()
    assert tensors["hidden_2"].shape == (1, 90, 32) and tensors["hidden_3"].shape == (1, 71, 32)
    assert tensors["stage_1.past_key_2"].shape[2] == 71 and tensors["stage_2.past_key_3"].shape[2] == 60


def test_eight_bits_are_smaller_and_close(tiny_engine: Engine, saved: tuple[Path, TokenSequence]) -> None:
    path, sequence = saved
    small = path.with_name("small.session")
    file.save(small, sequence, int8=True)
    tensors = load_file(small)
    key, scale = tensors["stage_0.past_key_0"], tensors["stage_0.past_key_0.scale"]
    assert key.dtype == np.int8 and abs(int(key.min())) <= 127 and scale.shape == (*key.shape[:-1], 1)
    exact = load_file(path)["stage_0.past_key_0"]
    assert np.abs(key * scale - exact).max() <= scale.max() / 2 + 1e-6
    caches = [sum(t.nbytes for name, t in load_file(one).items() if "past_" in name) for one in (small, path)]
    assert caches[0] < 0.32 * caches[1]
    back = tiny_engine.new_sequence()
    file.load(small, back)
    want = from_scratch(tiny_engine, 5, sequence.tokens, 1)
    assert 0 < np.abs(back.advance(5, []) - want).max() < 0.02 * np.abs(want).max()


def test_bfloat16_is_stored_in_eight_bits_as_well() -> None:
    """NumPy has no such type: its bits are unsigned integers, and were stored as they are."""
    bits = file._typed(np.random.default_rng(2).normal(size=(1, 2, 5, 16)).astype(np.float32), np.dtype(np.uint16))
    bits[0, 0, 0] = 0
    written = dict(file._Tensors({"stage_0.past_key_0": bits}, int8=True))
    assert [one.dtype for one in written.values()] == [np.int8, np.uint16]
    stored: Any = SimpleNamespace(tensors=written, array=written.__getitem__)
    back = file._Parts(stored)["stage_0.past_key_0"]
    step = file._floats(written["stage_0.past_key_0.scale"])
    assert back.dtype == np.uint16 and (back[0, 0, 0] == 0).all()
    # half a step, and a quarter where the product is rounded to bfloat16 again
    assert (np.abs(file._floats(back) - file._floats(bits)) <= 0.75 * step).all()


def test_other_bundles_and_shorter_contexts_are_refused(
    export_tiny: Callable[[str], Any],
    with_precision: Callable[[str, str], Path],
    tiny: Any,
    tiny_engine: Engine,
    saved: tuple[Path, TokenSequence],
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _ = saved
    with Engine.open(export_tiny("qwen3").path) as other, pytest.raises(InputError, match="with another bundle"):
        file.load(path, other.new_sequence())
    with Engine.open(with_precision("llama", "int4")) as other, pytest.raises(InputError, match="with another bundle"):
        file.load(path, other.new_sequence())
    with pytest.raises(ContextLengthError, match="92 tokens: this sequence holds 80"):
        file.load(path, tiny_engine.new_sequence(max_length=80))
    portable = Engine.of(Bundle.open(tiny.path).portable())
    with (
        portable,
        pytest.raises(InputError, match=r"talk.session: was saved by other graphs .*lowered, these are portable"),
    ):
        file.load(path, portable.new_sequence())
    with monkeypatch.context() as patch, pytest.raises(InputError, match="use the graphs that made it"):
        patch.setattr(tiny_engine.backend, "graphs", "engine set 01234")  # whose rows may have the same shapes
        file.load(path, tiny_engine.new_sequence())
    with pytest.raises(InputError, match=r"has no messages: load it with LLM\.load_prefix"):
        Chat.load(llm, path)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file with bytes changed, cut or added, or with a forged header whose hash fits."""
    kind = draw.choice(["bytes", "cut", "more", "forged"])
    if kind == "bytes":
        changed = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(draw.choice([64, 4000, len(content)]))] ^= draw.randint(1, 255)
        return bytes(changed)
    if kind == "cut":
        return content[: draw.randrange(draw.choice([12, 200, len(content)]))]
    if kind == "more":
        return content + draw.randbytes(draw.randint(1, 40))
    length = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    notes = json.loads(metadata["notes"])
    what = draw.choice(["notes", "tensor", "gone", "hashes", "odd", "tokens"])
    if what == "notes":
        notes[draw.choice(list(notes))] = draw.choice(
            [None, -1, [99, 98, 97], [1, 2, 3], [0], "x", {"a": 1}, [[]], 1e300]
        )
    elif what == "tensor":
        name = draw.choice(list(header))
        header[name][draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice(
            ["F64", "F32", [1, 2], [0, 1 << 60], [-8, 8], [1, 92, 1 << 40], {}, None, [[1], [2]], [0, 0]]
        )
    elif what == "tokens":
        header["tokens"][draw.choice(["dtype", "shape"])] = draw.choice(
            ["F32", "I8", [1] * 73, [0, 1 << 62], [92], [2, 46], [1, 92.0], [True, 92], [[1, 92]], []]
        )
    elif what == "gone":
        header.pop(draw.choice(list(header)))
    elif what == "hashes":
        notes["hashes"] = draw.choice([[], {}, None, {"tokens": 1}, dict.fromkeys(header, "0" * 64)])
    else:
        header = draw.choice([{}, {"tokens": 1}, {"tokens": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}])
    metadata["notes"] = (
        draw.choice(["[" * 5000, "", "1"]) if what == "odd" else json.dumps(notes, separators=(",", ":"))
    )
    forged = {"__metadata__": metadata, **header}
    if forged == json.loads(content[8 : 8 + length]):
        return content  # the value that was drawn was there already
    text = json.dumps(forged, separators=(",", ":")).encode()
    begin, size = len(file._BEGIN), len(file._NO_HASH)
    text = text[:begin] + file._hash_of_header(text) + text[begin + size :]
    return len(text).to_bytes(8, "little") + text + tensors


@pytest.mark.hypothesis
def test_damaged_files_are_refused_in_one_line(
    tiny_engine: Engine, saved: tuple[Path, TokenSequence], tmp_path: Path
) -> None:
    content, refusals = saved[0].read_bytes(), set()
    path = tmp_path / "damaged.session"

    @examples(240)
    @given(CHANCE)
    def property_holds(chance: random.Random) -> None:
        path.write_bytes(changed := damaged(content, chance))
        assume(changed != content)
        with pytest.raises((InputError, ContextLengthError)) as raised:
            file.load(path, tiny_engine.new_sequence())
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
        refusals.add(str(raised.value).partition("(")[2][:20])

    property_holds()
    assert len(refusals) > 6, "the damage is of several kinds"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="it is empty"):
        file.look(path, tiny_engine)
    with pytest.raises(InputError, match="No such file"):
        file.look(tmp_path / "none", tiny_engine)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="it is not a file"):
        file.look(tmp_path / "pipe", tiny_engine)
    path.write_text("hello " * 100)
    with pytest.raises(InputError, match="is not a session"):
        file.look(path, tiny_engine)


def test_a_killed_save_leaves_the_old_file(tiny: Any, saved: tuple[Path, TokenSequence], tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    path.write_bytes(saved[0].read_bytes())
    code = """
        import sys, time
        from pathlib import Path
        from balcony_runtime.engine import Engine
        from balcony_runtime.sessions import file
        engine = Engine.open(sys.argv[1])
        sequence = engine.new_sequence()
        sequence.advance(5, [1, 2, 3])
        whole = file._hash
        def slow(array):  # half of the file is written when the process is killed
            if array.dtype.kind == "f" and "waited" not in globals():
                globals()["waited"] = True
                print("writing", flush=True)
                time.sleep(60)
            return whole(array)
        file._hash = slow
        file.save(Path(sys.argv[2]), sequence)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tiny.path), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        writer.send_signal(signal.SIGKILL)
    assert path.read_bytes() == saved[0].read_bytes()
    with Engine.open(tiny.path) as engine:
        file.load(path, engine.new_sequence())
        file.save(path, engine.new_sequence())
    assert list(tmp_path.iterdir()) == [path], "the next save removes what the killed one left"


def test_a_file_that_is_cut_while_it_is_read_ends_no_process(tiny: Any, saved: tuple[Path, TokenSequence]) -> None:
    """As one on a drive that fails: a page that is mapped and cannot be read is a signal, and not an error."""
    path = saved[0].with_name("cut.session")
    path.write_bytes(saved[0].read_bytes())
    code = """
        import os, sys
        from pathlib import Path
        from balcony_runtime.engine import Engine
        from balcony_runtime.sessions import file
        check = file._Reader.check
        def cut(reader, names):  # the header was read
            os.truncate(sys.argv[2], 8192)
            check(reader, names)
        file._Reader.check = cut
        with Engine.open(sys.argv[1]) as engine:
            try:
                file.load(Path(sys.argv[2]), engine.new_sequence())
            except file.InputError as error:
                print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tiny.path), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "cut.session: is damaged" in done.stdout, done


def test_a_full_disk_leaves_nothing(small_disk: Path, llm: LLM) -> None:
    chat = llm.chat()
    said(chat, "the quick brown fox " * 8)
    path = small_disk / "talk.session"
    with pytest.raises(InputError, match=r"talk.session: cannot be written .*: choose another place"):
        chat.save(path)
    assert not list(small_disk.iterdir())


def test_messages_that_no_header_holds_keep_the_old_file(llm: LLM, tmp_path: Path) -> None:
    chat, path = llm.chat(), tmp_path / "talk.session"
    said(chat, "the quick brown fox")
    chat.save(path)
    before = path.read_bytes()
    chat.messages[0]["note"] = "語" * 800_000  # an escape of six bytes for each
    with pytest.raises(
        InputError, match=r"the messages take 4,[0-9,]* bytes of the file's header, which has 4,194,304"
    ):
        chat.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_names_that_the_system_refuses_are_named(llm: LLM, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be read"):
        Chat.load(llm, tmp_path / name)


@pytest.mark.parametrize(
    "extra",
    [{"meta": object()}, {"meta": "\udcff"}, {5: "x"}, {"meta": [{5: "x"}]}, {"meta": {"score": math.nan}}],
    ids=["object", "surrogate", "key", "inner key", "nan"],
)
def test_messages_that_are_no_json_are_named(llm: LLM, tmp_path: Path, extra: dict[Any, Any]) -> None:
    talk = llm.chat()
    for _ in talk.send({"role": "user", "content": "hi", **extra}, max_new_tokens=2):
        pass
    with pytest.raises(
        InputError, match=r"the messages cannot be saved as JSON .*: leave out what is not text or numbers"
    ):
        talk.save(tmp_path / "talk.session")
    assert list(tmp_path.iterdir()) == []


def test_messages_of_more_levels_than_are_read_keep_the_old_file(llm: LLM, tmp_path: Path) -> None:
    talk, path = llm.chat(), tmp_path / "talk.session"
    deep: Any = "x"
    for _ in range(197):
        deep = {"in": deep}
    talk.messages.append({"role": "user", "content": "hi", "note": deep})
    talk.save(path)
    talk.messages[0] = {**talk.messages[0], "note": {"in": deep}}
    with pytest.raises(InputError, match=r"cannot be saved as JSON \(.* or there are too many levels\)"):
        talk.save(path)
    assert Chat.load(llm, path).messages == [{**talk.messages[0], "note": deep}]


def test_a_prefix_that_is_too_short_to_be_kept_is_named(llm: LLM, tmp_path: Path) -> None:
    """It takes no place from rows that are kept."""
    path = tmp_path / "short.session"
    assert llm.save_prefix(list(range(10, 30)), path) == 20
    with pytest.raises(InputError, match=r"short.session: 20 rows are too few to be kept: save a prefix of 32 tokens"):
        llm.load_prefix(path)


def test_the_next_process_finds_a_prefix_of_any_name(tiny: Any, tmp_path: Path) -> None:
    prompt = list(range(10, 60))
    with balcony_edge.load(tiny.path, device="cpu", prefix_directory=tmp_path) as llm:
        llm.save_prefix(prompt, tmp_path / "instructions")
    with balcony_edge.load(tiny.path, device="cpu", prefix_directory=tmp_path) as llm:
        assert llm.generate([*prompt, 7], max_new_tokens=1).cached_tokens == len(prompt)


def test_a_link_into_a_private_directory_is_no_prefix(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, is_file = list(range(10, 60)), Path.is_file
    with balcony_edge.load(tiny.path, device="cpu", prefix_directory=tmp_path) as llm:
        llm.save_prefix(prompt, tmp_path / "talk.session")
    (tmp_path / "private.session").symlink_to("/root/private.session")

    def private(path: Path) -> bool:
        if path.name == "private.session":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", private)
    with balcony_edge.load(tiny.path, device="cpu", prefix_directory=tmp_path) as llm:
        assert llm.generate([*prompt, 7], max_new_tokens=1).cached_tokens == len(prompt)


@pytest.mark.parametrize("name", [".", "file/below"])
def test_a_prefix_that_cannot_be_written_is_refused_before_its_prompt_runs(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(TokenSequence, "catch_up", lambda *_: pytest.fail("its prompt runs"))
    with pytest.raises(
        InputError, match=r"is a directory: name a file in it|is not a directory\): choose another place"
    ):
        llm.save_prefix(list(range(10, 60)), tmp_path / name)


def test_an_empty_conversation_can_be_saved(llm: LLM, tmp_path: Path) -> None:
    llm.chat(system="be brief").save(tmp_path / "empty.session")
    again = Chat.load(llm, tmp_path / "empty.session")
    assert again.messages == [{"role": "system", "content": "be brief"}] and again.sequence.length == 0


_NO_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('no user') }}{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        _NO_USER + "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>",
        "{% for m in messages %}{% if m.role == 'user' %}[{{ messages[0].content if messages[0].role == 'system' }}\n\n"
        "{{ m.content }}]{% endif %}{% endfor %}<assistant>",
    ],
    ids=["Qwen 3.5", "Mistral"],
)
def test_a_saved_system_message_begins_conversations(bundle_copy: Path, tmp_path: Path, template: str) -> None:
    """Also where the template refuses it without a user, or writes it into the user's turn."""
    system = {"role": "system", "content": "the quick brown fox jumps over the lazy dog " * 6}
    with balcony_edge.load(bundle_copy) as llm:
        llm.codec = llm._requests._codec = write_template(bundle_copy, template)
        rows = llm.save_prefix([system], tmp_path / "system.session")
        reply = llm.generate([system, {"role": "user", "content": "why"}], max_new_tokens=1)
    assert reply.cached_tokens == rows > 40
