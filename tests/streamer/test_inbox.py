import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.inbox import Closed, Inbox


def test_a_fast_camera_does_not_crowd_out_a_slow_one():
    inbox: Inbox[str] = Inbox(room=10, total=99)
    for index in range(6):
        inbox.put("fast", f"fast {index}", wait=True)
    inbox.put("slow", "slow 0", wait=True)

    taken = inbox.take(3)

    assert taken == ["fast 0", "slow 0", "fast 1"]


def test_live_the_oldest_gives_way_to_the_newest_and_is_handed_back():
    inbox: Inbox[int] = Inbox(room=1, total=99)

    dropped = [inbox.put("camera", number, wait=False) for number in range(3)]

    assert dropped == [None, 0, 1]
    assert inbox.take(9) == [2]


def test_what_must_be_kept_never_gives_way():
    inbox: Inbox[str] = Inbox(room=1, total=99)
    inbox.put("track", "appeared", wait=False, keep=True)
    inbox.put("track", "crop 1", wait=False)

    dropped = inbox.put("track", "crop 2", wait=False)
    inbox.put("track", "left", wait=False, keep=True)

    assert dropped == "crop 1"
    assert inbox.take(9) == ["appeared", "crop 2", "left"]


def test_files_wait_for_room_and_lose_nothing():
    inbox: Inbox[int] = Inbox(room=2, total=99)

    def send() -> None:
        for number in range(500):
            inbox.put("file", number, wait=True)
        inbox.close()

    sender = threading.Thread(target=send)
    sender.start()
    received: list[int] = []
    while taken := inbox.take(3):
        received += taken
    sender.join()

    assert received == list(range(500))


def test_files_wait_where_many_short_lanes_add_up_to_the_total():
    inbox: Inbox[int] = Inbox(room=4, total=3)
    sender = threading.Thread(target=lambda: [inbox.put(lane, lane, wait=True) for lane in range(5)])
    sender.start()
    time.sleep(0.1)

    assert len(inbox) == 3
    received = inbox.take(9)
    sender.join(5)
    assert received + inbox.take(9) == [0, 1, 2, 3, 4]


def test_live_the_oldest_of_any_lane_gives_way_where_all_is_full():
    inbox: Inbox[int] = Inbox(room=4, total=3)
    inbox.put("kept", 100, wait=False, keep=True)

    dropped = [inbox.put(f"track {number}", number, wait=False) for number in range(1000)]

    assert dropped == [None, None, *range(998)]
    assert inbox.take(9) == [100, 998, 999]


def test_closing_frees_a_sender_that_waits():
    inbox: Inbox[int] = Inbox(room=1, total=99)
    inbox.put("file", 0, wait=True)
    caught: list[type] = []

    def send() -> None:
        try:
            inbox.put("file", 1, wait=True)
        except Closed:
            caught.append(Closed)

    sender = threading.Thread(target=send)
    sender.start()
    time.sleep(0.05)
    inbox.close()
    sender.join(5)

    assert caught == [Closed]
    assert inbox.take(5) == [0]
    assert inbox.take(5) == []


def test_a_closed_inbox_takes_nothing_in():
    inbox: Inbox[int] = Inbox(room=1, total=99)
    inbox.close()

    with pytest.raises(Closed):
        inbox.put("camera", 1, wait=False)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60), st.integers(1, 3))
def test_each_lane_keeps_its_order_and_all_is_accounted_for(sent, room):
    inbox: Inbox[tuple[int, int]] = Inbox(room=room, total=99)
    dropped = [inbox.put(lane, (lane, number), wait=False, keep=keep) for number, (lane, keep) in enumerate(sent)]
    received = inbox.take(len(sent)) if len(inbox) else []

    lost = [item for item in dropped if item is not None]
    assert sorted(received + lost) == sorted((lane, number) for number, (lane, _) in enumerate(sent))
    for lane in range(4):
        numbers = [number for of, number in received if of == lane]
        assert numbers == sorted(numbers)
    assert all(not sent[number][1] for _, number in lost)
