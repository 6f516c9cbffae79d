"""A request and what comes of it, between gateway, queue and replica.

All are frozen msgspec structs, encoded as msgpack arrays: the position of a field is its wire format,
so new fields are appended with a default and none is ever reordered. An envelope (`Request`, `Segment`) says
whose it is; what is asked is a union by tag, to which a task adds its own. What comes back is `Tokens`, piece
by piece, or the one `result` of a task that generates nothing.

    gateway ──Request──> queue ──Claim──> replica ──Segment──> queue (log + channel) ──Segment──> gateway

A *segment* is what one engine step adds to one request. The segments of a request are numbered from 0
without a gap (`seq`); concatenated they are the request's log, from which another replica continues and
any gateway can replay what it missed.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

TERMINAL_STATES = ("done", "failed", "cancelled", "expired")
FinishReason = Literal["stop", "length", "error", "cancelled", "expired"]


# What a model's own generation config answers where the client leaves it out.
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


# What is between the tokens of JSON that follows a schema, an answer's or a call's: as chat templates and
# models write it. There is no other, so a model that does not know how to go on cannot fill it with blanks,
# and more of it has only one continuation. llguidance's names.
JSON_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Sampling(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The choice of tokens and the conditions to stop. The gateway has resolved every default; of
    `left_out` the model may know a better one."""

    seed: int  # always set: continuation needs it, so the gateway draws one where the client gave none
    max_tokens: int | None = None  # None: up to the context length
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None  # None: no logprobs; 0: the chosen token's only; n: and n alternatives
    echo: bool = False  # completions: the prompt comes first in the text (and in logprobs)
    ignore_eos: bool = False
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0  # over prompt and answer
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    includes_stop: bool = False  # the stop string, or end token, that ends the text is part of it
    skips_special: bool = True  # special tokens have no text
    prompt_logprobs: int | None = None  # as top_logprobs, of the prompt
    returns_prompt_ids: bool = False
    allowed_token_ids: tuple[int, ...] = ()  # none: all
    bad_words: tuple[str, ...] = ()
    truncate_prompt: int | None = None  # keep so many of its last tokens; -1: as many as fit
    left_out: tuple[str, ...] = ()  # of MODEL_DEFAULTS, what the client did not say
    grammar: str = ""  # llguidance's, that the answer must follow; empty: free
    clips_limit: bool = False  # where the context has no room for max_tokens, as many as it has room for


class ChatPrompt(msgspec.Struct, frozen=True, array_like=True, tag="chat"):
    """Messages as the client sent them (validated); the replica renders the chat template.

    Those with `tool_calls` have the arguments as objects, as templates want them.
    """

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the answer goes on inside the last message
    add_special_tokens: bool = False  # besides those that the template writes
    template_args: dict[str, Any] = {}  # variables of the template
    tools: list[dict[str, Any]] = []  # that may be called, in OpenAI's shape
    tool_choice: str = ""  # auto, required, or the name of the one to call; empty: without tools
    parallel_tool_calls: bool = True  # more than one call in an answer


class TextPrompt(msgspec.Struct, frozen=True, array_like=True, tag="text"):
    text: str
    add_special_tokens: bool = True


