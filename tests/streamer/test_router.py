import json
import math
from datetime import UTC, datetime

import numpy as np
import pytest

from streamer.router import FittedRouter, RestorerRouter, RouteError, RouteTable
from streamer.types import Crop, Moment, Quality, Track

EMBEDDER = "e" * 64
SCALES = {"sgen": (4, 2, 1), "sisn": (4,), "sisn-x8": (8,)}


def crop(
    height: float = 20, *, noise: float = 0, blockiness: float = 0, sharpness: float = 0.8, yaw: float = 0
) -> Crop:
    side = round(1.6 * height)
    moment = Moment("camera", 0, 0.0, datetime.now(UTC), "file")
    track = Track(1, moment, np.zeros(4, np.float32), np.zeros((5, 2), np.float32), 0.9)
    quality = Quality(height, height / 3, sharpness, noise, blockiness, yaw, 0.0)
    return Crop(track, np.zeros((side, side, 3), np.uint8), np.eye(2, 3), quality)


@pytest.mark.parametrize(
    ("given", "restorer", "reason"),
    [
        (crop(20), "sgen-small", "face 20 px"),
        (crop(63), "sgen-small", "face 63 px"),
        (crop(64), "none", "large and clean"),
        (crop(100, noise=12), "sgen-small", "noise 12.0"),
        (crop(100, blockiness=0.6), "sgen-small", "blockiness 0.60"),
        (crop(100, sharpness=0.2), "sgen-small", "sharpness 0.20"),
        (crop(170, noise=12), "none", "272 px, larger than max_size 256"),
    ],
)
def test_large_clean_faces_go_out_untouched_and_all_others_are_restored(given, restorer, reason):
    route = RestorerRouter("sgen-small", max_size=256).route(given)

    assert route.restorer == restorer
    assert reason in route.reason


def test_without_a_restorer_every_crop_goes_out_untouched():
    route = RestorerRouter("none", max_size=256).route(crop(20, noise=30))

    assert route.restorer == "none"


@pytest.mark.parametrize(("height", "restorer"), [(40, "sisn"), (41, "none")])
def test_a_crop_that_no_scale_keeps_within_max_size_goes_out_untouched(height, restorer):
    route = RestorerRouter("sisn", max_size=256, least_scale=4).route(crop(height, noise=12))

    assert route.restorer == restorer
    assert restorer == "sisn" or "66 px, 264 when restored, larger than max_size 256" in route.reason


def gain(low: float, mean: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, "faces": 200, "people": 25, "ms": 20.0}


def row(heights: tuple[float, float], *routes: str, **figures: tuple[float | None, float | None]) -> dict[str, object]:
    """A row in which all of its routes gain, the first most, and any other restorer loses."""
    gains = {name: gain(-0.03, -0.01, 0.01) for name in SCALES}
    gains |= {name: gain(0.02, 0.05 - place / 100, 0.07) for place, name in enumerate(routes)}
    bounds = {"face_height_px": heights, **figures}
    return {"bounds": bounds, "faces": 200, "people": 25, "raw": 0.4, "gains": gains, "routes": routes}


def written(path, *rows: dict[str, object], **changed: object):
    content = {
        "schema": "streamer.routes/1", "embedder": "some embedder", "embedder_sha256": EMBEDDER,
        "restorers": dict.fromkeys(SCALES, "a" * 64), "max_size": 256, "command": "python docs/fit_routes.py",
        "fitted_on": "2026-11-22", "data": "faces", "terms": "research", "rows": rows,
    }  # fmt: skip
    path.write_text(json.dumps(content | changed))
    return path


@pytest.fixture
def router(tmp_path):
    rows = (
        row((10, 20), "sisn-x8", "sisn", noise=(6, None)),
        row((10, 20), noise=(None, 6)),
        row((20, 64), "sisn", "sgen"),
    )
    table = RouteTable.read(written(tmp_path / "routes.json", *rows), embedder_sha256=EMBEDDER)
    return FittedRouter(table, SCALES, max_size=256)


