"""`tidegate keys`: who may ask. Secrets are shown once, when they are made; Redis holds only their hashes."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.output import Column, Format, OutputOption, age, say, show_list, show_record

if TYPE_CHECKING:
    from tidegate.messages.registry import Key

commands = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys.")


@commands.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for, to recognise it by.")],
    tenant: Annotated[str, typer.Option(help="Whose requests it sends.")] = "default",
    output: OutputOption = Format.table,
) -> None:
    """Make a key and print its secret, once."""
    key, secret = asyncio.run(_create(name, tenant))
    say(f"Key {key.id} ({name}) for tenant {tenant}. Its secret follows and cannot be shown again:")
    show_record(_record(key) | {"secret": secret}, output, secret)


@commands.command(name="list")
def list_keys(output: OutputOption = Format.table) -> None:
    """List all keys, revoked ones too."""
    now = time.time()
    columns = (
        Column("ID", lambda key: key["id"]),
        Column("NAME", lambda key: key["name"]),
        Column("TENANT", lambda key: key["tenant"]),
        Column("SECRET", lambda key: key["prefix"] + "…"),
        Column("AGE", lambda key: age(now - key["created"])),
        Column("STATUS", lambda key: "revoked" if key["revoked"] else "valid"),
    )
    records = [_record(key) for key in asyncio.run(_list())]
    show_list(records, columns, output, "No keys yet; `tidegate keys create NAME` makes one.")


@commands.command()
def revoke(
    key_ids: Annotated[
        list[str], typer.Argument(help="Ids that `tidegate keys list` shows.", metavar="ID...")
    ],
    output: OutputOption = Format.table,
) -> None:
    """End keys: gateways refuse them within a second."""
    revoked = asyncio.run(_revoke(key_ids))
    if output in (Format.json, Format.yaml):
        show_list([_record(key) for key in revoked], (), output, "")
    for key in revoked:
        say(f"Key {key.id} ({key.name}) is revoked.")


async def _create(name: str, tenant: str) -> tuple[Key, str]:
    from tidegate.cli.target import open_store
    from tidegate.store.keys import Keys

    async with open_store() as (connection, key_prefix):
        return await Keys(connection, key_prefix=key_prefix).create(name, tenant)


async def _list() -> list[Key]:
    from tidegate.cli.target import open_store
    from tidegate.store.keys import Keys

    async with open_store() as (connection, key_prefix):
        return await Keys(connection, key_prefix=key_prefix).list()


async def _revoke(key_ids: list[str]) -> list[Key]:
    from tidegate.cli.target import open_store
    from tidegate.store.keys import Keys

    async with open_store() as (connection, key_prefix):
        keys = Keys(connection, key_prefix=key_prefix)
        return [await keys.revoke(key_id) for key_id in key_ids]


def _record(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "tenant": key.tenant,
        "prefix": key.prefix,
        "created": key.created,
        "revoked": key.revoked,
    }
