"""Ask a gateway whether it is ready and which models it has: what `helm test` runs (URL KEY_FILE SECONDS)."""

import json
import pathlib
import sys
import time
import urllib.error
import urllib.request

MOST_BYTES = 16 * 1024 * 1024


def ask(url: str, key: str = "") -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read(MOST_BYTES).decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read(10_000).decode(errors="replace")
    except OSError as problem:
        return 0, str(problem)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def main(address: str, key_file: str, seconds: str) -> int:
    deadline = time.monotonic() + float(seconds)
    while (found := ask(f"{address}/readyz"))[0] != 200:
        if time.monotonic() >= deadline:
            say(f"{address}/readyz is not ready after {seconds} s: {found[0] or 'no answer'}, {found[1]}")
            return 1
        time.sleep(1)
    say(f"{address} is ready")
    key = pathlib.Path(key_file).read_text(encoding="utf-8").strip()
    status, text = ask(f"{address}/v1/models", key)
    if status == 401:
        say("/v1/models: the gateways do not know the Secret's admin key. Was it changed without a restart")
        say("(kubectl rollout restart), or revoked (tidegate keys list)?")
        return 1
    if status != 200:
        say(f"/v1/models: {status or 'no answer'}, {text}")
        return 1
    names = [model["id"] for model in json.loads(text)["data"]]
    say(f"the admin key is known; models: {', '.join(names) or 'none yet'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
