"""The process beside a replica that renders and tokenizes its prompts: `python -m` this module.

Who runs where. The *nursery* (this process) loads the tokenizer once, forks one *worker* for each lane, and
from then on only waits for workers that end. A lane is a socket whose other end the replica holds
(`prompt_pool`): a worker reads one request at a time from it and writes one reply.

    replica ──lane 0──> worker ─┐
            ──lane 1──> worker ─┼─ forked by the nursery, again after each death
            ──lane 2──> worker ─┘

A chat template is a program, and a tokenizer may take minutes: neither can be stopped from within Python. So
each has a budget of CPU time that the kernel itself ends, with a signal that says which one it was: SIGVTALRM
while rendering, SIGPROF while tokenizing. The nursery then answers in the dead worker's place and forks the
next one, which takes milliseconds because the tokenizer is there already.

What always holds.
- Every request that a worker took up gets one reply, the worker's or the nursery's. A worker ends by itself
  only while it works, so its last request is the one that is answered. Who else ends one (SIGKILL, SIGTERM)
  may do so between two requests: then all end, and the replica sees every lane close.
- Only the worker of a lane, and the nursery, hold its end: a lane without both reads as closed.
- Lanes that the replica closes end their workers, and the last of these the nursery: nobody stays behind.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from tidegate.engines.frames import receive, send
from tidegate.engines.limits import completion_limit, proved_too_long, refusal, truncated
from tidegate.engines.transformers.prompts import (
    PromptError,
    bad_word_ids,
    input_ids,
    render,
    tokenize,
    usable,
)
from tidegate.messages.codec import read_extension
from tidegate.messages.work import (
    ChatPrompt,
    Detokenize,
    Embed,
    Finish,
    Generate,
    Score,
    Tokenize,
    TokenLogprob,
    TokenPrompt,
    Tokens,
    Work,
)

QUICK_SECONDS = 0.25  # of CPU time, to render and again to tokenize, at the first try
RENDER_SECONDS = 2.0  # of CPU time
TOKENIZE_SECONDS = 2.0  # of CPU time, and for each token of the context:
TOKENIZE_SECONDS_PER_TOKEN = 5e-5  # some 25 times what a byte-level BPE takes
MEMORY_BYTES = 1 << 29  # what a worker may take on top of what it shares, and for each token of the context:
MEMORY_BYTES_PER_TOKEN = 1 << 12
MOST_TOKENS = 1 << 18  # of a prompt that is shown as tokens, or of tokens that are shown as text
# Characters of an answer that goes on. All are read at once, on the engine's thread, in a time that may grow
# with their square: 0.1 s for so many.
MOST_BEGUN = 1 << 16
MEMORY_MESSAGE = "This prompt takes more memory to prepare than it may. Please send a shorter one."

MOST_LANES = 16
RETIRE_KIB = 1 << 16  # a worker that has grown by so much makes room for a fresh one
CLOSED, FAILED, UNFIT, RETIRED = range(4)  # exit codes of workers


class Options(msgspec.Struct, frozen=True):
    """What the process is told once: `path` is the checkpoint's folder."""

    path: str
    context_length: int
    chat_template: str
    has_encoder: bool


class Task(msgspec.Struct, frozen=True, array_like=True):
    """Holds work to prepare. None: what is known of the tokenizer is asked for, and of its template."""

    model: str
    work: Work | None
    vocabulary_size: int
    is_quick: bool = False  # must be done in QUICK_SECONDS, or is tried again without


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """Holds a prompt's token ids, the whole answer, or the end of its request."""

    ids: list[int] = []
    finish: Finish | None = None
    most_characters_per_token: int = 0
    notes: list[str] = []
    bad_words: list[list[int]] = []
    answer: Tokens | None = None
    begun: str = ""  # what the prompt of a chat has written of the answer
    grammar: str = ""  # of an answer that may hold calls
    # Of inputs, as in `Prepared`.
    inputs: list[list[int]] = []
    types: list[list[int]] = []


def tokenize_seconds(context_length: int) -> float:
    return TOKENIZE_SECONDS + TOKENIZE_SECONDS_PER_TOKEN * context_length


