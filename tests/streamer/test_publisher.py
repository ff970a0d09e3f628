import contextlib
import gc
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import pytest
import zmq

from streamer import types
from streamer.publisher import EventPublisher, PublishError, new_epoch

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
LOOPBACK = "tcp://127.0.0.1:*"


@pytest.fixture(params=["tcp", "ipc"])
def endpoint(request, tmp_path) -> str:
    return LOOPBACK if request.param == "tcp" else f"ipc://{tmp_path}/events"


def a_publisher(endpoint=LOOPBACK, *, lossless=True, stop=None, **settings) -> EventPublisher:
    stop = stop or threading.Event()
    return EventPublisher(endpoint, stream="box", epoch="e1", lossless=lossless, stop=stop, **settings)


@contextlib.contextmanager
def a_subscriber(publisher: EventPublisher, *prefixes: str, high_water=1000) -> Iterator[zmq.Socket]:
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.set(zmq.RCVHWM, high_water)
        subscriber.set(zmq.RCVTIMEO, 10_000)
        subscriber.set(zmq.LINGER, 0)
        for prefix in prefixes:
            subscriber.subscribe(prefix)
        subscriber.connect(publisher.endpoint)
        yield subscriber


@contextlib.contextmanager
def a_subscriber_to_freeze(publisher: EventPublisher) -> Iterator[subprocess.Popen]:
    """Another process that subscribes to all and prints a line for the first event."""
    code = (
        "import sys, zmq\n"
        "subscriber = zmq.Context().socket(zmq.SUB)\n"
        "subscriber.subscribe('')\n"
        "subscriber.connect(sys.argv[1])\n"
        "subscriber.recv_multipart()\n"
        "print('received', flush=True)\n"
        "while True: subscriber.recv_multipart()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, publisher.endpoint], stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def freeze_after_the_first_event(process: subprocess.Popen, publisher: EventPublisher) -> None:
    assert publisher.wait_for_subscribers(1)
    publisher.publish(a_face())
    assert process.stdout.readline() == b"received\n"
    process.send_signal(signal.SIGSTOP)


def a_face(camera="hall", frame=0) -> types.FaceAppeared:
    moment = types.Moment(camera, frame, frame / 25, NOON, "file")
    return types.FaceAppeared(types.Track(1, moment, np.zeros(4), np.zeros((5, 2)), 0.9))


def a_heavy_face(frame=0, side=100) -> types.FaceIdentified:
    """An event of side² x 3 bytes of noise."""
    image = np.random.default_rng(frame).integers(0, 256, (side, side, 3), np.uint8)
    quality = types.Quality(50, 20, 0.5, 3, 0, 0, 0)
    crop = types.Crop(a_face(frame=frame).track, image, np.eye(2, 3), quality)
    return types.FaceIdentified(crop, types.Route("none", "large"), None, None, "no embedder")


def a_status(camera="hall") -> types.CameraStatus:
    return types.CameraStatus(camera, "live", 25.0, 0.01, {})


def headers(subscriber: zmq.Socket, count: int) -> list[dict]:
    return [json.loads(subscriber.recv_multipart()[1]) for _ in range(count)]


def seconds(work) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def test_subscribers_get_the_events_numbered_without_a_gap_over_all_topics_and_in_each(endpoint):
    events = [a_face("hall"), a_face("yard"), a_status("hall"), a_face("hall"), a_status("hall"), a_face("yard")]
    with a_publisher(endpoint) as publisher, a_subscriber(publisher, "") as subscriber:
        publisher.wait_for_subscribers(1)

        assert all(publisher.publish(event) for event in events)

        received = headers(subscriber, 6)
        assert publisher.published == 6
    assert [header["seq"] for header in received] == [0, 1, 2, 3, 4, 5]
    assert [header["topic_seq"] for header in received] == [0, 0, 0, 1, 1, 1]
    assert {header["epoch"] for header in received} == {"e1"}


def test_the_header_says_when_it_was_published():
    with a_publisher(clock=lambda: NOON) as publisher, a_subscriber(publisher, "") as subscriber:
        publisher.wait_for_subscribers(1)
        publisher.publish(a_face())

        assert headers(subscriber, 1)[0]["published_at"] == "2026-11-21T12:00:00Z"


@pytest.mark.parametrize("prefix", ["", "f", "face/", "face/hall"])
def test_a_subscription_that_matches_faces_is_waited_for_and_the_log_says_so(prefix, caplog):
    caplog.set_level(logging.INFO)
    with a_publisher() as publisher:
        with_a_subscriber_soon = threading.Timer(0.3, lambda: entered.append(stack.enter_context(subscription)))
        entered: list[zmq.Socket] = []
        subscription = a_subscriber(publisher, prefix)
        with contextlib.ExitStack() as stack:
            with_a_subscriber_soon.start()

            assert publisher.wait_for_subscribers(1)

            with_a_subscriber_soon.join()
            assert entered
    assert f"waiting at {publisher.endpoint} for 1 subscribers to faces" in caplog.text


@pytest.mark.parametrize("prefix", ["status/", "system", "face0", "faces/"])
def test_other_subscriptions_are_not_counted_and_the_end_ends_the_waiting(prefix):
    stop = threading.Event()
    with a_publisher(stop=stop) as publisher, a_subscriber(publisher, prefix):
        threading.Timer(0.5, stop.set).start()

        assert not publisher.wait_for_subscribers(1)


def test_two_subscribers_to_the_same_are_two():
    stop = threading.Event()
    with a_publisher(stop=stop) as publisher, a_subscriber(publisher, ""), a_subscriber(publisher, ""):
        assert publisher.wait_for_subscribers(2)

        threading.Timer(0.5, stop.set).start()
        assert not publisher.wait_for_subscribers(3)


def test_who_unsubscribed_or_left_is_not_counted_any_more():
    stop = threading.Event()
    with a_publisher(stop=stop) as publisher, a_subscriber(publisher, "face/") as fickle:
        with a_subscriber(publisher, ""), a_subscriber(publisher, ""):
            assert publisher.wait_for_subscribers(3)
        fickle.unsubscribe("face/")
        for _ in range(5):
            time.sleep(0.1)
            publisher.publish(a_status())

        threading.Timer(0.5, stop.set).start()
        assert not publisher.wait_for_subscribers(1)


def test_lossless_a_slow_subscriber_gets_all_and_holds_the_sender_back(endpoint):
    with a_publisher(endpoint) as publisher, a_subscriber(publisher, "", high_water=10) as subscriber:
        received: list[dict] = []

        def read_slowly() -> None:
            time.sleep(2)
            received.extend(headers(subscriber, 2000))

        publisher.wait_for_subscribers(1)
        reader = threading.Thread(target=read_slowly)
        reader.start()
        heavy = a_heavy_face(side=50)
        worst = max(seconds(lambda: publisher.publish(heavy)) for _ in range(2000))
        reader.join()

    assert [header["seq"] for header in received] == list(range(2000))
    assert [header["topic_seq"] for header in received] == list(range(2000))
    assert worst > 0.3  # it was held back indeed


def test_live_a_subscriber_that_does_not_read_never_holds_the_sender_back(endpoint):
    heavy = a_heavy_face(side=60)
    with a_publisher(endpoint, lossless=False) as publisher, a_subscriber(publisher, "", high_water=10) as subscriber:
        publisher.wait_for_subscribers(1)

        worst = max(seconds(lambda: publisher.publish(heavy)) for _ in range(2000))
        missed = _read_until_a_gap(publisher, subscriber)

    assert worst < 3
    assert 500 < missed < 1900


def _read_until_a_gap(publisher: EventPublisher, subscriber: zmq.Socket) -> int:
    for expected in itertools.count():
        [header] = headers(subscriber, 1)
        if header["topic_seq"] != expected:
            return header["topic_seq"] - expected
        publisher.publish(a_face())
    raise AssertionError


@pytest.mark.parametrize("side", [4, 100], ids=["light events", "heavy events"])
def test_lossless_a_frozen_subscriber_is_let_go_and_the_others_have_all(endpoint, side, caplog):
    caplog.set_level(logging.INFO)
    event = a_heavy_face(side=side)
    received: list[int] = []
    with contextlib.ExitStack() as stack:
        publisher = stack.enter_context(a_publisher(endpoint, silent_s=1.5))
        frozen = stack.enter_context(a_subscriber_to_freeze(publisher))
        freeze_after_the_first_event(frozen, publisher)
        healthy = stack.enter_context(a_subscriber(publisher, ""))
        publisher.wait_for_subscribers(2)
        reader = threading.Thread(target=lambda: _read_until_the_status(healthy, received))
        reader.start()

        let_go_after = _publish_until_somebody_is_let_go(publisher, event, caplog)

        for _ in range(300):
            publisher.publish(event)
        publisher.publish(a_status())
        reader.join()
    assert 0.5 < let_go_after < 10  # over TCP it is not silent before its kernel has no room left
    assert received == list(range(1, publisher.published))


def _publish_until_somebody_is_let_go(publisher: EventPublisher, event: types.Event, caplog) -> float:
    began = time.monotonic()
    while " is let go" not in caplog.text and time.monotonic() - began < 12:
        publisher.publish(event)
    return time.monotonic() - began


def test_a_subscriber_frozen_behind_full_buffers_is_cut_off_though_no_ping_gets_through(tmp_path, caplog):
    with (
        a_publisher(f"ipc://{tmp_path}/events", silent_s=2.5) as publisher,
        a_subscriber_to_freeze(publisher) as frozen,
    ):
        freeze_after_the_first_event(frozen, publisher)
        caplog.set_level(logging.WARNING)

        let_go_after = _publish_until_somebody_is_let_go(publisher, a_heavy_face(side=4), caplog)

        assert 2 < let_go_after < 12
        assert "was silent for 2 s and is let go" in caplog.text


def _read_until_the_status(subscriber: zmq.Socket, seqs: list[int]) -> None:
    kind = ""
    while kind != "camera.status":
        header = headers(subscriber, 1)[0]
        kind = header["kind"]
        seqs.append(header["seq"])


@pytest.mark.parametrize("lossless", [True, False])
def test_a_frozen_subscriber_is_let_go_even_if_next_to_nothing_is_sent(endpoint, lossless, caplog):
    caplog.set_level(logging.INFO)
    with (
        a_publisher(endpoint, lossless=lossless, silent_s=1.2) as publisher,
        a_subscriber_to_freeze(publisher) as frozen,
    ):
        freeze_after_the_first_event(frozen, publisher)

        began = time.monotonic()
        while " is let go" not in caplog.text and time.monotonic() - began < 5:
            publisher.publish(a_status())
            time.sleep(0.1)

        assert 0.5 < time.monotonic() - began < 10


def test_live_a_frozen_subscriber_with_full_buffers_is_let_go_too(endpoint, caplog):
    event = a_heavy_face(side=4)
    with a_publisher(endpoint, lossless=False, silent_s=1.5) as publisher, a_subscriber_to_freeze(publisher) as frozen:
        freeze_after_the_first_event(frozen, publisher)
        caplog.set_level(logging.INFO)

        assert 0.5 < _publish_until_somebody_is_let_go(publisher, event, caplog) < 12


def test_a_subscriber_that_only_pauses_is_kept():
    event = a_heavy_face()
    with a_publisher(silent_s=3) as publisher, a_subscriber_to_freeze(publisher) as paused:
        freeze_after_the_first_event(paused, publisher)
        threading.Timer(1.2, lambda: paused.send_signal(signal.SIGCONT)).start()

        held_back = max(seconds(lambda: publisher.publish(event)) for _ in range(600))

        assert 0.5 < held_back < 8
        assert publisher.wait_for_subscribers(1)


def test_a_subscriber_that_reads_slowly_but_steadily_is_kept_and_loses_nothing(endpoint):
    """Seconds of events wait for it, and the pings behind them: it answers those far too late."""
    event = a_heavy_face()
    with a_publisher(endpoint, silent_s=1.2) as publisher, a_subscriber(publisher, "", high_water=20) as subscriber:
        received: list[dict] = []

        def read_slowly() -> None:
            for _ in range(250):
                received.extend(headers(subscriber, 1))
                time.sleep(0.012)

        publisher.wait_for_subscribers(1)
        reader = threading.Thread(target=read_slowly)
        reader.start()
        for _ in range(250):
            publisher.publish(event)
        publisher.close()
        reader.join()

    assert [header["seq"] for header in received] == list(range(250))


def test_an_idle_subscriber_is_kept(endpoint):
    with a_publisher(endpoint, silent_s=0.5) as publisher, a_subscriber(publisher, "") as subscriber:
        publisher.wait_for_subscribers(1)
        for _ in range(2):
            time.sleep(0.8)
            publisher.publish(a_face())

        assert [header["seq"] for header in headers(subscriber, 2)] == [0, 1]


def test_a_stop_ends_the_holding_back_and_what_was_not_sent_takes_no_number():
    stop = threading.Event()
    event = a_heavy_face()
    with a_publisher(stop=stop) as publisher, a_subscriber(publisher, "", high_water=1):
        publisher.wait_for_subscribers(1)
        threading.Timer(0.3, stop.set).start()

        began = time.monotonic()
        while publisher.publish(event):
            sent = publisher.published

        assert time.monotonic() - began < 5
        assert publisher.published == sent
        assert seconds(lambda: publisher.publish(event)) < 1
        assert seconds(publisher.close) < 8


def test_a_subscriber_that_reads_gets_the_last_events_after_a_stop():
    stop = threading.Event()
    event = a_heavy_face()
    with a_publisher(stop=stop) as publisher, a_subscriber(publisher, "", high_water=10) as subscriber:
        publisher.wait_for_subscribers(1)
        received: list[int] = []
        reader = threading.Thread(target=lambda: _read_until_the_status(subscriber, received))
        threading.Timer(0.5, reader.start).start()
        threading.Timer(0.3, stop.set).start()

        began = time.monotonic()
        while time.monotonic() - began < 1:
            publisher.publish(event)
        assert publisher.publish(a_status())

        publisher.close()
        reader.join()
    assert received == list(range(publisher.published))


def test_at_the_end_of_files_what_waits_is_delivered(tmp_path):
    event = a_heavy_face()
    with a_subscriber_after_a_while(a_publisher(f"ipc://{tmp_path}/events")) as (publisher, received, reader):
        for _ in range(90):
            publisher.publish(event)
        publisher.publish(a_status())

        assert seconds(publisher.close) > 0.5  # it had to wait for the reader
        reader.join()

    assert received == list(range(91))


@contextlib.contextmanager
def a_subscriber_after_a_while(publisher: EventPublisher):
    """One that begins to read after 2 s."""
    received: list[int] = []
    with publisher, a_subscriber(publisher, "", high_water=1) as subscriber:
        publisher.wait_for_subscribers(1)
        reader = threading.Timer(2, lambda: _read_until_the_status(subscriber, received))
        reader.start()
        yield publisher, received, reader


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_after_a_stop_nobody_is_waited_for_longer_than_a_moment(when, tmp_path):
    stop = threading.Event()
    event = a_heavy_face()
    with a_publisher(f"ipc://{tmp_path}/events", stop=stop) as publisher, a_subscriber_to_freeze(publisher) as frozen:
        freeze_after_the_first_event(frozen, publisher)
        for _ in range(90):
            publisher.publish(event)
        threading.Timer(1.0 if when == "meanwhile" else 0.0, stop.set).start()
        time.sleep(0.1)

        assert 0.5 < seconds(publisher.close) < 8


def test_live_the_end_takes_a_second_at_most(tmp_path):
    event = a_heavy_face()
    with (
        a_publisher(f"ipc://{tmp_path}/events", lossless=False) as publisher,
        a_subscriber_to_freeze(publisher) as frozen,
    ):
        freeze_after_the_first_event(frozen, publisher)
        for _ in range(500):
            publisher.publish(event)

        assert 0.5 < seconds(publisher.close) < 8


def test_it_leaves_no_open_file_behind():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with a_publisher() as publisher, a_subscriber(publisher, ""):
            publisher.wait_for_subscribers(1)
            publisher.publish(a_face())
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_endpoint_in_use_is_refused_in_one_line(endpoint):
    with a_publisher(endpoint) as first:
        with pytest.raises(PublishError, match=f"cannot publish at {first.endpoint}: Address already in use"):
            a_publisher(first.endpoint)

        with a_subscriber(first, "") as subscriber:  # and the first goes on undisturbed
            first.wait_for_subscribers(1)
            first.publish(a_face())
            assert headers(subscriber, 1)[0]["seq"] == 0


def test_an_ipc_path_left_behind_by_a_crash_is_used_again(tmp_path):
    path = tmp_path / "events"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))

    with a_publisher(f"ipc://{path}"):
        assert path.is_socket()


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "nonsense",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:80x",
        "tcp://no.such.host.invalid:5556",
        "http://127.0.0.1:5556",
        "ipc://",
        "ipc:///no/such/folder/events",
        f"ipc:///tmp/{'x' * 200}",
        "udp://127.0.0.1:5556",
    ],
)
def test_a_wrong_endpoint_is_refused_in_one_line(wrong):
    with pytest.raises(PublishError, match=f"^cannot publish at {wrong}: [A-Za-z' ]+") as refusal:
        a_publisher(wrong)

    assert "\n" not in str(refusal.value)


def test_epochs_sort_by_time():
    epochs = []
    for _ in range(5):
        epochs.append(new_epoch())
        time.sleep(0.001)

    assert epochs == sorted(set(epochs))
