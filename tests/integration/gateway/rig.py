"""A gateway on a loopback port over the real store, and a replica whose every segment the test decides."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from tests.waiting import await_until
from tidegate.gateway.app import create_app
from tidegate.gateway.door import door_class
from tidegate.gateway.services import Services, make_services
from tidegate.messages.queue import QueueLimits
from tidegate.messages.registry import ModelEntry
from tidegate.messages.work import (
    Claim,
    Embed,
    Finish,
    FinishReason,
    Score,
    Scores,
    Segment,
    TokenLogprob,
    Tokens,
    Vectors,
)
from tidegate.replica_args import Times
from tidegate.settings import Settings
from tidegate.store.connection import Connection
from tidegate.store.kept_calls import KeptCalls
from tidegate.store.keys import Keys
from tidegate.store.queue import GatewayQueue, ReplicaQueue
from tidegate.store.registry import Registry

MODEL, REVISION = "tide", "0123456789"
PROMPT_TOKENS = 7
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
_gateways = itertools.count()


def an_entry(**changes: Any) -> ModelEntry:
    values: dict[str, Any] = {
        "name": MODEL,
        "created": 1_700_000_000,
        "task": "chat",
        "engine": "simulated",
        "precision": "bfloat16",
        "quantization": "none",
        "revisions": {REVISION: 100},
        "accepts": True,
        "ready": True,
        "reason": "",
        "message": "",
        "limits": QueueLimits(),
        "replicas_ready": 1,
        "replicas_wanted": 1,
    }
    return ModelEntry(**(values | changes))


@dataclass
class Replica:
    """Claims when told to, and emits what it is told."""

    queue: ReplicaQueue
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: set[str] = field(default_factory=set)
    _seqs: dict[str, int] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)
    _claimed: list[Claim] = field(default_factory=list)

    async def next(self, count: int = 1) -> list[Claim]:
        """The next `count` requests, by choice index."""

        async def claimed() -> bool:
            self._claimed += await self.queue.claim(count - len(self._claimed))
            return len(self._claimed) == count

        await await_until(claimed)
        claims, self._claimed = sorted(self._claimed, key=lambda claim: claim.request.id), []
        return claims

    async def say(
        self,
        claim: Claim,
        text: str,
        finish: FinishReason | None = None,
        *,
        logprobs: Sequence[TokenLogprob] = (),
        code: str = "",
        message: str = "",
        stopped_by: str = "",
        cached_tokens: int = 0,
    ) -> None:
        """One segment of one token."""
        request_id = claim.request.id
        seq = self._seqs.get(request_id, 0)
        self._seqs[request_id] = seq + 1
        tokens = self._tokens[request_id] = self._tokens.get(request_id, 0) + 1
        end = None
        if finish is not None:
            end = Finish(finish, code, message, PROMPT_TOKENS, tokens, stopped_by, cached_tokens)
        segment = Segment(request_id, seq, end, Tokens([tokens], text, list(logprobs)), PROMPT_TOKENS)
        await self.queue.emit([(claim.attempt, segment)])

    async def emit(self, claim: Claim, *outputs: Tokens, finish: FinishReason) -> None:
        """The whole rest of an answer, a segment for each."""
        request_id = claim.request.id
        first = self._seqs.get(request_id, 0)
        segments = [Segment(request_id, seq, None, output) for seq, output in enumerate(outputs, first)]
        end = Finish(finish, prompt_tokens=PROMPT_TOKENS, completion_tokens=first + len(outputs))
        self._seqs[request_id] = first + len(outputs) + 1
        segments.append(Segment(request_id, first + len(outputs), end))
        await self.queue.emit([(claim.attempt, segment) for segment in segments])

    async def answer_everything(self) -> None:
        """One word for each request that comes, until cancelled."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            while claims := await self.queue.claim(64):
                for claim in claims:
                    if isinstance(claim.request.work, Embed | Score):
                        await self.judge(claim)
                    else:
                        await self.say(claim, "word", "stop")

    async def judge(self, claim: Claim) -> None:
        """A made-up result: of an input the vector (k, 1) or the scores, k being its place in the call."""
        work = claim.request.work
        assert isinstance(work, Embed | Score)
        inputs = work.prompt
        numbers = [float(inputs.first + place) for place in range(len(inputs.items))]
        result: Vectors | Scores
        if isinstance(work, Embed):
            result = Vectors(2, b"".join(struct.pack("<2f", number, 1.0) for number in numbers))
        else:
            result = Scores([[number, 0.25] for number in numbers], ["bad", "ok"])
        end = Finish("stop", prompt_tokens=PROMPT_TOKENS)
        segment = Segment(claim.request.id, 0, end, prompt_tokens=PROMPT_TOKENS, result=result)
        await self.queue.emit([(claim.attempt, segment)])

    async def answer(self, *words: str, count: int = 1, finish: FinishReason = "stop") -> list[Claim]:
        """Serve the next `count` requests whole, a segment per word."""
        claims = await self.next(count)
        for claim in claims:
            for word in words[:-1]:
                await self.say(claim, word)
            await self.say(claim, words[-1], finish)
        return claims


