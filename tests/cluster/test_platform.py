"""The whole platform on a real cluster, in the order in which a person meets it: installed, asked, asleep,
killed in parts, changed, broken, upgraded, removed. The tests share one release and follow each other.
What it leaves, `test_removal` finds again.

Nothing is asserted about time; `figures` takes it down for the table at the end.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.cluster.cluster import Cluster, CommandFailed
from tests.cluster.conftest import NAMESPACES
from tests.cluster.figures import Figures
from tests.cluster.load import Load, Part, Tally, assert_nothing_lost
from tests.cluster.release import (
    DEFINITIONS,
    GATEWAY,
    HEAD,
    NAMESPACE,
    OPERATOR,
    SAMPLES,
    WORKER,
    Release,
    resource,
)
from tests.integration.cli.command import tidegate
from tidegate.demo.facts import TEXTS

pytestmark = [pytest.mark.serial, pytest.mark.timeout(420)]

BF16, GPTQ, SIMULATED, ROLLING = "tide-demo", "tide-demo-gptq", "simulated", "rolling"
CONNECTIONS_BREAK = True
# Long texts that both checkpoints know by heart: an answer that differs anywhere is wrong.
FACTS = {f"Tell me about {topic.names[0]}.": topic.answer for topic in TEXTS[:3]}
# Under load only so much of them: a kill waits for every client's next answer.
LOAD_TOKENS = 80


def model(name: str, **spec: Any) -> dict[str, Any]:
    return resource("Model", name, spec)


@dataclass
class Platform:
    """The release with its load: two models whose every answer is known."""

    release: Release
    figures: Figures
    parts: list[Part] = field(default_factory=list)

    def learn_answers(self) -> None:
        """The simulated engine's tokens follow from the question alone, and the other's are the facts'."""
        simulated = self.ask_all(SIMULATED, [f"question {number}" for number in range(4)])
        facts = self.ask_all(BF16, list(FACTS))
        for question, answer in facts.items():
            assert FACTS[question].startswith(answer)
            assert len(answer) > LOAD_TOKENS
        self.parts = [
            Part(SIMULATED, simulated, streams=6, max_tokens=LOAD_TOKENS),
            Part(BF16, facts, streams=2, max_tokens=LOAD_TOKENS),
        ]

    def ask_all(self, name: str, questions: list[str], *, max_tokens: int = LOAD_TOKENS) -> dict[str, str]:
        with ThreadPoolExecutor() as clients:
            ask = partial(self.release.answer, name, max_tokens=max_tokens)
            return dict(zip(questions, clients.map(ask, questions), strict=True))

    def load(self) -> Load:
        return Load(self.release.address, self.release.key, self.parts)

    def kill_under_load(
        self, what: str, kill: Callable[[], object], is_back: Callable[[], object], *, breaks: bool = False
    ) -> Tally:
        """Kill something while clients stream, wait until it is back and all clients are served again; no
        request may be lost. `breaks`: connections may end, and their clients ask again."""
        with self.load() as load:
            begun = time.monotonic()
            kill()
            is_back()
            back = time.monotonic() - begun
            load.wait_for_answers(180)
            served = time.monotonic() - begun
        tally = load.tally
        self.figures.note(f"{what} killed", back=f"{back:.1f} s", all_served_again=f"{served:.1f} s")
        self.figures.note(f"{what} killed", **tally.figures)
        assert_nothing_lost(tally, breaks=breaks)
        return tally


@pytest.fixture(scope="module")
def platform(cluster: Cluster, figures: Figures) -> Iterator[Platform]:
    """Installed, with the samples applied and answering."""
    release = Release(cluster)
    release.remove_all()
    with figures.seconds("helm install", "to ready"):
        release.install()
    address, key = release.address, release.key
    begun = time.monotonic()
    with figures.seconds("samples applied", "to a ready Pool"):
        release.apply(SAMPLES / "cpu-demo.yaml")
        release.apply(
            model(SIMULATED, engine={"name": "simulated", "args": {"step_ms": 25, "answer_tokens": 120}})
        )
        release.wait_for_pool()
    first = Load(address, key, [Part(BF16, FACTS, streams=1)])
    with first:
        pass
    (call, *_) = first.tally.calls
    token_at = call.began + call.first_token_seconds
    figures.note("samples applied", to_the_first_token=f"{token_at - begun:.1f} s")
    for name in (BF16, GPTQ, SIMULATED):
        release.wait_for(name, "Ready", reason="Serving")
    figures.note("samples applied", to_three_ready_models=f"{time.monotonic() - begun:.1f} s")
    made = Platform(release, figures)
    made.learn_answers()
    yield made


