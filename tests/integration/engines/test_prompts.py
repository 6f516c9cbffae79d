"""Prompts in the process beside the engine: what takes too long or too much hurts only its own request."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.checkpoints import CHAT_TEMPLATE, tiny
from tests.engine_requests import a_request
from tests.waiting import await_until, wait_until
from tidegate.engines.base import EngineLoadError, Prepared
from tidegate.engines.create import create_engine
from tidegate.engines.transformers import prompt_pool
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.engines.transformers.prompt_pool import (
    LANES,
    LARGE_BYTES,
    SLOW_LANES,
    Beginner,
    PromptPool,
    start_ahead,
)
from tidegate.local.processes import lives
from tidegate.messages.work import Finish, Tokens
from tidegate.replica_args import EngineSpec

MISCHIEF = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "hoard": "{{ 'x' * 10**11 }}",
    "multiply": "{{ 'tide ' * 10**6 }}",
    "power": "{{ 9 ** ((8 + messages | length) ** 9) }}",
    "raise": "{{ raise_exception('not today' * 10**6) }}",
    "recurse": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
}
TEMPLATE = (
    "".join(
        f"{{% if messages[0]['content'].startswith('{word}') %}}{what}{{% endif %}}"
        for word, what in MISCHIEF.items()
    )
    + CHAT_TEMPLATE
)


@pytest.fixture(scope="module", autouse=True)
def as_replicas_start_them() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_pool, "Beginner", Beginner)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny(tmp_path_factory.mktemp("checkpoint") / "mischief", "llama")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Iterator[TransformersEngine]:
    engine = create_engine(
        EngineSpec(
            "transformers", path=str(checkpoint), precision="float32", device="cpu", args={"threads": 1}
        )
    )
    assert isinstance(engine, TransformersEngine)
    engine.load()
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: TransformersEngine, checkpoint: Path) -> TransformersEngine:
    """The one engine, with processes of this test's own."""
    loaded._prompts.close()
    loaded._prompts = loaded._language._prompts = PromptPool(checkpoint, loaded._context_length)
    loaded._prompts.wait_ready(loaded._vocabulary_size)
    return loaded


async def chat(engine: TransformersEngine, text: str) -> Prepared | Tokens | Finish:
    return await engine.prepare(a_request("r", [{"role": "user", "content": text}], max_tokens=5))


async def text(engine: TransformersEngine, prompt: str = "The tide") -> Prepared | Tokens | Finish:
    return await engine.prepare(a_request("r", prompt, max_tokens=5))


def nursery(engine: TransformersEngine) -> psutil.Process:
    crew = engine._prompts._crew
    assert crew is not None
    return psutil.Process(crew._process.pid)


def workers(engine: TransformersEngine) -> list[psutil.Process]:
    wait_until(lambda: len(nursery(engine).children()) == LANES)
    return list(nursery(engine).children())


async def test_templates_that_loop_end_and_keep_nobody_waiting(engine: TransformersEngine) -> None:
    over: list[str] = []

    async def note(name: str, prompt: str) -> Prepared | Tokens | Finish:
        made = await chat(engine, prompt)
        over.append(name)
        return made

    loops = [note("loop", "loop" + "." * LARGE_BYTES), *(note("loop", "loop") for _ in range(SLOW_LANES))]
    made = await asyncio.gather(*loops, *(note("innocent", "hello") for _ in range(20)))
    assert over == ["innocent"] * 20 + ["loop"] * len(loops)
    for finish in made[: len(loops)]:
        assert isinstance(finish, Finish)
        assert (finish.code, finish.message) == (
            "PromptTooCostly",
            "The model's chat template took more than 2 s of CPU time over these messages, or the grammar of "
            "their tools.",
        )
    after = await asyncio.gather(*(chat(engine, "hello") for _ in range(2 * LANES)))
    assert after == made[len(loops) :][: 2 * LANES]


@pytest.mark.parametrize(
    ("what", "code", "sentence"),
    [
        ("hoard", "PromptTooCostly", "memory"),
        ("multiply", "ContextLengthExceeded", "characters"),
        ("power", "PromptTooCostly", "CPU time"),
        ("raise", "InvalidPrompt", "not today"),
        ("recurse", "InvalidPrompt", "recursion"),
    ],
)
async def test_other_mischief_is_refused_with_its_reason(
    engine: TransformersEngine, what: str, code: str, sentence: str
) -> None:
    refused = await chat(engine, what)
    assert isinstance(refused, Finish)
    assert refused.code == code
    assert sentence in refused.message
    assert len(refused.message) < 2000
    assert isinstance(await chat(engine, "hello"), Prepared)


async def test_a_text_that_takes_too_long_to_tokenize_says_so(
    load: Callable[..., Any], checkpoint: Path
) -> None:
    """Its tokens swallow whitespace, so that characters alone prove nothing."""
    state = (checkpoint / "tokenizer.json").read_text()
    (checkpoint / "tokenizer.json").write_text(state.replace('"rstrip": false', '"rstrip": true'))
    try:
        engine = load(checkpoint)
        refused = await text(engine, "The tide rises, and the gate opens. " * 300_000)
        assert isinstance(refused, Finish)
        assert refused.code == "PromptTooCostly"
        assert "to tokenize" in refused.message or "memory" in refused.message
        long = await text(engine, "The tide rises, and the gate opens. " * 1000)
        assert isinstance(long, Finish)
        assert (long.code, long.prompt_tokens > 256) == ("ContextLengthExceeded", True)
    finally:
        (checkpoint / "tokenizer.json").write_text(state)


