"""The address of Redis: the URL of one server, or of Sentinels that name the master.

redis://[user:password@]host[:port][/db]      rediss://... with TLS      unix:///path.sock[?db=0]
redis+sentinel://[user:password@]host[:port],host[:port],.../master[/db]      rediss+sentinel://...
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from tidegate.errors import ConfigError

SENTINEL_PORT = 26379
FORMS = (
    "use redis://host:port/db, rediss://, unix:///path.sock or redis+sentinel://host:port,host:port/master/db"
)
# By hand: urllib takes a list of hosts for one, and refuses it where an IPv6 address is among them.
_HOSTS = re.compile(r"(?P<before>\w+\+sentinel://(?:[^@/]*@)?)(?P<hosts>[^/?#]+)")

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
    except (ValueError, OSError) as error:
        shown = re.sub(r"//[^@/]*@", "//***@", re.sub(r"password=[^&#]*", "password=***", url))
        raise ConfigError(f"redis_url: {shown!r}: {error}; {FORMS}") from error


def _parse(url: str) -> Address:
    hosts = ""
    if listed := _HOSTS.match(url):
        hosts, url = listed["hosts"], listed["before"] + "sentinels" + url[listed.end() :]
    parts = urlsplit(url)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    tls = _tls(query) if parts.scheme.startswith("rediss") else None
    credentials = Credentials(unquote(parts.username or ""), unquote(parts.password or ""))
    path = parts.path.strip("/")
    match parts.scheme:
        case "redis" | "rediss":
            return Address(
                host=parts.hostname or "localhost",
                port=parts.port or 6379,
                db=int(path or query.get("db", "0")),
                credentials=credentials,
                tls=tls,
            )
        case "unix":
            return Address(path=unquote(parts.path), db=int(query.get("db", "0")), credentials=credentials)
        case "redis+sentinel" | "rediss+sentinel":
            master, _, db = path.partition("/")
            if not master or not hosts:
                raise ValueError("name the Sentinels, and the master that they watch")
            return Address(
                sentinels=tuple(_endpoint(host) for host in hosts.split(",")),
                master=unquote(master),
                db=int(db or query.get("db", "0")),
                credentials=credentials,
                sentinel_credentials=Credentials(
                    query.get("sentinel_username", ""), query.get("sentinel_password", "")
                ),
                tls=tls,
            )
    raise ValueError("no such scheme")


def _endpoint(host: str) -> Endpoint:
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise ValueError(f"{host!r} is no host of a Sentinel")
    return parts.hostname, parts.port or SENTINEL_PORT


def _tls(query: dict[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
    if query.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate := query.get("ssl_certfile"):
        context.load_cert_chain(certificate, query.get("ssl_keyfile"))
    return context
