"""The endpoints of stored responses: read, follow, cancel, delete, and what was sent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response
from pydantic import BaseModel

from tidegate.errors import InvalidRequest
from tidegate.gateway.auth import KnownKey
from tidegate.gateway.bodies import reference, refusal
from tidegate.gateway.dialects.openai import encode
from tidegate.gateway.dialects.responses import input_items
from tidegate.gateway.event_ids import whole_number
from tidegate.gateway.openapi import error_responses
from tidegate.gateway.responses import CANCELLED, ResponseResumption, Stored, find_response, shown
from tidegate.gateway.resuming import Resumed
from tidegate.gateway.services import Services
from tidegate.messages.registry import Key

PATH = "/v1/responses/{response_id}"
MOST_ITEMS, ITEMS = 100, 20  # of one page: at most, where it is not said
_RESPONSE = {"application/json": {"schema": reference("Response")}}
_STATUSES = error_responses(400, 401, 403, 404, 500, 503)


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItemList(BaseModel):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def routes(services: Services) -> APIRouter:
    known = Depends(KnownKey(services.keys, services.settings))
    router = APIRouter(tags=["responses"])

    async def answer(stored: Stored) -> Response:
        return Response(encode(await shown(services, stored)), media_type="application/json")

    @router.get(
        PATH,
        operation_id="get_response",
        summary="A stored response",
        response_class=Response,
        responses=error_responses(400, 401, 403, 404, 500, 503, 504)
        | {
            200: {
                "description": "The response as it is now, or with stream=true its events",
                "content": _RESPONSE | {"text/event-stream": {}},
            }
        },
    )
    async def get_response(
        response_id: str,
        key: Key = known,
        stream: Annotated[str | None, Query(description="true: the events of the response")] = None,
        starting_after: Annotated[
            str | None, Query(description="with stream=true: the sequence_number of the last event seen")
        ] = None,
    ) -> Response:
        stored = await find_response(services, response_id, key)
        if not _flag("stream", stream):
            if starting_after is not None:
                raise refusal("starting_after", starting_after, "it needs stream=true")
            return await answer(stored)
        seen = 0
        if starting_after is not None:
            seen = 1 + whole_number(starting_after, "starting_after", "the last event's sequence_number")
        return Resumed(services, stored.kept, [seen], ResponseResumption)

    @router.post(
        PATH + "/cancel",
        operation_id="cancel_response",
        summary="Cancel a response in the background",
        response_class=Response,
        responses=_STATUSES | {200: {"description": "The response", "content": _RESPONSE}},
    )
    async def cancel_response(response_id: str, key: Key = known) -> Response:
        stored = await find_response(services, response_id, key)
        if not stored.call.body.background:
            raise InvalidRequest(
                f"response_id: {response_id!r}: only a response in the background is cancelled; another ends "
                "with its connection.",
                param="response_id",
            )
        await services.queue.cancel([f"{stored.kept.id}.0"], CANCELLED)
        return await answer(stored)

    @router.delete(
        PATH,
        operation_id="delete_response",
        summary="Forget a response",
        response_description="It is gone; what of it ran was cancelled",
        responses=_STATUSES,
    )
    async def delete_response(response_id: str, key: Key = known) -> DeletedResponse:
        kept = (await find_response(services, response_id, key)).kept
        await services.kept.unkeep(kept.id, "The response was deleted.")
        return DeletedResponse(id=kept.id)

    @router.get(
        PATH + "/input_items",
        operation_id="list_input_items",
        summary="What was sent for a response",
        response_description="A page of items",
        responses=_STATUSES,
    )
    async def list_input_items(
        response_id: str,
        key: Key = known,
        limit: Annotated[str | None, Query(description=f"1 to {MOST_ITEMS}; left out: {ITEMS}")] = None,
        order: Annotated[
            str | None, Query(description="asc, or desc, which is taken where it is left out")
        ] = None,
        after: Annotated[str | None, Query(description="the id of the item before the page")] = None,
    ) -> InputItemList:
        kept, call = await find_response(services, response_id, key)
        items = input_items(kept.id, call.body)
        if order not in (None, "asc", "desc"):
            raise refusal("order", order, "send asc or desc")
        if order != "asc":
            items.reverse()
        page_sizes = f"a whole number from 1 to {MOST_ITEMS}"
        size = whole_number(limit, "limit", page_sizes) if limit else ITEMS
        if not 1 <= size <= MOST_ITEMS:
            raise refusal("limit", limit, f"send {page_sizes}")
        ids = [item.id for item in items]
        if after is not None and after not in ids:
            raise refusal("after", after, "send the id of one of the items")
        first = 0 if after is None else ids.index(after) + 1
        page = items[first : first + size]
        return InputItemList(
            data=msgspec.to_builtins(page),
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=first + size < len(items),
        )

    return router


def _flag(name: str, text: str | None) -> bool:
    if text not in (None, "true", "false"):
        raise refusal(name, text, "send true or false")
    return text == "true"