async def test_characters_that_prove_too_many_tokens_are_refused_before_any_work(
    engine: TransformersEngine,
) -> None:
    for worker in workers(engine):
        worker.send_signal(signal.SIGSTOP)
    refused = await text(engine, "x" * 5_000_000)
    assert isinstance(refused, Finish)
    most = engine._prompts.most_characters_per_token
    assert most > 1
    assert refused.code == "ContextLengthExceeded"
    assert f"5000000 characters, which are at least {-(-5_000_000 // most)} tokens" in refused.message
    for worker in workers(engine):
        worker.send_signal(signal.SIGCONT)
    assert isinstance(await text(engine), Prepared)


async def test_who_leaves_during_a_preparation_takes_no_lane_along(engine: TransformersEngine) -> None:
    for worker in workers(engine):
        worker.send_signal(signal.SIGSTOP)
    leaving = [asyncio.create_task(text(engine)) for _ in range(2 * LANES)]
    await await_until(lambda: len(engine._prompts._exchanges) == LANES)
    for task in leaving:
        task.cancel()
    await asyncio.wait(leaving)
    for worker in workers(engine):
        worker.send_signal(signal.SIGCONT)
    made = await asyncio.gather(*(text(engine, f"The tide {number}") for number in range(2 * LANES)))
    ids = [list(one.prompt) for one in made if isinstance(one, Prepared)]
    expected = [engine._language._tokenizer(f"The tide {number}")["input_ids"] for number in range(2 * LANES)]
    assert ids == expected


async def test_a_worker_that_a_prompt_made_large_makes_room_for_a_fresh_one(
    engine: TransformersEngine,
) -> None:
    before = {worker.pid for worker in workers(engine)}
    refused = await chat(engine, "x" * 20_000_000)
    assert isinstance(refused, Finish)
    assert refused.code == "ContextLengthExceeded"
    await await_until(lambda: len({worker.pid for worker in workers(engine)} - before) == 1)
    assert isinstance(await chat(engine, "hello"), Prepared)


@pytest.mark.parametrize("whom", ["a worker", "the nursery and a worker"])
async def test_what_a_killed_process_had_in_hand_is_prepared_by_the_next(
    engine: TransformersEngine, whom: str
) -> None:
    before = nursery(engine)
    stopped = workers(engine)
    for worker in stopped:
        worker.send_signal(signal.SIGSTOP)
    waiting = [asyncio.create_task(text(engine)) for _ in range(2 * LANES)]
    await await_until(lambda: len(engine._prompts._exchanges) == LANES)
    if whom != "a worker":
        before.kill()
    stopped[0].kill()
    made = await asyncio.gather(*waiting)
    assert all(isinstance(one, Prepared) for one in made)
    assert nursery(engine).pid != before.pid
    wait_until(lambda: not any(map(lives, stopped)))


async def test_a_prompt_over_which_every_process_dies_is_refused(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_pool, "TRIES", 1)
    stopped = workers(engine)
    for worker in stopped:
        worker.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(text(engine))
    await await_until(lambda: engine._prompts._exchanges)
    stopped[0].kill()
    refused = await waiting
    assert isinstance(refused, Finish)
    assert refused.code == "PromptFailed"
    assert isinstance(await text(engine), Prepared)


async def test_close_leaves_nobody_behind_and_no_caller_waiting(
    load: Callable[..., Any], checkpoint: Path
) -> None:
    engine = load(checkpoint)
    processes = [nursery(engine), *workers(engine)]
    assert not any("libtorch" in part.path for part in processes[0].memory_maps())
    for worker in processes[1:]:
        worker.send_signal(signal.SIGSTOP)
    waiting = [asyncio.create_task(text(engine)) for _ in range(2 * LANES)]
    await await_until(lambda: len(engine._prompts._exchanges) == LANES)
    engine.close()
    made = await asyncio.gather(*waiting)
    assert {one.code for one in made if isinstance(one, Finish)} == {"PromptFailed"}
    assert not any(isinstance(one, Prepared) for one in made)
    wait_until(lambda: not any(map(lives, processes)))


def test_a_folder_without_a_tokenizer_stops_the_load(tmp_path: Path) -> None:
    pool = PromptPool(tmp_path, 128)
    with pytest.raises(EngineLoadError, match="did not start") as caught:
        pool.wait_ready(512)
    pool.close()
    assert caught.value.reason == "TokenizerMissing"


@pytest.mark.parametrize("dies", [False, True])
def test_a_process_that_was_started_ahead_is_used_once(checkpoint: Path, *, dies: bool) -> None:
    """And one that has died meanwhile is not."""
    start_ahead()
    (ahead,) = prompt_pool._beginners
    if dies:
        ahead.process.kill()
        ahead.process.wait()
    pool = PromptPool(checkpoint, 512)
    try:
        pool.wait_ready(512)
        assert pool._crew is not None
        assert (pool._crew._process.pid == ahead.process.pid) is not dies
        assert prompt_pool._beginners == []
    finally:
        pool.close()


def test_a_process_that_was_started_ahead_ends_with_who_started_it() -> None:
    program = (
        "import time; from tidegate.engines.transformers import prompt_pool; prompt_pool.start_ahead();"
        "print(prompt_pool._beginners[0].process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        ahead = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
        wait_until(lambda: not lives(ahead), 60)
