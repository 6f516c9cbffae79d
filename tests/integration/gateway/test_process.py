"""`python -m tidegate.gateway` as users and hosts run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import orjson
import psutil

from tests.waiting import wait_until
from tidegate.store.connection import Connection
from tidegate.store.keys import Keys

AT_REST_BYTES = 150 * 1024 * 1024


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TIDEGATE_", "REDIS"))}
    return kept | changes


@contextmanager
def gateway_process(log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tidegate.gateway"], env=environment(**variables), stderr=stream
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def log_lines(log: Path) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in log.read_text().splitlines()]


def address(log: Path) -> str | None:
    """Where uvicorn says it listens: the port was chosen by the system."""
    for line in log_lines(log):
        found = str(line["message"]).partition("running on ")[2]
        if found:
            return found.split()[0]
    return None


async def test_it_starts_light_logs_json_and_stops_clean(
    connection: Connection, redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    _, secret = await Keys(connection, key_prefix=key_prefix).create("test")
    log = tmp_path / "gateway.log"
    with gateway_process(
        log, REDIS_URL=redis_url, TIDEGATE_KEY_PREFIX=key_prefix, TIDEGATE_PORT="0"
    ) as process:
        url = wait_until(lambda: address(log), timeout=30)
        headers = {"authorization": f"Bearer {secret}", "x-request-id": "trace-7"}
        assert url is not None
        async with httpx.AsyncClient(base_url=url, headers=headers) as http:
            assert (await http.get("/readyz")).json()["ready"] is True
            assert (await http.get("/v1/models")).json()["data"] == []
        memory = psutil.Process(process.pid).memory_info().rss
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert memory < AT_REST_BYTES
    assert [line["message"] for line in log_lines(log)][-1] == "gateway stopped"


def test_a_mounted_key_is_let_in(redis_url: str, key_prefix: str, tmp_path: Path) -> None:
    secret, log = "tg-" + "m" * 43, tmp_path / "gateway.log"
    (tmp_path / "key").write_text(secret)
    variables = {"TIDEGATE_KEY_PREFIX": key_prefix, "TIDEGATE_ADMIN_KEY_FILE": str(tmp_path / "key")}
    with gateway_process(log, REDIS_URL=redis_url, TIDEGATE_PORT="0", **variables):
        url = wait_until(lambda: address(log), timeout=30)
        answer = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {secret}"})
        assert answer.status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
    assert secret not in log.read_text()


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    code, said = refused(REDIS_URL="redis://localhost:1", TIDEGATE_ADMIN_KEY_FILE=str(tmp_path / "none"))
    assert code == 2
    assert "TIDEGATE_ADMIN_KEY_FILE" in said
    assert "Traceback" not in said


def test_its_modules_are_light() -> None:
    code = (
        "import sys, tidegate.gateway.__main__\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'gptqmodel') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def refused(**variables: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.gateway"],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr


def test_no_auth_is_refused_beyond_loopback() -> None:
    code, said = refused(REDIS_URL="redis://localhost:1", TIDEGATE_NO_AUTH="true", TIDEGATE_HOST="0.0.0.0")
    assert code == 2
    assert "TIDEGATE_NO_AUTH" in said and "TIDEGATE_HOST=127.0.0.1" in said
    assert "Traceback" not in said


def test_a_missing_redis_url_is_named() -> None:
    code, said = refused()
    assert code == 2
    assert "REDIS_URL" in said and "redis://host:port/db" in said


def test_a_setting_that_does_not_exist_is_named() -> None:
    code, said = refused(REDIS_URL="redis://localhost:1", TIDEGATE_PROT="8000")
    assert code == 2
    assert "TIDEGATE_PROT" in said and "port" in said
