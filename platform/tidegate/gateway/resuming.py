"""A kept call's stream once more, from where its client was: on any gateway, beside any other reader of it.

The events are made anew from the call's body and the logs of its requests, so they are the same; those that
the client has are left out. Nothing is asked of a model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.responses import Response

from tidegate.errors import NotFound
from tidegate.gateway.asgi import Receive, Scope, Send
from tidegate.gateway.dialects import DIALECTS
from tidegate.gateway.dialects.base import AnswerHead, Dialect, Usage
from tidegate.gateway.generation import Admitted, Exchange, conducted, watch
from tidegate.gateway.services import Services
from tidegate.messages.kept import KeptCall
from tidegate.messages.registry import Key, ModelEntry

_BY_PATH: dict[str, Dialect] = {dialect.path: dialect for dialect in DIALECTS}


async def find_kept(services: Services, call_id: str, key: Key) -> KeptCall:
    """Raises `NotFound` for what is not kept, or is another tenant's."""
    kept = await services.kept.find(call_id, key.tenant)
    if kept is None:
        raise NotFound(
            f"Nothing is kept of a call {call_id[:80]!r}: it never was, its time is over, or it is not "
            "yours.",
            code="call_not_found",
        )
    return kept


class Resumption(Exchange):
    """Writes the rest of a stream. `seen`: so many events of each choice the client has."""

    def __init__(
        self,
        services: Services,
        scope: Scope,
        receive: Receive,
        send: Send,
        dialect: Dialect,
        kept: KeptCall,
        seen: Sequence[int],
    ) -> None:
        super().__init__(services, scope, receive, send, dialect)
        self._resumed = kept
        self._seen = seen

    async def run(self) -> None:
        services, kept = self._services, self._resumed
        call = self._dialect.read(kept.body)
        opened = services.calls.reopen(kept)
        watcher: asyncio.Task[None] | None = None
        try:
            async with services.kept.following(kept.id, services.calls.deliver_to(opened)):
                services.calls.submitted(opened)
                admitted = Admitted(call, head_of(kept), entry_of(services, kept), opened, self._seen)
                watcher = asyncio.get_running_loop().create_task(watch(self._receive, opened))
                await self._stream(admitted)
        finally:
            if watcher is not None:
                watcher.cancel()
            services.calls.close(opened, None)

    def _record(self, admitted: Admitted, usage: Usage, first_token: float | None) -> None:
        """The answer was counted when it was made."""


class Resumed(Response):
    """A route's answer: the rest of a kept call's stream."""

    def __init__(
        self, services: Services, kept: KeptCall, seen: Sequence[int], kind: type[Resumption]
    ) -> None:
        self._about = (services, kept, seen, kind)
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services, kept, seen, kind = self._about
        await conducted(kind(services, scope, receive, send, _BY_PATH[kept.path], kept, seen))


def head_of(kept: KeptCall) -> AnswerHead:
    return AnswerHead(kept.id, kept.created, kept.model, kept.revision, kept.context_length, kept.ended)


def entry_of(services: Services, kept: KeptCall) -> ModelEntry:
    return services.registry.models().get(kept.model) or _gone(kept)


def _gone(kept: KeptCall) -> ModelEntry:
    """A model that was removed since."""
    return ModelEntry(
        name=kept.model,
        created=kept.created,
        task="",
        engine="",
        precision="",
        quantization="",
        revisions={},
        accepts=False,
        ready=False,
        reason="",
        message="",
    )