@pytest.fixture(autouse=True)
def told_on_failure(request: pytest.FixtureRequest) -> None:
    request.node.stash[NAMESPACES] = [NAMESPACE]


def test_both_checkpoints_stream_the_same_right_answer_to_the_official_client(platform: Platform) -> None:
    release = platform.release
    client = release.client()
    assert {item.id for item in client.models.list()} == {BF16, GPTQ, SIMULATED}
    for question, answer in FACTS.items():
        for name in (BF16, GPTQ):
            stream = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": question}], stream=True, temperature=0
            )
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
            assert "".join(pieces) == answer
            assert len(pieces) > 5
    for name in (BF16, GPTQ):
        assert release.answer(name, "What is 347 + 285?").endswith("Answer: 632")


def test_the_stream_is_server_sent_events_and_needs_the_key(platform: Platform) -> None:
    url = f"{platform.release.address}/v1/chat/completions"
    question, answer = next(iter(FACTS.items()))
    messages = [{"role": "user", "content": question}]
    body = {"model": BF16, "messages": messages, "stream": True, "temperature": 0}
    headers = {"Authorization": f"Bearer {platform.release.key}"}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60, trust_env=False) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    deltas = [orjson.loads(line)["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content") or "" for delta in deltas) == answer
    refused = httpx.post(url, json=body, headers={"Authorization": "Bearer wrong"}, trust_env=False)
    assert refused.status_code == 401


def test_what_kubectl_shows_is_the_state(platform: Platform) -> None:
    table = platform.release.cluster.kubectl("get", "models", "-n", NAMESPACE)
    header, *rows = (re.split(r"\s{2,}", line.strip()) for line in table.splitlines())
    shown = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert {name: (row["READY"], row["REASON"], row["PRECISION"]) for name, row in shown.items()} == {
        BF16: ("True", "Serving", "bfloat16"),
        GPTQ: ("True", "Serving", "gptq"),
        SIMULATED: ("True", "Serving", "simulated"),
    }
    assert shown[BF16]["REPLICAS"] == "1/1"


def test_the_command_line_finds_the_control_api_by_itself(platform: Platform, tmp_path: Path) -> None:
    """Through a port-forward of its own, with the key of the release's Secret."""
    release = platform.release
    found = release.cluster.environment
    here = {name: found[name] for name in ("KUBECONFIG", "PATH")} | {"TIDEGATE_HOME": str(tmp_path / "home")}
    shown = tidegate("models", "-o", "json", environment=here)
    assert shown.returncode == 0, shown.stderr
    assert {model["name"] for model in json.loads(shown.stdout)} == {BF16, GPTQ, SIMULATED}
    context = release.cluster.kubectl("config", "current-context").strip()
    named = ("--context", context, "--namespace", NAMESPACE)
    made = json.loads(tidegate(*named, "keys", "create", "cli", "-o", "json", environment=here).stdout)

    def is_let_in() -> bool:
        own = {"Authorization": f"Bearer {made['secret']}"}
        return httpx.get(f"{release.address}/v1/models", headers=own, trust_env=False).status_code == 200

    release.cluster.wait_for("the key opens the gateways", is_let_in)
    assert tidegate(*named, "keys", "revoke", made["id"], environment=here).returncode == 0
    nowhere = tidegate("--namespace", "default", "models", environment=here)
    assert "no Service of a control API in the namespace default" in nowhere.stderr


def test_ray_asks_for_a_token_and_knows_no_password(platform: Platform) -> None:
    """Neither what Serve stores nor what Ray has written in any of its pods holds the queue's password; and
    who has no token is refused by each of Ray's doors."""
    release = platform.release
    cluster = release.cluster
    password = cluster.secret("tidegate-redis", "password", NAMESPACE)
    (head,) = release.pods(HEAD)
    name, address = head["metadata"]["name"], head["status"]["podIP"]
    dashboard = f"http://{address}:8265"
    for path in ("/api/serve/applications/", "/api/jobs/", "/nodes?view=summary"):
        assert httpx.get(f"{dashboard}{path}", timeout=30, trust_env=False).status_code == 401
    job = {"entrypoint": "id"}
    assert httpx.post(f"{dashboard}/api/jobs/", json=job, timeout=30, trust_env=False).status_code == 401
    token = cluster.secret(head["metadata"]["labels"]["ray.io/cluster"], "auth_token", NAMESPACE)
    headers = {"Authorization": f"Bearer {token}"}
    stored = httpx.get(f"{dashboard}/api/serve/applications/", headers=headers, timeout=30, trust_env=False)
    assert stored.status_code == 200
    assert "env:TG_REDIS_URL" in stored.text
    assert password not in stored.text
    for pod in [head, *release.pods(WORKER)]:
        assert password not in str(pod)
        command = (
            "exec",
            "-n",
            NAMESPACE,
            pod["metadata"]["name"],
            "--",
            "grep",
            "-rlF",
            password,
            "/tmp/ray",
        )
        with pytest.raises(CommandFailed, match="exit code 1"):
            cluster.kubectl(*command)
    driver = "import ray; ray.init(address='auto'); print('in')"
    script = f'env -u RAY_AUTH_TOKEN RAY_AUTH_MODE=disabled python -c "{driver}"'
    with pytest.raises(CommandFailed):
        cluster.kubectl(
            "exec", "-n", NAMESPACE, name, "-c", "ray-head", "--", "timeout", "60", "sh", "-c", script
        )


