import pytest

from streamer.metrics import Metrics


def test_counts_drops_and_batches_are_told_as_they_were_counted():
    metrics = Metrics()
    metrics.count("frames", 3)
    metrics.drop("door", "stale")
    metrics.drop("door", "stale")
    metrics.drop("hall", "overtaken")
    for size in (1, 4, 4):
        with metrics.stage("detect", size):
            pass

    assert metrics.counts() == {"frames": 3, "drops": 3}
    assert metrics.drops() == {"door": {"stale": 2}, "hall": {"overtaken": 1}}
    assert metrics.batch_sizes() == {"detect": {1: 1, 4: 2}}
    assert metrics.stage_seconds()["detect"] > 0


def test_frame_ages_are_told_by_mean_and_worst():
    metrics = Metrics()
    for seconds in (0.1, 0.5, 0.3):
        metrics.frame_age("door", seconds)

    assert metrics.frame_ages() == {"door": (pytest.approx(0.3), 0.5)}


def test_two_runs_count_for_themselves():
    one, other = Metrics(), Metrics()
    one.count("frames")

    one.face_size(20)

    assert other.counts() == {"drops": 0}
    assert other.face_sizes() == {}


def test_restored_crops_are_counted_by_their_side():
    metrics = Metrics()
    for side in (64, 9, 64, 100):
        metrics.face_size(side)

    assert list(metrics.face_sizes().items()) == [(9, 1), (64, 2), (100, 1)]
