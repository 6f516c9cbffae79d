"""Bad revisions on a whole laptop platform under load: which gate finds each, how soon, what users notice.

    python -m loadtests.bad_revisions [--rate 20] [--only "5 % errors,good"]

Starts `tidegate up` in a home of its own with one simulated model, asks it `--rate` times a second, writes
one change after the other into its file and waits for the end of each rollout. *Found* is the time from the
first request that the new revision could get (its first step) to the abort; *changed* that from the file's
change. *Back* is the time from the abort until the last bad answer has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from loadtests.machine import free_port
from loadtests.report import table
from loadtests.steady import SteadyLoad

MODEL = "writer"
END_SECONDS = 240.0
LOOK_SECONDS = 0.25
BASELINE_SECONDS = 15.0
STEPS = [{"weight": 15, "holdSeconds": 20}, {"weight": 50, "holdSeconds": 10}, {"weight": 100}]
LAST = [{"weight": 100, "holdSeconds": 5}]
# What is changed of the spec, by a word for it.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "good": {"args": {"answer_tokens": 65}},
    "crashes at load": {"args": {"test_load_failure": "WeightsWrong"}},
    "5 % errors": {"args": {"test_error_share": 0.05}},
    "three times as long": {"args": {"step_ms": 30}},
    "empty answers": {"args": {"test_empty_share": 0.5}},
    "a probe answered wrongly": {"args": {"vocab": 900}},
    "5 % errors with a shadow": {"args": {"test_error_share": 0.05}, "rollout": {"shadow": {}}},
    "5 % errors as BlueGreen": {
        "args": {"test_error_share": 0.05, "answer_tokens": 68},
        "rollout": {"strategy": "BlueGreen", "steps": LAST},
    },
    "40 % errors as BlueGreen": {
        "args": {"test_error_share": 0.4},
        "rollout": {"strategy": "BlueGreen", "steps": LAST},
    },
    "good as BlueGreen": {"args": {"answer_tokens": 66}, "rollout": {"strategy": "BlueGreen", "steps": LAST}},
    "good as Recreate": {"args": {"answer_tokens": 67}, "rollout": {"strategy": "Recreate", "steps": LAST}},
}


def spec(change: Mapping[str, Any], probe: str) -> dict[str, Any]:
    """The model's, with one of `CHANGES`; `probe` is the answer that is asked for (empty: none is)."""
    return {
        "engine": {
            "name": "simulated",
            "maxSlots": 32,
            "args": {"step_ms": 10, **change.get("args", {})},
        },
        "scaling": {"minReplicas": 1, "maxReplicas": 2},
        "rollout": {
            "steps": STEPS,
            "abortScaleDownSeconds": 1,
            "probes": [{"prompt": "Which vocabulary?", "expect": probe, "maxTokens": 4}] if probe else [],
            **change.get("rollout", {}),
        },
    }


def model(change: Mapping[str, Any], probe: str) -> str:
    head = {"apiVersion": "tidegate.dev/v1alpha1", "kind": "Model", "metadata": {"name": MODEL}}
    return yaml.safe_dump({**head, "spec": spec(change, probe)})


@dataclass
class Laptop:
    """A platform of its own. `run` is `tidegate COMMAND`."""

    folder: Path
    port: int = field(default_factory=free_port)

    @property
    def file(self) -> Path:
        return self.folder / "writer.yaml"

    async def run(self, *command: str) -> str:
        environment = {"TIDEGATE_HOME": str(self.folder / "home"), "TIDEGATE_PORT": str(self.port)}
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tidegate.cli", *command),
            env={**environment, "PATH": str(Path(sys.executable).parent)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await child.communicate()
        if child.returncode:
            raise RuntimeError(f"tidegate {' '.join(command)}: {error.decode()}")
        return out.decode()


async def rollout(http: httpx.AsyncClient) -> dict[str, Any]:
    answer = await http.get(f"/v1/models/{MODEL}/rollout")
    return dict(answer.json().get("rollout") or {})


async def measured(
    name: str, laptop: Laptop, load: SteadyLoad, http: httpx.AsyncClient, probe: str
) -> list[str]:
    """Carry one change out and return its row of the table."""
    before = (await rollout(http)).get("id", "")
    began, stepped, most = time.time(), 0.0, 0
    laptop.file.write_text(model(CHANGES[name], probe), encoding="utf-8")
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        found = await rollout(http)
        ready = sum(int(each.partition("/")[0]) for each in found.get("replicas", {}).values())
        if found.get("id", "") == before:
            found = {}
        most = max(most, ready)
        if found.get("phase") == "Progressing" and not stepped:
            stepped = time.time()
        if found.get("phase") in ("Completed", "Aborted"):
            break
        if time.time() - began > END_SECONDS and found:
            break  # the next change takes its place
    ended = time.time()
    await asyncio.sleep(5)
    calls = load.between(began, ended)
    bad = [call for call in calls if call.is_bad]
    late = [call.ended for call in load.between(began, time.time()) if call.is_bad and call.ended > ended]
    gates = [gate["name"] for gate in found["gates"] if gate["state"] == "fails"]
    return [
        name,
        f"{found['phase'] if found['ended'] else found['reason']}{': ' + ', '.join(gates) if gates else ''}",
        f"{ended - stepped:.1f} s" if stepped else "before any request",
        f"{ended - began:.1f} s",
        f"{len(bad)} of {len(calls)}",
        f"{max(late) - ended:.1f} s" if late else "at once",
        str(most),
    ]


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--only", default="", help="names of changes, with commas between")
    chosen = parser.parse_args()
    names = [name for name in CHANGES if not chosen.only or name in chosen.only.split(",")]
    head = ["revision", "end", "found", "changed", "bad answers", "back", "replicas at most"]
    with tempfile.TemporaryDirectory(prefix="tidegate-bad-") as folder:
        laptop = Laptop(Path(folder))
        laptop.file.write_text(model({}, ""), encoding="utf-8")
        await laptop.run("up", "-f", str(laptop.file))
        try:
            key = (await laptop.run("keys", "create", "load")).strip()
            running = json.loads(next((Path(folder) / "home").rglob("host.json")).read_text("utf-8"))
            url = f"http://127.0.0.1:{laptop.port}"
            admin = {"Authorization": f"Bearer {running['control_key']}"}
            async with (
                httpx.AsyncClient(base_url=running["control_url"], headers=admin, trust_env=False) as http,
                SteadyLoad(url, key, MODEL, chosen.rate).running() as load,
            ):
                probe = await answer_to_probe(url, key)
                await asyncio.sleep(BASELINE_SECONDS)
                rows = []
                for name in names:
                    rows.append(await measured(name, laptop, load, http, probe))
                    print(rows[-1], file=sys.stderr, flush=True)
        finally:
            await laptop.run("clean", "--yes")
    print(table(head, rows))


async def answer_to_probe(url: str, key: str) -> str:
    """Ask the first revision what the others must answer as well."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http:
        body = {"model": MODEL, "prompt": "Which vocabulary?", "max_tokens": 4, "temperature": 0}
        answer = await http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        return str(answer.json()["choices"][0]["text"])


if __name__ == "__main__":
    asyncio.run(main())