@pytest.mark.parametrize(
    ("given", "restorer", "reason"),
    [
        (crop(14, noise=9.8), "sisn-x8", "face 14 px, noise 9.8: sisn-x8 gains +0.050 (+0.020 to +0.070) true accepts"),
        (crop(14, noise=5.9), "none", "face 14 px, noise 5.9: no restorer is known to gain there"),
        (crop(10, noise=6), "sisn-x8", "face 10 px"),
        (crop(20, noise=6), "sisn", "sisn gains +0.050"),
        (crop(9.9, noise=6), "none", "no restorer was measured on such faces"),
        (crop(64, noise=6), "none", "no restorer was measured on such faces"),
    ],
)
def test_a_crop_goes_where_recognition_gains_most_by_what_is_measured_on_it(router, given, restorer, reason):
    route = router.route(given)

    assert route.restorer == restorer
    assert reason in route.reason


def test_where_the_best_result_would_exceed_max_size_the_next_best_is_taken_or_none(router, tmp_path):
    table = RouteTable.read(tmp_path / "routes.json", embedder_sha256=EMBEDDER)

    assert router.route(crop(40)).restorer == "sisn"  # 64 px, 256 when restored
    assert router.route(crop(41)).restorer == "sgen"
    assert "sgen gains +0.040" in router.route(crop(41)).reason
    small = FittedRouter(table, SCALES, max_size=64).route(crop(41))
    assert small.restorer == "none"
    assert "restored by sisn it would be larger than max_size 64" in small.reason


def test_a_restorer_that_is_not_loaded_is_no_route(tmp_path):
    path = written(tmp_path / "routes.json", row((10, 20), "sisn-x8", "sisn"))
    table = RouteTable.read(path, embedder_sha256=EMBEDDER)

    assert FittedRouter(table, {"sisn": (4,)}, max_size=256).route(crop(14)).restorer == "sisn"
    assert FittedRouter(table, {}, max_size=256).route(crop(14)).restorer == "none"


def test_a_face_whose_pose_is_unknown_goes_by_no_row_that_asks_for_it(tmp_path):
    path = written(tmp_path / "routes.json", row((10, 64), "sisn-x8", yaw=(-0.3, 0.3)), row((10, 64), "sisn"))
    router = FittedRouter(RouteTable.read(path, embedder_sha256=EMBEDDER), SCALES, max_size=256)

    assert router.route(crop(14, yaw=0.1)).restorer == "sisn-x8"
    assert router.route(crop(14, yaw=math.nan)).restorer == "sisn"
    assert router.route(crop(14, yaw=0.5)).restorer == "sisn"


def test_only_restorers_that_some_row_sends_crops_to_are_worth_loading(router, tmp_path):
    path = written(tmp_path / "some.json", row((10, 20), "sisn"), row((20, 28)), row((28, 40), "sgen", "sisn"))

    assert RouteTable.read(path, embedder_sha256=EMBEDDER).routed == ("sisn", "sgen")


@pytest.mark.parametrize(
    ("rows", "changed", "says"),
    [
        ([row((10, 20), "sisn")], {"embedder_sha256": "f" * 64}, "was fitted for the embedder some embedder"),
        ([row((10, 20), "sisn")], {"schema": "streamer.routes/2"}, "schema"),
        ([], {}, "rows"),
        ([row((10, 20), "sisn") | {"routes": ["sgen"]}], {}, "sgen is a route, but no gain of it is above zero"),
        ([row((10, 20), "sisn") | {"routes": ["scgan"]}], {}, "scgan is a route, but no gain of it is above zero"),
        ([row((10, 20), "sisn", size=(1, 2))], {}, "size"),
        ([row((20, 10), "sisn")], {}, "face_height_px: nothing is from 20 on and below 10"),
        ([row((10, 20), "sisn")], {"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_table_or_that_of_another_embedder_is_refused_in_one_line(tmp_path, rows, changed, says):
    path = written(tmp_path / "routes.json", *rows, **changed)

    with pytest.raises(RouteError) as refused:
        RouteTable.read(path, embedder_sha256=EMBEDDER)

    assert says in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "\udcff"])
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "routes.json"
    path.write_text(content, errors="surrogateescape")

    with pytest.raises(RouteError, match=r"^[^\n]*routes\.json holds no routes: [^\n]*$"):
        RouteTable.read(path, embedder_sha256=EMBEDDER)


def test_an_embedder_without_routes_is_told_in_one_line(tmp_path):
    with pytest.raises(RouteError, match=r"^there are no routes .*: No such file or directory$"):
        RouteTable.read(tmp_path / "routes.json", embedder_sha256=EMBEDDER)
