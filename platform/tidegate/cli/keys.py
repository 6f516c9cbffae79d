"""`tidegate keys`: who may ask. Secrets are shown once, when they are made; Redis holds only their hashes."""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.control_client import asked, open_control
from tidegate.cli.output import Column, Format, OutputOption, age, say, show_list, show_record

if TYPE_CHECKING:
    from tidegate.messages.registry import Key


class ScopeName(enum.StrEnum):
    inference = "inference"
    read = "read"
    admin = "admin"


commands = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys.")


@commands.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for, to recognise it by.")],
    tenant: Annotated[str, typer.Option(help="Whose requests it sends.")] = "default",
    scopes: Annotated[
        list[ScopeName],
        typer.Option(
            "--scope",
            help="inference: ask models; read: look at the control API; admin: change things there. May be "
            "repeated.",
        ),
    ] = [ScopeName.inference],  # noqa: B006 - typer's way of a default
    output: OutputOption = Format.table,
) -> None:
    """Make a key and print its secret, once."""
    new = asked(lambda control: control.create_key(name, tenant, [scope.value for scope in scopes]))
    say(f"Key {new.key.id} ({name}) for tenant {tenant}. Its secret follows and cannot be shown again:")
    show_record(_record(new.key) | {"secret": new.secret}, output, new.secret)


@commands.command(name="list")
def list_keys(output: OutputOption = Format.table) -> None:
    """List all keys, revoked ones too."""
    now = time.time()
    columns = (
        Column("ID", lambda key: key["id"]),
        Column("NAME", lambda key: key["name"]),
        Column("TENANT", lambda key: key["tenant"]),
        Column("SCOPES", lambda key: ",".join(key["scopes"])),
        Column("SECRET", lambda key: key["prefix"] + "…"),
        Column("AGE", lambda key: age(now - key["created"])),
        Column("STATUS", lambda key: "revoked" if key["revoked"] else "valid"),
    )
    records = [_record(key) for key in asked(lambda control: control.keys())]
    show_list(records, columns, output, "No keys yet; `tidegate keys create NAME` makes one.")


@commands.command()
def revoke(
    key_ids: Annotated[
        list[str], typer.Argument(help="Ids that `tidegate keys list` shows.", metavar="ID...")
    ],
    output: OutputOption = Format.table,
) -> None:
    """End keys: gateways refuse them within a second."""
    with open_control() as control:
        revoked = [control.revoke_key(key_id) for key_id in key_ids]
    if output in (Format.json, Format.yaml):
        show_list([_record(key) for key in revoked], (), output, "")
    for key in revoked:
        say(f"Key {key.id} ({key.name}) is revoked.")


def _record(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "tenant": key.tenant,
        "prefix": key.prefix,
        "scopes": list(key.scopes),
        "created": key.created,
        "revoked": key.revoked,
    }