@dataclass
class Gateway:
    """One gateway under test with one model, one replica and one key."""

    address: str
    key: str
    key_id: str
    replica: Replica
    services: Services
    registry: Registry
    keys: Keys
    server: uvicorn.Server
    http: httpx.AsyncClient
    open_replica: Callable[..., Coroutine[Any, Any, Replica]]  # of another revision, or model

    async def put_model(self, **changes: Any) -> None:
        """Change the model and wait until the gateway has seen it."""
        entry = an_entry(**changes)
        await self.registry.put_model(entry)
        await await_until(lambda: self.services.registry.models().get(entry.name) == entry)

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return await self.http.post(path, json=body, headers=headers)

    async def failed_inside(self, path: str, body: dict[str, Any], **first: Any) -> httpx.Response:
        """A stream whose first word, `Good`, was read when its engine failed with the message `inside`."""

        async def begin() -> Claim:
            [claim] = await self.replica.next()
            await self.replica.say(claim, "Good", **first)
            return claim

        begun = asyncio.create_task(begin())
        async with self.http.stream("POST", path, json=body) as response:
            pieces, read = response.aiter_bytes(), b""
            while b"Good" not in read:
                read += await anext(pieces)
            await self.replica.say(await begun, "", "error", code="EngineError", message="inside")
            async for piece in pieces:
                read += piece
        return httpx.Response(response.status_code, headers=response.headers, content=read)


@asynccontextmanager
async def open_gateway(redis_url: str, key_prefix: str, **changes: Any) -> AsyncIterator[Gateway]:
    """`changes`: settings other than the defaults."""
    settings = Settings(redis_url=redis_url, key_prefix=key_prefix, **changes)
    gateway_id = f"gw-test-{next(_gateways)}"
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(Connection(redis_url))
        keys = Keys(connection, key_prefix=key_prefix)
        registry = Registry(connection, key_prefix=key_prefix)
        await registry.put_model(an_entry())
        key, secret = await keys.create("test", tenant="acme")
        for follower in (keys, registry):
            await follower.start()
            stack.push_async_callback(follower.close)
        queue = GatewayQueue(connection, key_prefix=key_prefix, gateway_id=gateway_id, times=settings.times)
        kept = KeptCalls(connection, key_prefix=key_prefix, times=settings.times)
        services = make_services(settings, gateway_id, queue, kept, keys, registry)
        replica = await _open_replica(stack, redis_url, key_prefix)
        server, address = await _serve(stack, services)
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=address, headers={"authorization": f"Bearer {secret}"}, timeout=30)
        )
        others = functools.partial(_open_replica, stack, redis_url, key_prefix)
        yield Gateway(address, secret, key.id, replica, services, registry, keys, server, http, others)


async def _open_replica(
    stack: AsyncExitStack, redis_url: str, key_prefix: str, revision: str = REVISION, model: str = MODEL
) -> Replica:
    connection = await stack.enter_async_context(Connection(redis_url))
    queue = ReplicaQueue(
        connection,
        key_prefix=key_prefix,
        model=model,
        revision=revision,
        replica_id=f"replica-{next(_gateways)}",
        times=Times(lease_seconds=60),
    )
    replica = Replica(queue)
    await queue.start(replica.wake.set, replica.cancelled.add)
    stack.push_async_callback(queue.close)
    return replica


async def _serve(stack: AsyncExitStack, services: Services) -> tuple[uvicorn.Server, str]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(services),
        http=door_class(services.settings),
        lifespan="on",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    task = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))

    async def stop() -> None:
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await task

    stack.push_async_callback(stop)
    await await_until(lambda: server.started or task.done())
    return server, f"http://127.0.0.1:{listener.getsockname()[1]}"
