"""The tables that ship are for networks that ship, or that engines/cards knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.card import known_cards
from engines.store import Model, default_store
from streamer.assembly import Networks
from streamer.calibration import Calibration
from streamer.enrolment import EMBEDDER
from streamer.router import RouteTable

STORE = default_store(offline=True)
NETWORKS = Networks(STORE)
WEIGHTS = Path(__file__).parents[2] / "models/weights"
FITTED = {EMBEDDER: STORE.find(EMBEDDER).sha256, **{card.name: sha256 for sha256, card in known_cards().items()}}
"""The sha256 of the networks that tables may be fitted for, by name."""


@pytest.fixture(params=sorted(path.name.removesuffix(".routes.json") for path in WEIGHTS.glob("*.routes.json")))
def embedder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def routes(embedder: str) -> RouteTable:
    return RouteTable.read(WEIGHTS / f"{embedder}.routes.json", embedder_sha256=FITTED[embedder])


@pytest.fixture
def calibration(embedder: str) -> Calibration:
    return Calibration.read(WEIGHTS / f"{embedder}.calibration.json", embedder_sha256=FITTED[embedder])


def test_what_ships_for_the_embedder_that_ships_is_found():
    assert NETWORKS.routes(EMBEDDER) is not None
    assert NETWORKS.calibration(EMBEDDER, None) is not None


def network(name: str) -> Model:
    return STORE.find(name)


def test_routes_were_fitted_for_the_restorers_that_ship(routes):
    assert routes.restorers == {name: network(name).sha256 for name in routes.restorers}
    assert set(routes.routed) <= set(routes.restorers)


def test_the_calibration_was_fitted_with_the_routes_that_ship(routes, calibration):
    assert calibration.restorers
    for each in calibration.restorers:
        assert each.name in routes.routed
        assert each.sha256 == network(each.name).sha256


def test_ratios_claim_no_more_than_the_people_they_were_fitted_on_bear_out(calibration):
    for each in calibration.bins:
        assert each.mates >= 100 and each.people >= 100
        assert -3 < each.llr_bounds[0] < 0 < each.llr_bounds[1] < 5
        assert all(rate >= 1e-6 for rate in each.strangers_above_high)


def test_a_larger_face_tells_more(calibration):
    most = [each.llr_bounds[1] for each in calibration.bins]

    assert most == sorted(most)
