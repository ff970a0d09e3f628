"""The table of a calibration: what it says between its steps and beyond them, and which files it refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.calibration import Calibration, CalibrationError

EMBEDDER = "e" * 64
STEPS = [0.0, 0.25, 0.5, 0.75]
BIN = {
    "least_px": 0, "mates": 40, "strangers": 1000, "people": 30, "calibrator": "logistic", "llr_bounds": [-1.0, 2.0],
    "llr": [-1.0, 0.0, 1.0, 2.0], "llr_low": [-1.0, -0.5, 0.5, 2.0], "llr_high": [-0.5, 0.5, 1.5, 2.0],
    "strangers_above": [0.5, 0.1, 0.001, 0.0], "strangers_above_high": [0.6, 0.12, 0.004, 0.003],
}  # fmt: skip
TABLE = {
    "schema": "streamer.calibration/1", "embedder": {"name": "tiny", "sha256": EMBEDDER}, "restorers": [],
    "routes": {"none": 70}, "data": "nobody", "terms": "none", "people": 30, "pairs": 2080, "command": "by hand",
    "fitted_on": "2026-01-01", "streamer": "0", "similarities": STEPS,
    "bins": [BIN, {**BIN, "least_px": 24, "strangers_above_high": [0.6, 0.12, 0.001, 0.0005]}],
}  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write the table with other fields, the first bin with other ones."""

    def write(first: dict[str, Any] | None = None, **fields: Any) -> Path:
        table = {**TABLE, "bins": [{**BIN, **(first or {})}, *TABLE["bins"][1:]], **fields}
        path = tmp_path / "tiny.calibration.json"
        path.write_text(json.dumps(table))
        return path

    return write


@pytest.fixture
def table(written: Callable[..., Path]) -> Calibration:
    return Calibration.read(written(), embedder_sha256=EMBEDDER)


def test_a_ratio_and_its_interval_lie_between_those_of_the_nearest_steps(table: Calibration):
    ratio = table.llr(0.375, 20)

    assert (ratio.llr, ratio.low, ratio.high) == (0.5, 0.0, 1.0)


@given(similarity=st.floats(-1, 1), more=st.floats(0, 2), height=st.floats(1, 500))
def test_a_greater_similarity_never_has_a_smaller_ratio_nor_more_strangers_and_none_is_beyond_its_bounds(
    similarity: float, more: float, height: float
):
    table = Calibration.model_validate(TABLE)
    less, greater = table.llr(similarity, height), table.llr(similarity + more, height)

    assert -1 <= less.llr <= greater.llr <= 2
    assert less.low <= less.llr <= less.high
    assert table.false_match_rate(similarity, height) >= table.false_match_rate(similarity + more, height) > 0


def test_beyond_the_steps_the_last_one_holds_and_a_false_match_is_never_impossible(table: Calibration):
    assert table.llr(-0.9, 20).llr == -1.0
    assert table.llr(1.0, 20).llr == 2.0
    assert table.false_match_rate(-0.9, 20) == 0.6
    assert table.false_match_rate(1.0, 20) == 0.003


def test_between_two_steps_the_rate_is_that_of_the_lower_one_which_it_cannot_exceed(table: Calibration):
    assert table.false_match_rate(0.49, 20) == 0.12
    assert table.false_match_rate(0.5, 20) == 0.004


@pytest.mark.parametrize(("height", "number"), [(0, 0), (12, 0), (23.9, 0), (24, 1), (500, 1)])
def test_a_face_belongs_to_the_last_bin_that_begins_at_its_height_or_below(
    table: Calibration, height: float, number: int
):
    assert table.bin(height) == number


def test_expected_false_alarms_are_the_passages_at_which_a_stranger_is_like_anybody_enrolled(table: Calibration):
    one = table.expected_false_alarms(0.5, 1, {0: 1000.0})
    hundred = table.expected_false_alarms(0.5, 100, {0: 1000.0})
    both = table.expected_false_alarms(0.5, 1, {0: 1000.0, 1: 1000.0})

    assert one == pytest.approx(4)
    assert hundred == pytest.approx(1000 * (1 - 0.996**100))
    assert both == pytest.approx(4 + 1)
    assert table.expected_false_alarms(0.5, 0, {0: 1000.0}) == 0
    assert table.expected_false_alarms(-1, 10**9, {0: 1000.0}) == pytest.approx(1000), "an alarm a passage at most"


