import os

from prometheus_client.parser import text_string_to_metric_families

from tidegate.messages.engine_metrics import MOST_BYTES, Family, encode_families, exposition, pack

HEAD = "# HELP vllm:tokens Tokens\n# TYPE vllm:tokens gauge\n"


def told(replica: str, value: float) -> bytes:
    return pack(
        encode_families([Family("vllm:tokens", HEAD, f'vllm:tokens{{replica="{replica}"}} {value}\n')])
    )


def test_a_name_stands_once_for_all_replicas() -> None:
    text = exposition([told("a", 1), told("b", 2)])
    (family,) = text_string_to_metric_families(text)
    assert [(sample.labels["replica"], sample.value) for sample in family.samples] == [("a", 1), ("b", 2)]
    assert text.count("# TYPE") == 1


def test_without_engines_there_is_nothing() -> None:
    assert exposition([]) == ""


def test_more_than_a_replica_may_tell_is_left_out() -> None:
    noise = os.urandom(MOST_BYTES).hex()  # packs to half
    assert pack(encode_families([Family("a", "", noise[: MOST_BYTES // 2])]))
    assert pack(encode_families([Family("a", "", noise)])) == b""
    assert pack(encode_families([Family("a", "", "1" * (4 << 20))])) == b""
