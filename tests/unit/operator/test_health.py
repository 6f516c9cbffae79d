import httpx
import pytest

from tidegate.errors import ConfigError
from tidegate.gateway.listen import _has_ipv6
from tidegate_operator.health import STALLED_SECONDS, Liveness, serve_health
from tidegate_operator.metrics import Metrics


def test_work_that_never_ends_is_a_problem_and_no_work_is_none() -> None:
    now = [0.0]
    liveness = Liveness(clock=lambda: now[0])
    now[0] = 1e6
    assert liveness.problem() == ""
    with liveness.work("models/default"):
        now[0] += STALLED_SECONDS
        assert liveness.problem() == ""
        now[0] += 1
        assert "models/default" in liveness.problem()
    assert liveness.problem() == ""


def test_what_must_go_on_for_ever_is_a_problem_once_it_stands_still() -> None:
    now = [0.0]
    liveness = Liveness(clock=lambda: now[0])
    for _ in range(3):
        liveness.beat("the informer of Pod in models")
        now[0] += STALLED_SECONDS
        assert liveness.problem() == ""
    now[0] += 1
    assert "the informer of Pod in models" in liveness.problem()
    liveness.beat("the informer of Pod in models")
    assert liveness.problem() == ""


async def test_all_addresses_are_those_of_both_families() -> None:
    async with serve_health("::", 0, Liveness(), Metrics()) as port, httpx.AsyncClient() as client:
        hosts = ["127.0.0.1"] + (["[::1]"] if _has_ipv6() else [])
        for host in hosts:
            assert (await client.get(f"http://{host}:{port}/healthz")).text == "ok"


async def test_an_address_that_is_taken_names_the_operators_settings() -> None:
    async with serve_health("127.0.0.1", 0, Liveness(), Metrics()) as port:
        with pytest.raises(ConfigError, match="TIDEGATE_HEALTH_PORT"):
            async with serve_health("127.0.0.1", port, Liveness(), Metrics()):
                pass


async def test_the_kubelet_and_prometheus_get_their_answers() -> None:
    now = [0.0]
    liveness, metrics = Liveness(clock=lambda: now[0]), Metrics()
    metrics.count_write("Model", "status")
    async with serve_health("127.0.0.1", 0, liveness, metrics) as port, httpx.AsyncClient() as client:
        base = f"http://127.0.0.1:{port}"
        assert (await client.get(f"{base}/healthz")).status_code == 200
        with liveness.work("models/default"):
            now[0] = STALLED_SECONDS + 1
            assert (await client.get(f"{base}/healthz")).status_code == 503
        text = (await client.get(f"{base}/metrics")).text
    assert 'tidegate_operator_writes_total{kind="Model",verb="status"} 1.0' in text
    assert "tidegate_operator_leading 0.0" in text