class Prompts:
    """Prepares prompts within the bounds of a worker."""

    def __init__(
        self,
        tokenizer: Any,
        context_length: int,
        most_characters_per_token: int,
        *,
        has_encoder: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._has_encoder = has_encoder
        self.context_length = context_length
        self.most_characters_per_token = most_characters_per_token

    def reply(self, frame: bytes) -> Reply:
        try:
            task = TASKS.decode(frame)
            if task.work is None:
                return self._known(task.vocabulary_size)
            return self._prepare(task, task.work)
        except PromptError as error:
            return Reply(finish=refusal(error.code, str(error)))
        except MemoryError:
            return Reply(finish=refusal("PromptTooCostly", MEMORY_MESSAGE))

    def _known(self, vocabulary_size: int) -> Reply:
        from tidegate.engines.transformers.tokenizer import template_note

        with cpu_seconds(signal.ITIMER_VIRTUAL, RENDER_SECONDS):
            notes = template_note(self._tokenizer, vocabulary_size)
        return Reply(most_characters_per_token=self.most_characters_per_token, notes=notes)

    def _prepare(self, task: Task, work: Work) -> Reply:
        tokenizer, text = self._tokenizer, ""
        most = QUICK_SECONDS if task.is_quick else math.inf
        if isinstance(work, Embed | Score):
            with cpu_seconds(signal.ITIMER_PROF, min(most, tokenize_seconds(self.context_length))):
                inputs, types = input_ids(work, tokenizer, self.context_length, task.vocabulary_size)
            return Reply(inputs=inputs, types=types)
        prompt = work.prompt
        if not isinstance(prompt, TokenPrompt):
            with cpu_seconds(signal.ITIMER_VIRTUAL, min(most, RENDER_SECONDS)):
                text = render(prompt, tokenizer, task.model)
        if (
            isinstance(work, Generate)
            and work.sampling.truncate_prompt is None
            and (finish := proved_too_long(len(text), self.most_characters_per_token, self.context_length))
        ):
            return Reply(finish=finish)
        with cpu_seconds(signal.ITIMER_PROF, min(most, tokenize_seconds(self.context_length))):
            ids = (
                prompt.token_ids
                if isinstance(prompt, TokenPrompt)
                else tokenize(text, prompt, tokenizer, has_encoder=self._has_encoder)
            )
            if not isinstance(work, Generate):
                return answered(work, ids, tokenizer)
            bad_words = bad_word_ids(work.sampling.bad_words, tokenizer)
            ids = usable(ids, prompt, tokenizer, task.model, task.vocabulary_size)
        ids = list(truncated(ids, work.sampling, self.context_length, has_encoder=self._has_encoder))
        limit = completion_limit(len(ids), work, self.context_length, has_encoder=self._has_encoder)
        if isinstance(limit, Finish):
            return Reply(finish=limit)
        # Schemas of tools are programs too.
        with cpu_seconds(signal.ITIMER_VIRTUAL, min(most, RENDER_SECONDS)):
            rules = answer_rules(text, work, tokenizer)
        return rules if rules.finish is not None else replace(rules, ids=ids, bad_words=bad_words)


def answer_rules(text: str, work: Generate, tokenizer: Any) -> Reply:
    """Return what the answer to a chat is to be read by, and its grammar where it may hold calls."""
    from llguidance import LLMatcher

    from tidegate.engines.transformers.call_grammar import call_grammar
    from tidegate.engines.transformers.responses import answer_formats, begun_answer, reading_template

    prompt = work.prompt
    if not isinstance(prompt, ChatPrompt):
        return Reply()
    form = answer_formats(tokenizer).of(prompt)
    if form is None:
        return Reply()
    template = reading_template(form.response_template, has_tools=bool(prompt.tools))
    goes_on = prompt.add_generation_prompt or prompt.continue_final_message
    begun = begun_answer(template, text) if template is not None and goes_on else ""
    if len(begun) > MOST_BEGUN:
        raise PromptError(
            f"messages: the answer that is to go on has {len(begun)} characters; thoughts and calls are told "
            f"apart in {MOST_BEGUN} at most: send a shorter one."
        )
    grammar = call_grammar(form, prompt, begun, tokenizer, work.sampling.grammar)
    if grammar and (why := LLMatcher.validate_grammar(grammar)):
        # An answer that need not call is free where its calls cannot be enforced.
        if prompt.tool_choice != "auto" or work.sampling.grammar:
            said = "tools: they make no grammar of calls" if prompt.tools else "response_format"
            return Reply(finish=refusal("InvalidPrompt", f"{said}: {why}"))
        grammar = ""
    return Reply(begun=begun, grammar=grammar)


def answered(work: Tokenize | Detokenize, ids: list[int], tokenizer: Any) -> Reply:
    """Answer what asks for no more than its tokens."""
    if len(ids) > MOST_TOKENS:
        return Reply(
            finish=refusal(
                "InvalidPrompt",
                f"This prompt has {len(ids)} tokens, at most {MOST_TOKENS} are taken at once.",
            )
        )
    if isinstance(work, Detokenize):
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Reply(answer=Tokens(text=text))
    if not work.has_strings:
        return Reply(answer=Tokens(prompt_ids=ids))
    names = tokenizer.convert_ids_to_tokens(ids)
    strings = [TokenLogprob(token, name or "", None, b"") for token, name in zip(ids, names, strict=True)]
    return Reply(answer=Tokens(prompt_ids=ids, prompt_logprobs=strings))


TASKS = msgspec.msgpack.Decoder(Task, ext_hook=read_extension)
REPLIES = msgspec.msgpack.Decoder(Reply)


def main(control: socket.socket) -> None:
    """Import all, wait for the word to begin, then serve. The word is one byte with descriptors: a file that
    holds `Options`, then the lanes. None comes where the replica has ended."""
    import_all()
    from tidegate.engines.transformers.tokenizer import load_tokenizer, most_characters_per_token

    freeze()
    with control:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1 + MOST_LANES)
    if not descriptors:
        return
    with open(descriptors[0], "rb") as file:  # noqa: PTH123  # a descriptor is no path
        options = msgspec.msgpack.decode(file.read(), type=Options)
    tokenizer = load_tokenizer(Path(options.path), options.chat_template)
    most = most_characters_per_token(tokenizer)
    prompts = Prompts(tokenizer, options.context_length, most, has_encoder=options.has_encoder)
    freeze()
    watch(prompts, [socket.socket(fileno=descriptor) for descriptor in descriptors[1:]])