class TokenPrompt(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    token_ids: list[int]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


class PairPrompt(msgspec.Struct, frozen=True, array_like=True, tag="pair"):
    """Two texts to judge together, such as a query and a document."""

    text: str
    pair: str


class Inputs(msgspec.Struct, frozen=True, array_like=True, tag="in"):
    """Neighbouring inputs of a call, of one kind, that one request carries: a call of thousands is some
    hundred requests. `first` is the place of its first one in the call."""

    items: list[TextPrompt | TokenPrompt | PairPrompt]
    first: int = 0


class Generate(msgspec.Struct, frozen=True, array_like=True, tag="generate"):
    """A text to generate. The answer comes back as `Tokens`."""

    prompt: Prompt
    sampling: Sampling


class Tokenize(msgspec.Struct, frozen=True, array_like=True, tag="tokenize"):
    """A prompt to count and show. The answer comes back as the prompt of `Tokens`, in one segment."""

    prompt: Prompt
    has_strings: bool = False  # each token as the vocabulary spells it, in `prompt_logprobs`


class Detokenize(msgspec.Struct, frozen=True, array_like=True, tag="detokenize"):
    """Tokens whose text comes back as that of `Tokens`, in one segment."""

    prompt: TokenPrompt


class Embed(msgspec.Struct, frozen=True, array_like=True, tag="embed"):
    """Inputs whose vectors come back as `Vectors`."""

    prompt: Inputs
    dimensions: int | None = None  # keep so many numbers of each vector, normalised again
    truncate: int | None = None  # keep so many of an input's first tokens; -1: as many as fit
    prompt_name: str = ""  # of the checkpoint's prompts, to be put before each text; empty: its default


class Score(msgspec.Struct, frozen=True, array_like=True, tag="score"):
    """Inputs that the head of a model judges. What it says comes back as `Scores`."""

    prompt: Inputs
    truncate: int | None = None  # as in `Embed`


Work = Generate | Tokenize | Detokenize | Embed | Score


class Request(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The envelope of what is asked: the unit of queueing, of leases and of terminal states.

    An HTTP call with `n` choices or several prompts becomes that many requests, submitted in one atomic
    step and named `{call id}.{index}`.
    """

    id: str
    tenant: str
    model: str
    revision: str
    gateway: str  # id of the gateway process whose channel gets the segments
    created: float  # unix seconds
    deadline: float  # unix seconds; past it the request must not reach an engine
    priority: int  # higher first; 0 is the default
    cost: int  # estimated tokens (input + output), corrected later by the replica
    work: Work
    key: str = ""  # id of the key that sent it


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability (natural log) of one token and of its likeliest alternatives."""

    token_id: int
    token: str  # the token alone, decoded; bytes of a partial character as U+FFFD
    logprob: float | None  # None only for the first token of a prompt, and where none was asked for
    raw: bytes
    top: list[tuple[int, str, float, bytes]] = []  # (token id, token, logprob, bytes), likeliest first
    rank: int = 0  # of a prompt's token among all, from 1


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """The end of a request. `code` and `message` are set for `error`, `cancelled` and `expired`."""

    reason: FinishReason
    code: str = ""  # a stable CamelCase reason: InvalidPrompt, PoisonRequest, ContextLengthExceeded, ...
    message: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stopped_by: str = ""  # the stop string that ended the text; empty: none did
    cached_tokens: int = 0  # of the prompt's, those that the first engine held from earlier requests


class CallDelta(msgspec.Struct, frozen=True, array_like=True):
    """A part of a call of a tool. The parts with one `index` joined are the call."""

    index: int  # of the call in its answer
    id: str  # with the name in the call's first part alone
    name: str
    arguments: str  # a piece of JSON text


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """The answer to `Generate`, or a part of it.

    `text` holds only characters that can never be taken back: partial UTF-8, possible beginnings of a stop
    string and of a call wait for later tokens. The tag is short because it travels with every segment.
    """

    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprob] = []
    # Both in the first segment alone, where asked for.
    prompt_ids: list[int] = []
    prompt_logprobs: list[TokenLogprob] = []
    # What of the answer is not its content, where the chat format tells: it is not in `text`.
    reasoning: str = ""
    calls: list[CallDelta] = []
    cached_tokens: int = 0  # in the first segment alone, for an attempt that goes on: see `Finish`

    @property
    def any_text(self) -> str:
        """Some of what the answer says, be it content or not; empty: nothing."""
        return self.text or self.reasoning or "".join([call.name + call.arguments for call in self.calls])


NO_TOKENS = Tokens()


class Vectors(msgspec.Struct, frozen=True, array_like=True, tag="v"):
    """The answer to `Embed`: little-endian float32, the vectors one behind the other."""

    dimensions: int
    values: bytes


class Scores(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """The answer to `Score`: for each input a number for each of the model's labels."""

    rows: list[list[float]]
    labels: list[str] = []


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """The envelope of what one engine step adds to one request.

    A request that ends outside an engine gets its last segment from Lua (`final_segment` in
    `store/lua/common.lua`): the first three fields alone.
    """

    request_id: str
    seq: int  # 0, 1, 2, ... per request, across attempts
    finish: Finish | None = None
    output: Tokens = NO_TOKENS
    prompt_tokens: int = 0  # in segment 0 (and wherever known)
    result: Vectors | Scores | None = None  # of a task that generates nothing, whole, in its only segment


class Claim(msgspec.Struct, frozen=True):
    """A request leased to a replica. `log` is what earlier attempts emitted; only a write that names
    `attempt` is accepted."""

    request: Request
    attempt: int
    log: list[Segment]
