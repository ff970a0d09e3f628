import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import pytest
import zmq

from streamer import types, wire
from streamer.client import EventSubscriber, Gap, SubscribeError
from streamer.publisher import EventPublisher

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def a_face(camera="hall", frame=0) -> types.FaceIdentified:
    moment = types.Moment(camera, frame, frame / 25, NOON, "file")
    track = types.Track(1, moment, np.zeros(4), np.zeros((5, 2)), 0.9)
    image = np.random.default_rng(frame).integers(0, 256, (20, 20, 3), np.uint8)
    crop = types.Crop(track, image, np.eye(2, 3), types.Quality(20, 8, 0.5, 3, 0, 0, 0))
    restoration = types.Restoration(image.repeat(2, 0).repeat(2, 1), "sgen", "ab" * 32, 2, "onnxruntime-cpu", "fp32")
    return types.FaceIdentified(crop, types.Route("sgen", "small"), restoration, None, "no embedder")


def a_camera(camera="hall") -> types.CameraStatus:
    return types.CameraStatus(camera, "live", 25.0, 0.01, {})


def the_system(state="ended") -> types.SystemStatus:
    return types.SystemStatus(state, "0.1.0", {}, {}, {}, {})


def a_publisher(endpoint="tcp://127.0.0.1:*", epoch="e1") -> EventPublisher:
    return EventPublisher(endpoint, stream="box", epoch=epoch, lossless=True, stop=threading.Event())


def publish_all(publisher: EventPublisher, *events: types.Event) -> None:
    publisher.wait_for_subscribers(1)
    for event in events:
        publisher.publish(event)