def test_a_model_goes_to_zero_and_a_held_request_brings_it_back(platform: Platform) -> None:
    release, (question, answer) = platform.release, next(iter(FACTS.items()))
    before = release.status(GPTQ)["revision"]
    release.change(GPTQ, {"scaling": {"minReplicas": 0, "idleSeconds": 1}})
    with platform.figures.seconds("scaling", "to zero"):
        release.wait_for(GPTQ, "Ready", reason="Asleep")
        release.cluster.wait_for("no replica", lambda: release.status(GPTQ)["replicas"] == 0)
    load = Load(release.address, release.key, [Part(GPTQ, {question: answer}, streams=1)])
    with load:
        pass
    woken = load.tally
    assert_nothing_lost(woken)
    platform.figures.note(
        "scaling", from_zero_to_the_first_token=f"{woken.calls[0].first_token_seconds:.1f} s"
    )
    assert release.status(GPTQ)["revision"] == before, "scaling is no new revision"


def test_a_killed_worker_costs_no_request(platform: Platform) -> None:
    release, workers = platform.release, platform.release.pods(WORKER)
    platform.kill_under_load(
        "worker",
        lambda: release.kill(*(pod["metadata"]["name"] for pod in workers)),
        lambda: release.wait_for_others(WORKER, workers),
    )
    for name in (BF16, SIMULATED):
        release.wait_for(name, "Ready", reason="Serving")


def test_a_killed_head_costs_no_request_and_no_worker(platform: Platform) -> None:
    release = platform.release
    (head,) = release.pods(HEAD)

    def used_workers() -> list[dict[str, Any]]:
        found = release.pods(WORKER)
        return found if all(runs_replicas(release, pod) for pod in found) else []

    # One more than needed, which the autoscaler may start for a killed one, goes by itself after a minute.
    workers = release.cluster.wait_for("every worker runs replicas", used_workers)

    def is_back() -> None:
        release.wait_for_others(HEAD, [head])
        release.wait_for_pool()

    platform.kill_under_load("head", lambda: release.kill(head["metadata"]["name"]), is_back)
    assert uids(release.pods(WORKER)) >= uids(workers)
    # Its Serve is the same too: a change arrives.
    generation = release.change(SIMULATED, {"scaling": {"maxReplicas": 2}})
    release.wait_until_told(SIMULATED, generation)


def test_a_killed_gateway_breaks_only_connections(platform: Platform) -> None:
    release, gateways = platform.release, platform.release.pods(GATEWAY)
    tally = platform.kill_under_load(
        "gateway",
        lambda: release.kill(gateways[0]["metadata"]["name"]),
        lambda: release.wait_for_others(GATEWAY, gateways),
        breaks=True,
    )
    assert len(tally.of("cut")) <= 8, "the other gateway's connections stay"


def test_the_other_operator_takes_over(platform: Platform) -> None:
    release = platform.release
    leader = release.leader()
    assert leader

    def another_leads() -> None:
        release.cluster.wait_for("another leader", lambda: release.leader() not in ("", leader))
        generation = release.change(BF16, {"queue": {"maxRequests": 999}})
        release.wait_until_told(BF16, generation)

    platform.kill_under_load("operator", lambda: release.kill(leader), another_leads)


