"""The address of Redis: the URL of one server, or of Sentinels that name the master.

redis://[user:password@]host[:port][/db]      rediss://... with TLS      unix:///path.sock[?db=0]
redis+sentinel://[user:password@]host[:port],host[:port],.../master[/db]      rediss+sentinel://...

User and password are percent-encoded in it. What one that is not does to the rest is refused, and no message
shows more than the scheme: whatever stands behind it may be a part of a password.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from tidegate.errors import ConfigError

SENTINEL_PORT = 26379
FORMS = (
    "use redis://host:port/db, rediss://, unix:///path.sock or redis+sentinel://host:port,host:port/master/db"
)
APART = "a user or password with special characters goes into REDIS_USERNAME and REDIS_PASSWORD, as it is"
# By hand: urllib takes a list of hosts for one, and refuses it where an IPv6 address is among them.
_HOSTS = re.compile(r"(?P<before>\w+\+sentinel://(?:[^/?#]*@)?)(?P<hosts>[^/?#]+)")

Endpoint = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Credentials:
    username: str = ""
    password: str = field(default="", repr=False)

    @property
    def command(self) -> tuple[str, ...]:
        """The words of AUTH; empty where there is no password."""
        return ("AUTH", self.username or "default", self.password) if self.password else ()


@dataclass(frozen=True, slots=True)
class Address:
    """`host` and `port` of the server, or `sentinels` and the `master` that they watch. `repr` hides
    passwords."""

    host: str = ""
    port: int = 0
    path: str = ""  # of a unix socket; empty: TCP
    sentinels: tuple[Endpoint, ...] = ()
    master: str = ""
    db: int = 0
    credentials: Credentials = Credentials()
    sentinel_credentials: Credentials = Credentials()
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        if self.sentinels:
            listed = ", ".join(f"{host}:{port}" for host, port in self.sentinels)
            return f"{self.master} of Sentinels {listed}"
        return f"unix://{self.path}" if self.path else f"{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """Raises `ConfigError` that names what is wrong, without the password."""
    try:
        return _parse(url)
    except OSError as error:  # a file that the query names
        raise ConfigError(f"redis_url: {_shown(url)}: {error}") from error
    except ValueError as error:
        # Those of urllib and `int` repeat what they could not read.
        said = error.args[0] if isinstance(error, _Malformed) else "it cannot be read"
        raise ConfigError(f"redis_url: {_shown(url)}: {said}; {FORMS}; {APART}") from None


def _parse(url: str) -> Address:
    hosts = ""
    if listed := _HOSTS.match(url):
        hosts, url = listed["hosts"], listed["before"] + "sentinels" + url[listed.end() :]
    parts = urlsplit(url)
    if parts.fragment or url.endswith("#") or "@" in parts.query.partition("=")[0]:
        raise _Malformed("there is a # or ? in it")
    if parts.scheme != "unix" and "@" in parts.path:
        raise _Malformed("there is a / before an @")
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    tls = _tls(query) if parts.scheme.startswith("rediss") else None
    credentials = Credentials(unquote(parts.username or ""), unquote(parts.password or ""))
    path = parts.path.strip("/")
    match parts.scheme:
        case "redis" | "rediss":
            return Address(
                host=parts.hostname or "localhost",
                port=_port(parts, 6379),
                db=_database(path or query.get("db", "0")),
                credentials=credentials,
                tls=tls,
            )
        case "unix":
            number = _database(query.get("db", "0"))
            return Address(path=unquote(parts.path), db=number, credentials=credentials)
        case "redis+sentinel" | "rediss+sentinel":
            master, _, db = path.partition("/")
            if not master or not hosts:
                raise _Malformed("name the Sentinels, and the master that they watch")
            return Address(
                sentinels=tuple(_endpoint(host) for host in hosts.split(",")),
                master=unquote(master),
                db=_database(db or query.get("db", "0")),
                credentials=credentials,
                sentinel_credentials=Credentials(
                    query.get("sentinel_username", ""), query.get("sentinel_password", "")
                ),
                tls=tls,
            )
    raise _Malformed("no such scheme")


class _Malformed(ValueError):
    """Its sentence holds nothing of the URL."""


def _shown(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    return f"'{scheme}://…'" if separator and re.fullmatch(r"[a-z+]{1,20}", scheme) else "'…'"


def _database(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise _Malformed("the database behind the last / is no number")
    return int(text)


def _port(parts: SplitResult, default: int) -> int:
    try:
        return parts.port or default
    except ValueError:
        raise _Malformed("the port is no number up to 65535") from None


def _endpoint(host: str) -> Endpoint:
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise _Malformed("a Sentinel has no host")
    return parts.hostname, _port(parts, SENTINEL_PORT)


def _tls(query: dict[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
    if query.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate := query.get("ssl_certfile"):
        context.load_cert_chain(certificate, query.get("ssl_keyfile"))
    return context
