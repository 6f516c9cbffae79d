"""`GET /v1/requests/{call_id}/events`: the stream of a call that was made with event ids, from where its
client was."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import Response

from tidegate.errors import InvalidRequest
from tidegate.gateway.auth import KnownKey
from tidegate.gateway.dialects.responses import Responses
from tidegate.gateway.event_ids import seen_events
from tidegate.gateway.openapi import error_responses
from tidegate.gateway.responses import ResponseCallResumption
from tidegate.gateway.resuming import Resumed, Resumption, find_kept
from tidegate.gateway.services import Services
from tidegate.messages.registry import Key


def routes(services: Services) -> APIRouter:
    known = Depends(KnownKey(services.keys, services.settings))
    router = APIRouter(tags=["generation"])

    @router.get(
        "/v1/requests/{call_id}/events",
        operation_id="resume_stream",
        summary="The rest of a stream",
        response_class=Response,
        responses=error_responses(400, 401, 403, 404, 500, 503, 504)
        | {200: {"description": "The events that follow", "content": {"text/event-stream": {}}}},
    )
    async def resume_stream(
        call_id: str,
        key: Key = known,
        last_event_id: Annotated[str | None, Header(description="The last event's id")] = None,
        starting_after: Annotated[
            str | None, Query(description="What follows the slash in it; left out with it: all events")
        ] = None,
    ) -> Response:
        kept = await find_kept(services, call_id, key)
        seen = [0] * kept.sequences
        if starting_after is not None:
            seen = seen_events(starting_after, kept.sequences, "starting_after")
        elif last_event_id is not None:
            of, _, counts = last_event_id.rpartition("/")
            if of != call_id:
                raise InvalidRequest(
                    f"last-event-id: {last_event_id[:80]!r}: it is of another call; send the id of an event "
                    f"of {call_id[:80]!r}.",
                    param="last-event-id",
                )
            seen = seen_events(counts, kept.sequences, "last-event-id")
        kind = ResponseCallResumption if kept.path == Responses.path else Resumption
        return Resumed(services, kept, seen, kind)

    return router