def test_models_change_under_load_without_a_failed_request(platform: Platform) -> None:
    release = platform.release
    before = {name: release.status(name)["revision"] for name in (BF16, SIMULATED)}
    load = platform.load()
    with load, platform.figures.seconds("two Models changed", "until the old revisions are gone"):
        changes: dict[str, dict[str, Any]] = {
            SIMULATED: {"engine": {"args": {"step_ms": 20}}},
            BF16: {"contextLength": 512},
        }
        generations = {name: release.change(name, spec) for name, spec in changes.items()}
        for name, generation in generations.items():
            status = release.wait_until_told(name, generation, timeout=240)
            assert status["revision"] != before[name]
            assert [item["revision"] for item in status["revisions"]] == [status["revision"]]
        load.wait_for_answers()
    platform.figures.note("two Models changed", **load.tally.figures)
    assert_nothing_lost(load.tally)


def test_a_good_change_goes_out_a_bad_one_comes_back_and_an_undo_too(platform: Platform) -> None:
    """As `kubectl` and the model's users see it; each by its own evidence, under load."""
    release, figures = platform.release, platform.figures
    engine = {"name": "simulated", "args": {"step_ms": 25, "answer_tokens": 120}}
    rollout = {
        "steps": [{"weight": 15, "holdSeconds": 2}, {"weight": 50, "holdSeconds": 2}, {"weight": 100}],
        "minRequests": 30,
        "abortScaleDownSeconds": 1,
    }
    release.apply(model(ROLLING, engine=engine, rollout=rollout))
    release.wait_for(ROLLING, "Ready", reason="Serving")
    answers = platform.ask_all(ROLLING, [f"question {number}" for number in range(4)], max_tokens=16)
    load = partial(Load, release.address, release.key, [Part(ROLLING, answers, streams=8, max_tokens=16)])
    first = str(release.status(ROLLING)["revision"])

    def ended(target: str, *, is_not: bool) -> dict[str, Any]:
        """The rollout to this target, or to another, once it is over."""

        def end() -> dict[str, Any] | None:
            found: dict[str, Any] = release.status(ROLLING).get("rollout") or {}
            is_meant = (found.get("target") != target) == is_not
            return found if is_meant and found.get("phase") in ("Completed", "Aborted") else None

        return release.cluster.wait_for(f"the end of a rollout of {ROLLING}", end, 180)

    with load() as good, figures.seconds("a good rollout", "change to its end"):
        release.change(ROLLING, {"engine": {"args": {"step_ms": 20}}})
        found = ended(first, is_not=True)
        good.wait_for_answers()
    assert found["phase"] == "Completed", found
    assert_nothing_lost(good.tally)
    second = str(found["target"])

    with load() as bad, figures.seconds("a bad rollout", "change to its abort"):
        release.change(ROLLING, {"engine": {"args": {"test_error_share": 0.4}}})
        found = ended(second, is_not=True)
    assert found["phase"] == "Aborted", found
    assert [gate["name"] for gate in found["gates"] if gate["state"] == "fails"] == ["errors"], found
    assert ("Warning", "RolloutAborted") in release.events(ROLLING)
    assert release.wait_for(ROLLING, "Ready", reason="Serving")
    failed = bad.tally.of("lost")
    assert failed and all("GenerationFailed" in each or "told to fail" in each for each in failed)
    figures.note("a bad rollout", requests=len(bad.tally.calls), of_them_failed=len(failed))
    with load() as after:  # the refused revision has nothing any more
        after.wait_for_answers()
    assert_nothing_lost(after.tally)

    with load() as undo, figures.seconds("an undo", "annotation to its end"):
        release.cluster.kubectl(
            *("annotate", "model", ROLLING, "-n", NAMESPACE, f"tidegate.dev/rollout=undo={first}")
        )
        assert ended(first, is_not=False)["phase"] == "Completed"
        undo.wait_for_answers()
    assert_nothing_lost(undo.tally)
    assert release.status(ROLLING)["revision"] == first
    history = release.cluster.get_all("controllerrevisions", NAMESPACE)
    assert {first, second} <= {
        each["data"].get("revision") for each in history if each["metadata"]["name"].startswith(ROLLING)
    }
    release.cluster.delete("model", ROLLING, NAMESPACE)