@contextlib.contextmanager
def a_raw_publisher() -> Iterator[tuple[zmq.Socket, str]]:
    """One that sends what it is told, however wrong."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as publisher:
        publisher.set(zmq.XPUB_VERBOSER, 1)
        publisher.bind("tcp://127.0.0.1:*")
        yield publisher, publisher.get_string(zmq.LAST_ENDPOINT)


def a_message(event: types.Event, seq: int, topic_seq: int, epoch="e1") -> list[bytes]:
    return wire.encode(event, stream="box", epoch=epoch, seq=seq, topic_seq=topic_seq, published_at=NOON)


def send_all(publisher: zmq.Socket, subscriptions: int, *messages: list[bytes]) -> None:
    for _ in range(subscriptions):
        publisher.recv()
    for message in messages:
        publisher.send_multipart(message)


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_it_yields_the_events_with_their_images_and_ends_when_the_app_does(transport, tmp_path):
    endpoint = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{tmp_path}/events"
    face = a_face()
    with a_publisher(endpoint) as publisher, EventSubscriber(publisher.endpoint, timeout_s=10) as subscriber:
        publish_all(publisher, the_system("ready"), face, a_camera(), the_system("ended"))

        events = list(subscriber)

    assert [event.topic for event in events] == ["system", "face/hall", "status/hall", "system"]
    assert [event.header.seq for event in events] == [0, 1, 2, 3]
    assert np.array_equal(events[1].images["crop"], face.crop.image)
    assert np.array_equal(events[1].images["restored"], face.restoration.image)
    assert (subscriber.missed, subscriber.epoch) == (0, "e1")


@pytest.mark.parametrize(
    ("topics", "wanted"),
    [
        (("",), ["face/hall", "face/hall2", "status/hall", "system"]),
        (("face/hall",), ["face/hall"]),
        (("face/",), ["face/hall", "face/hall2"]),
        (("face/hall2", "status/hall"), ["face/hall2", "status/hall"]),
        (("face/", "system"), ["face/hall", "face/hall2", "system"]),
    ],
)
def test_a_topic_is_compared_as_a_whole_and_the_end_is_noticed_under_any(topics, wanted):
    with a_publisher() as publisher, EventSubscriber(publisher.endpoint, topics=topics, timeout_s=10) as subscriber:
        publish_all(publisher, a_face("hall"), a_face("hall2"), a_camera("hall"), the_system("ended"))

        assert [event.topic for event in subscriber] == wanted


def test_a_gap_within_a_topic_is_reported_and_counted():
    gaps: list[Gap] = []
    with (
        a_raw_publisher() as (publisher, endpoint),
        EventSubscriber(endpoint, timeout_s=10, on_gap=gaps.append) as subscriber,
    ):
        messages = [a_message(a_face(), 10, 4), a_message(a_camera(), 11, 9), a_message(a_face(), 15, 8)]
        send_all(publisher, 2, *messages, a_message(the_system(), 16, 0))

        assert len(list(subscriber)) == 4

    assert gaps == [Gap("face/hall", "e1", first=5, count=3)]
    assert subscriber.missed == 3


def test_by_default_a_gap_is_a_line_in_the_log(caplog):
    with a_raw_publisher() as (publisher, endpoint), EventSubscriber(endpoint, timeout_s=10) as subscriber:
        send_all(publisher, 2, a_message(a_face(), 0, 0), a_message(a_face(), 3, 3), a_message(the_system(), 4, 0))
        list(subscriber)

    assert "face/hall: 2 events did not come (topic_seq 1 to 2)" in caplog.text


def test_the_app_started_again_is_a_new_epoch_and_what_it_sent_before_we_were_back_is_a_gap(caplog):
    caplog.set_level(logging.INFO)
    gaps: list[Gap] = []
    with (
        a_raw_publisher() as (publisher, endpoint),
        EventSubscriber(endpoint, timeout_s=10, on_gap=gaps.append) as subscriber,
    ):
        old = [a_message(a_face(), 500, 400, "e1"), a_message(a_camera(), 501, 70, "e1")]
        new = [a_message(a_face(), 3, 2, "e2"), a_message(a_camera(), 4, 0, "e2"), a_message(the_system(), 5, 0, "e2")]
        send_all(publisher, 2, *old, *new)
        list(subscriber)

    assert gaps == [Gap("face/hall", "e2", first=0, count=2)]
    assert subscriber.epoch == "e2"
    assert "box was started again: epoch e2 after e1" in caplog.text


def test_it_finds_a_publisher_that_comes_back_at_the_same_place(tmp_path):
    endpoint = f"ipc://{tmp_path}/events"

    def run_twice() -> None:
        for epoch in ("e1", "e2"):
            with a_publisher(endpoint, epoch) as publisher:
                publish_all(publisher, a_face())

    with EventSubscriber(endpoint, timeout_s=10) as subscriber:
        runs = threading.Thread(target=run_twice)
        runs.start()

        assert [next(subscriber).header.epoch for _ in range(2)] == ["e1", "e2"]
        runs.join()


def test_silence_ends_in_a_timeout_that_names_the_endpoint():
    with a_publisher() as publisher, EventSubscriber(publisher.endpoint, timeout_s=0.2) as subscriber:
        with pytest.raises(TimeoutError, match=f"nothing came from {publisher.endpoint} for 0.2 s"):
            next(subscriber)

        publish_all(publisher, a_face())  # and one may go on
        assert next(subscriber).topic == "face/hall"


def test_a_corrupt_message_is_refused_and_the_next_one_comes_all_the_same():
    good = a_message(a_face(), 1, 1)
    corrupt = [*good[:2], good[2][:-4], good[3]]
    with a_raw_publisher() as (publisher, endpoint), EventSubscriber(endpoint, timeout_s=10) as subscriber:
        send_all(publisher, 2, corrupt, good)

        with pytest.raises(wire.WireError, match="crop's bytes do not fit their sha256"):
            next(subscriber)
        assert next(subscriber).header.seq == 1


def test_another_schema_is_refused_in_one_line():
    newer = a_message(a_face(), 0, 0)
    newer[1] = json.dumps(json.loads(newer[1]) | {"schema": "streamer.event/2"}).encode()
    with a_raw_publisher() as (publisher, endpoint), EventSubscriber(endpoint, timeout_s=10) as subscriber:
        send_all(publisher, 2, newer)

        with pytest.raises(wire.WireError, match=r"schema is 'streamer.event/2'; this version reads"):
            next(subscriber)


def test_a_slow_consumer_of_files_gets_everything():
    events = [a_face(frame=frame) for frame in range(40)]
    with a_publisher() as publisher, EventSubscriber(publisher.endpoint, timeout_s=10) as subscriber:
        sender = threading.Thread(target=publish_all, args=(publisher, *events * 10, the_system()))
        sender.start()
        frames = []
        for event in subscriber:
            frames.append(event.header.seq)
            time.sleep(0.02 if len(frames) % 20 == 0 else 0)
        sender.join()

    assert frames == list(range(401))


@pytest.mark.parametrize("wrong", ["", "nonsense", "tcp://127.0.0.1", "http://127.0.0.1:5556"])
def test_a_wrong_endpoint_is_refused_in_one_line(wrong):
    with pytest.raises(SubscribeError, match=f"^cannot subscribe at {wrong}: [A-Z]"):
        EventSubscriber(wrong)