def import_all() -> None:
    """Import what workers use, once and not in each of them."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # or transformers imports it: 2 s and 600 MB
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    from tidegate.engines.transformers import call_grammar, responses, tokenizer  # noqa: F401


def freeze() -> None:
    """Keep the collections of the workers off what is there now: they would copy all of it."""
    gc.collect()
    gc.freeze()


def watch(prompts: Prompts, lanes: list[socket.socket]) -> None:
    """Keep a worker on each lane until the replica has closed all of them."""
    workers = {fork(prompts, lane, lanes): lane for lane in lanes}
    while workers:
        pid, status = os.wait()
        lane = workers.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code in (-signal.SIGKILL, -signal.SIGTERM, UNFIT):
            os.killpg(0, signal.SIGKILL)
        try:
            if code not in (CLOSED, RETIRED):
                finish = finish_of_death(code, prompts.context_length)
                reply = Reply([], finish, prompts.most_characters_per_token)
                send(lane, msgspec.msgpack.encode(reply))
        except ConnectionError:
            code = CLOSED
        if code == CLOSED:
            lane.close()
        else:
            workers[fork(prompts, lane, lanes)] = lane


def finish_of_death(code: int, context_length: int) -> Finish:
    """Say why a worker's request ends, from the worker's exit code."""
    if code == -signal.SIGVTALRM:
        return refusal(
            "PromptTooCostly",
            f"The model's chat template took more than {RENDER_SECONDS:g} s of CPU time over these messages, "
            "or the grammar of their tools.",
        )
    if code == -signal.SIGPROF:
        return refusal(
            "PromptTooCostly",
            f"This prompt takes more than {tokenize_seconds(context_length):.3g} s of CPU time to tokenize. "
            "Please send a shorter one.",
        )
    if code == -signal.SIGABRT:  # how the tokenizer's own allocations end
        return refusal("PromptTooCostly", MEMORY_MESSAGE)
    return refusal("PromptFailed", f"The process that prepared this prompt ended with {code}.")


def fork(prompts: Prompts, lane: socket.socket, lanes: list[socket.socket]) -> int:
    """Start the worker of a lane; returns its pid."""
    pid = os.fork()
    if not pid:
        code = UNFIT
        try:
            for other in lanes:
                if other is not lane:
                    other.close()
            limit_memory(MEMORY_BYTES + MEMORY_BYTES_PER_TOKEN * prompts.context_length)
            for number in (signal.SIGVTALRM, signal.SIGPROF):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGVTALRM, signal.SIGPROF))
            code = FAILED
            code = work(prompts, lane)
        except BaseException:  # a panic of the tokenizer is no Exception
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def work(prompts: Prompts, lane: socket.socket) -> int:
    """Serve a lane until the replica closes it, or a prompt made this process large, which it would stay.
    Returns the exit code."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + RETIRE_KIB
    try:
        while (frame := receive(lane)) is not None:
            send(lane, msgspec.msgpack.encode(prompts.reply(frame)))
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > most:
                return RETIRED
    except ConnectionError:  # the replica is gone
        pass
    return CLOSED


def limit_memory(more_bytes: int) -> None:
    """Let this process grow by so much, where the system can say how large it is."""
    if sys.platform != "linux":
        return
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    limit = pages * resource.getpagesize() + more_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@contextmanager
def cpu_seconds(timer: int, seconds: float) -> Iterator[None]:
    """End this process by the timer's signal where what follows takes longer."""
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)


if __name__ == "__main__":
    main(socket.socket(fileno=os.dup(0)))  # and nothing else becomes the standard input