def test_broken_models_say_what_is_wrong_and_hurt_no_other(platform: Platform) -> None:
    release = platform.release
    sound = {name: ready_since(release, name) for name in (BF16, SIMULATED)}
    with platform.load() as load:
        release.apply(
            model("lost", source={"uri": "file:///opt/tidegate/demo/nowhere"}),
            model("wrong", engine={"name": "simulated", "args": {"no_such_argument": 1}}),
        )
        missing = release.wait_for("lost", "WeightsAvailable", status="False", reason="SourceNotFound")
        assert "/opt/tidegate/demo/nowhere" in missing["message"]
        assert release.wait_for("lost", "Ready", status="False")["reason"] == "SourceNotFound"
        refused = release.wait_for("wrong", "Degraded", reason="RevisionFailed")
        assert "no_such_argument" in refused["message"]
        assert "no_such_argument" in release.wait_for("wrong", "Ready", status="False")["message"]
        answer = release.ask("lost", "Are you there?")
        assert answer.status_code == 503
        assert "/opt/tidegate/demo/nowhere" in answer.json()["error"]["message"]
        load.wait_for_answers()
    assert_nothing_lost(load.tally)
    assert ("Warning", "SourceNotFound") in release.events("lost")
    assert ("Warning", "RevisionFailed") in release.events("wrong")
    assert {name: ready_since(release, name) for name in sound} == sound
    for name in ("lost", "wrong"):
        release.cluster.delete("model", name, NAMESPACE)  # waits until it has drained


def test_an_upgrade_rolls_gateways_and_operator_and_keeps_the_key(platform: Platform) -> None:
    release = platform.release
    platform.figures.note("the operator", **operator_seconds(release))
    key, gateways, operators = release.key, release.pods(GATEWAY), release.pods(OPERATOR)
    with (
        platform.figures.seconds("helm upgrade", "until rolled"),
        platform.load() as load,
    ):
        release.upgrade(
            *(
                "--reuse-values",
                "--set",
                "gateway.preStopSeconds=4",
                "--set",
                "operator.settings.logFormat=json",
            )
        )
        load.wait_for_answers()
    platform.figures.note("helm upgrade", **load.tally.figures)
    assert_nothing_lost(load.tally)
    assert release.key == key
    assert not uids(release.pods(GATEWAY)) & uids(gateways)
    assert not uids(release.pods(OPERATOR)) & uids(operators)


def test_uninstalling_keeps_models_and_pools_and_nothing_else(platform: Platform) -> None:
    release = platform.release
    with platform.figures.seconds("helm uninstall", "with crds.keep"):
        release.uninstall()
    kept = [f"model.tidegate.dev/{name}" for name in (BF16, GPTQ, SIMULATED)] + ["pool.tidegate.dev/default"]
    histories = release.cluster.get_all("controllerrevisions", NAMESPACE)
    assert {each["metadata"]["ownerReferences"][0]["name"] for each in histories} == {BF16, GPTQ, SIMULATED}
    kept += [f"controllerrevision.apps/{each['metadata']['name']}" for each in histories]
    promised = sorted([*kept, *(f"definition {name}" for name in DEFINITIONS)])
    release.cluster.wait_for("only what is kept", lambda: release.leftovers() == promised, 120)
    for item in release.cluster.get_all("models", NAMESPACE):
        assert not item["metadata"].get("finalizers")


def uids(pods: list[dict[str, Any]]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods}


def runs_replicas(release: Release, pod: dict[str, Any]) -> bool:
    look = "cat /proc/[0-9]*/cmdline 2>/dev/null | grep -ac ray::Serve[R]eplica; true"
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    return release.cluster.kubectl("exec", name, "-n", namespace, "--", "sh", "-c", look).strip() != "0"


def ready_since(release: Release, name: str) -> str:
    condition = release.wait_for(name, "Ready")
    return str(condition["lastTransitionTime"])


def operator_seconds(release: Release) -> Mapping[str, str]:
    """p50 and p99 of the leader's work since it leads, as upper bounds of its histograms' buckets: looks at a
    pool, and changes from their news to the end of the look that took them in."""
    leader = next(pod for pod in release.pods(OPERATOR) if pod["metadata"]["name"] == release.leader())
    text = httpx.get(f"http://{leader['status']['podIP']}:8080/metrics", trust_env=False).text
    found: dict[str, str] = {}
    for what, metric in (("look", "reconcile"), ("change", "change")):
        counts: dict[float, float] = {}
        pattern = rf'^tidegate_operator_{metric}_seconds_bucket{{[^}}]*le="([^"]+)"[^}}]*}} (\S+)$'
        for bound, count in re.findall(pattern, text, re.MULTILINE):
            counts[float(bound)] = counts.get(float(bound), 0.0) + float(count)
        total = counts.get(math.inf, 0.0)
        found[f"{what}s"] = f"{total:.0f}"
        for share in (0.5, 0.99):
            bound = next((at for at in sorted(counts) if counts[at] >= share * total), math.inf)
            found[f"{what}_p{share * 100:.0f}"] = f"at most {bound:g} s"
    return found
