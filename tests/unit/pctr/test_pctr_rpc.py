"""The light client against a real gRPC server: messages, streams, flow control, statuses, deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pctr import light
from pctr.http2 import STREAM_WINDOW
from pctr.rpc import CONTENT, TASKS, Client, DaemonMissing, _grpc_timeout, _percent_decode, socket_path

from supervisord_ctr import errors
from supervisord_ctr.api.services.content.v1 import content_pb2
from supervisord_ctr.api.services.tasks.v1 import tasks_pb2
from tests.support.pctr_grpc import Behaviour, grpc_server

Served = tuple[Client, Behaviour]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Behaviour]]:
    with grpc_server(tmp_path_factory.mktemp("grpc")) as served:
        yield served


@pytest.fixture
def served(server: tuple[str, Behaviour]) -> Iterator[Served]:
    path, behaviour = server
    behaviour.released.clear()
    behaviour.cancelled.clear()
    with Client(path, "team") as client:
        yield client, behaviour


def _get(client: Client, name: str, timeout: float | None = None) -> tasks_pb2.GetResponse:
    return client.unary(TASKS + "Get", tasks_pb2.GetRequest(container_id=name), tasks_pb2.GetResponse, timeout=timeout)


def test_a_call_carries_namespace_and_lease_and_brings_the_answer(served: Served) -> None:
    client, behaviour = served
    with client.leased("build"):
        assert _get(client, "web").process.container_id == "web"
    assert behaviour.metadata["containerd-namespace"] == "team"
    assert behaviour.metadata["containerd-lease"] == "build"
    _get(client, "web")
    assert "containerd-lease" not in behaviour.metadata


def test_light_messages_are_as_good_as_generated_ones(served: Served) -> None:
    client, _ = served
    answer = client.unary(TASKS + "Get", light.ProcessId(container_id="ünïcode"), light.GetProcessResponse)
    assert answer.process is not None
    assert answer.process.container_id == "ünïcode"


@pytest.mark.parametrize(("code", "kind"), [
    ("NOT_FOUND", errors.NotFound), ("ALREADY_EXISTS", errors.AlreadyExists), ("UNAVAILABLE", errors.Unavailable),
    ("FAILED_PRECONDITION", errors.FailedPrecondition), ("UNKNOWN", errors.Unknown),
])
def test_a_status_becomes_its_error_with_its_message(served: Served, code: str, kind: type[errors.Error]) -> None:
    with pytest.raises(kind, match="^größe: 100% of “it”\n$"):
        _get(served[0], f"fail:{code}:größe: 100% of “it”\n")


def test_a_method_that_nobody_serves_is_unimplemented(served: Served) -> None:
    with pytest.raises(errors.Unimplemented):
        served[0].unary(TASKS + "Dance", light.Empty(), light.Empty)


def test_large_messages_pass_both_ways_whatever_the_windows(served: Served) -> None:
    name = "x" * (5 * STREAM_WINDOW)
    assert _get(served[0], name).process.container_id == name


def test_a_stream_is_read_message_by_message(served: Served) -> None:
    size = 3 * STREAM_WINDOW + 1
    request = content_pb2.ReadContentRequest(size=size, offset=100_000)
    parts = [part.data for part in served[0].start(CONTENT + "Read", request, content_pb2.ReadContentResponse)]
    assert sum(map(len, parts)) == size
    assert {len(part) for part in parts[:-1]} == {100_000}


def test_messages_before_a_failure_are_delivered_and_then_the_failure(served: Served) -> None:
    request = content_pb2.ReadContentRequest(digest="broken", size=10, offset=5)
    call = served[0].start(CONTENT + "Read", request, content_pb2.ReadContentResponse)
    assert call.receive() is not None
    assert call.receive() is not None
    with pytest.raises(errors.DataLoss, match="the rest is gone"):
        call.receive()


def test_a_stream_that_is_not_read_stops_its_sender_and_no_other_call(served: Served) -> None:
    client, _ = served
    request = content_pb2.ReadContentRequest(size=64 << 20, offset=1 << 20)
    unread = client.start(CONTENT + "Read", request, content_pb2.ReadContentResponse)
    for number in range(20):
        assert _get(client, f"other{number}").process.container_id == f"other{number}"
    assert len(unread._stream.received) <= STREAM_WINDOW
    assert sum(len(part.data) for part in unread) == 64 << 20


def test_both_directions_of_a_stream_at_once(served: Served) -> None:
    call = served[0].stream(CONTENT + "Write", content_pb2.WriteContentResponse)
    for number in range(1, 6):
        call.send(content_pb2.WriteContentRequest(action=content_pb2.WRITE, data=b"y" * 700_000))
        answer = call.receive()
        assert answer is not None
        assert answer.offset == number * 700_000
    call.close_send()
    assert call.receive() is None


def test_a_call_waits_while_others_come_and_go(served: Served) -> None:
    client, behaviour = served
    wait = client.start(TASKS + "Wait", light.ProcessId(container_id="web"), light.WaitResponse)
    assert _get(client, "a").process.container_id == "a"
    assert not wait.done
    behaviour.released.set()
    assert wait.result().exit_status == 7


def test_a_deadline_that_passes_ends_the_call_here_and_there(served: Served) -> None:
    client, behaviour = served
    call = client.start(TASKS + "Wait", light.ProcessId(container_id="web"), light.WaitResponse, timeout=0.2)
    with pytest.raises(errors.DeadlineExceeded):
        call.result()
    assert behaviour.cancelled.wait(30)
    assert _get(client, "still works").process.container_id == "still works"


def test_a_cancelled_call_is_cancelled_at_the_daemon(served: Served) -> None:
    client, behaviour = served
    call = client.start(TASKS + "Wait", light.ProcessId(container_id="web"), light.WaitResponse)
    _get(client, "so that the other one has arrived")
    call.cancel()
    assert behaviour.cancelled.wait(30)


def test_many_calls_on_one_connection(served: Served) -> None:
    client, _ = served
    calls = [client.start(TASKS + "Get", light.ProcessId(container_id=f"n{number}"), light.GetProcessResponse)
             for number in range(80)]
    for number, call in reversed(list(enumerate(calls))):
        answer = call.result()
        assert answer.process is not None
        assert answer.process.container_id == f"n{number}"


def test_a_daemon_that_goes_fails_the_calls_in_flight(tmp_path: Path) -> None:
    with grpc_server(tmp_path) as (path, behaviour):
        client = Client(path, "team")
        call = client.start(TASKS + "Wait", light.ProcessId(container_id="web"), light.WaitResponse)
        _get(client, "so that it has arrived")
        behaviour.released.set()
        call.result()
        call = client.start(TASKS + "Wait", light.ProcessId(container_id="web"), light.WaitResponse)
        behaviour.released.clear()
    with pytest.raises(errors.Error):
        call.result()
        _get(client, "nobody is there")
    client.close()


def test_no_daemon_is_one_line_that_says_how_to_start_it(tmp_path: Path) -> None:
    client = Client(str(tmp_path / "none.sock"), "team", start_hint="supervisord-ctr --address here")
    with pytest.raises(DaemonMissing) as caught:
        _get(client, "web")
    assert "\n" not in str(caught.value)
    assert "'supervisord-ctr --address here'" in str(caught.value)
    assert str(tmp_path / "none.sock") in str(caught.value)


def test_addresses_with_and_without_scheme(tmp_path: Path) -> None:
    assert socket_path(f"unix://{tmp_path}/s") == socket_path(f"{tmp_path}/s") == f"{tmp_path}/s"


def test_percent_decoding_leaves_stray_signs_alone() -> None:
    assert _percent_decode("a%20b%zz%") == "a b%zz%"
    assert _percent_decode("gr%C3%B6%C3%9Fe") == "größe"


def test_deadlines_on_the_wire_have_eight_digits_at_most() -> None:
    assert _grpc_timeout(0.0001) == "1m"
    assert _grpc_timeout(1.5) == "1500m"
    assert _grpc_timeout(1e6) == "1000000S"
    assert _grpc_timeout(1e12) == "99999999S"
