"""Names of queues and channels. Lua builds the same from the prefix (`store/lua/common.lua`)."""

from __future__ import annotations


def prefix(key_prefix: str) -> str:
    return key_prefix + ":"


def queue_name(model: str, revision: str) -> str:
    """The queue of a model's revision; also the name of its Serve application."""
    return f"{model}--{revision}"


def gateway_channel(key_prefix: str, gateway: str) -> str:
    return f"{key_prefix}:gw:{gateway}"


def replica_channel(key_prefix: str, replica: str) -> str:
    return f"{key_prefix}:rep:{replica}"


def wake_channel(key_prefix: str, queue: str) -> str:
    return f"{key_prefix}:wake:{queue}"


def change_channel(key_prefix: str, what: str) -> str:
    return f"{key_prefix}:changed:{what}"