def test_what_is_written_is_read_again_and_known_by_the_hash_of_its_file(table: Calibration, tmp_path: Path):
    path = tmp_path / "again.json"
    made = Calibration.model_validate(TABLE)

    made.write(path)
    read = Calibration.read(path, embedder_sha256=EMBEDDER)

    assert read.bins == table.bins and read.embedder == table.embedder
    assert read.sha256 == made.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.sha256 != table.sha256, "the same numbers in another file"


def test_the_table_of_another_embedder_is_refused(written: Callable[..., Path]):
    with pytest.raises(CalibrationError, match=r"fitted for the embedder tiny \(sha256 eeee.*not for this one .*ffff"):
        Calibration.read(written(), embedder_sha256="f" * 64)


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ({"llr": [-1.0, 0.0, -0.2, 2.0], "llr_low": [-1.0] * 4}, "llr falls"),
        ({"llr_low": [-1.0, 0.1, 0.5, 2.0]}, "outside of its interval"),
        ({"llr_bounds": [-1.0, 1.5]}, "beyond llr_bounds"),
        ({"llr_bounds": [0.5, 2.0]}, "not round 0"),
        ({"strangers_above_high": [0.6, 0.12, 0.004, 0.0]}, "greater than 0"),
        ({"strangers_above_high": [0.6, 0.12, 0.004, 0.005]}, "rises"),
        ({"strangers_above_high": [0.6, 0.12, 0.0001, 0.0001]}, "above its bound"),
        ({"llr_high": [1.0, 1.0, 2.0]}, "not of one length"),
        ({"least_px": 4}, "begin at 0"),
        ({"least_px": "many"}, "bins.0.least_px"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused_in_one_line(
    written: Callable[..., Path], first: dict[str, Any], reason: str
):
    with pytest.raises(CalibrationError) as refused:
        Calibration.read(written(first), embedder_sha256=EMBEDDER)

    assert reason in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file"),
        (b"\xff\xfe no text", "the file"),
        (b"[1, 2]", "the file"),
        (json.dumps({**TABLE, "schema": "streamer.calibration/2"}).encode(), "schema"),
        (json.dumps({**TABLE, "similarities": [0.0, 0.5, 0.25, 0.75]}).encode(), "similarities do not rise"),
        (json.dumps({**TABLE, "similarities": [0.0, 0.5]}).encode(), "more or fewer numbers"),
        (json.dumps({**TABLE, "bins": []}).encode(), "bins"),
        (json.dumps({**TABLE, "mood": "good"}).encode(), "mood"),
        (json.dumps(TABLE).replace("0.12", "NaN").encode(), "is no calibration"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "bad.json"
    path.write_bytes(content)

    with pytest.raises(CalibrationError) as refused:
        Calibration.read(path, embedder_sha256=EMBEDDER)

    assert str(refused.value).startswith(f"{path} is no calibration: ")
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there_or_cannot_be_written_is_told_in_one_line(tmp_path: Path):
    with pytest.raises(CalibrationError, match="No such file"):
        Calibration.read(tmp_path / "none.json", embedder_sha256=EMBEDDER)
    with pytest.raises(CalibrationError, match="Is a directory"):
        Calibration.model_validate(TABLE).write(tmp_path)


def test_a_calibration_tells_what_it_rests_on(table: Calibration):
    first, second = table.lines()

    assert first == (
        "faces of 0 to 24 px: 40 mates, 1000 comparisons with strangers, 30 people; log10 ratios from -1.0 to 2.0"
    )
    assert second.startswith("faces of 24 px and more: ")


def test_similarities_of_float32_are_looked_up_like_any_other(table: Calibration):
    assert table.llr(np.float32(0.5), 20).llr == 1.0
    assert table.false_match_rate(np.float32(0.5), 20) == 0.004
