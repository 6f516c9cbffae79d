"""The sockets that a gateway listens on."""

from __future__ import annotations

import errno
import socket

from tidegate.errors import ConfigError, FieldProblem

BACKLOG = 2048


def listen(host: str, port: int, names: str = "TIDEGATE_HOST, TIDEGATE_PORT") -> list[socket.socket]:
    """Bind every address of `host`, all to one port. `::` takes IPv4 too. Raises `ConfigError` with the
    `names` of the settings."""
    sockets: list[socket.socket] = []
    host = host.strip("[]")
    if host == "::" and not _has_ipv6():
        host = "0.0.0.0"  # noqa: S104 - what was asked for, on a machine with IPv4 alone
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            if sockets and port == 0:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(_bound(family, address))
            except OSError as error:
                # `localhost` has an address of a family that this machine does not use.
                if not sockets or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
    except OSError as error:
        for opened in sockets:
            opened.close()
        problem = FieldProblem(names, f"{host}:{port}", f"{error.strerror or error}; choose another")
        raise ConfigError(str(problem), [problem]) from error
    return sockets


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
