import httpx

from tidegate_operator.health import STALLED_SECONDS, Pulse, serve_health
from tidegate_operator.metrics import Metrics


def test_work_that_never_ends_is_a_problem_and_no_work_is_none() -> None:
    now = [0.0]
    pulse = Pulse(clock=lambda: now[0])
    now[0] = 1e6
    assert pulse.problem() == ""
    with pulse.work("models/default"):
        now[0] += STALLED_SECONDS
        assert pulse.problem() == ""
        now[0] += 1
        assert "models/default" in pulse.problem()
    assert pulse.problem() == ""


async def test_the_kubelet_and_prometheus_get_their_answers() -> None:
    now = [0.0]
    pulse, metrics = Pulse(clock=lambda: now[0]), Metrics()
    metrics.count_write("Model", "status")
    async with serve_health("127.0.0.1", 0, pulse, metrics) as port, httpx.AsyncClient() as client:
        base = f"http://127.0.0.1:{port}"
        assert (await client.get(f"{base}/healthz")).status_code == 200
        with pulse.work("models/default"):
            now[0] = STALLED_SECONDS + 1
            assert (await client.get(f"{base}/healthz")).status_code == 503
        text = (await client.get(f"{base}/metrics")).text
    assert 'tidegate_operator_writes_total{kind="Model",verb="status"} 1.0' in text
    assert "tidegate_operator_leading 0.0" in text
