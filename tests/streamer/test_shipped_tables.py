"""The tables that ship beside the embedder are for the networks that ship."""

from __future__ import annotations

import pytest

from engines.store import Model, default_store
from streamer.assembly import Networks
from streamer.calibration import Calibration
from streamer.enrolment import EMBEDDER
from streamer.router import RouteTable

STORE = default_store(offline=True)
NETWORKS = Networks(STORE)


@pytest.fixture(scope="module")
def routes() -> RouteTable:
    found = NETWORKS.routes(EMBEDDER)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    found = NETWORKS.calibration(EMBEDDER, None)
    assert found is not None
    return found


def network(name: str) -> Model:
    return STORE.find(name)


def test_routes_were_fitted_for_the_restorers_that_ship(routes):
    assert routes.restorers == {name: network(name).sha256 for name in routes.restorers}
    assert set(routes.routed) <= set(routes.restorers)


def test_the_calibration_was_fitted_with_the_routes_that_ship(routes, calibration):
    assert {each.name: each.sha256 for each in calibration.restorers} == {
        name: network(name).sha256 for name in routes.routed
    }


def test_ratios_claim_no_more_than_the_people_they_were_fitted_on_bear_out(calibration):
    for each in calibration.bins:
        assert each.mates >= 100 and each.people >= 100
        assert -3 < each.llr_bounds[0] < 0 < each.llr_bounds[1] < 5
        assert all(rate >= 1e-6 for rate in each.strangers_above_high)


def test_a_larger_face_tells_more(calibration):
    most = [each.llr_bounds[1] for each in calibration.bins]

    assert most == sorted(most)
