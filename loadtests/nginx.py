"""nginx as a plain proxy, the yardstick for short requests. Optional: Debian package `nginx-light`."""

from __future__ import annotations

import shutil
from pathlib import Path

from loadtests.machine import Processes, Started, accepts_connections, free_port, wait_for


def find_nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def proxy_config(folder: Path, port: int, upstream_port: int, workers: int) -> str:
    """A proxy that does nothing but pass on, with keep-alive on both sides."""
    temporary = "\n".join(
        f"    {kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""daemon off;
worker_processes {workers};
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 2048; }}
http {{
    access_log off;
{temporary}
    upstream engine {{ server 127.0.0.1:{upstream_port}; keepalive 256; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        keepalive_requests 1000000;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""


def start_proxy(
    processes: Processes, nginx: str, upstream_port: int, workers: int, name: str = "nginx"
) -> tuple[Started, int]:
    """Start nginx before `upstream_port`. Returns the process and the port that it listens on."""
    port = free_port()
    folder = processes.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nginx.conf"
    config.write_text(proxy_config(folder, port, upstream_port, workers))
    started = processes.start(name, [nginx, "-e", "stderr", "-p", str(folder), "-c", str(config)])
    wait_for(started, lambda: accepts_connections(port), 10, "listening")
    return started, port
