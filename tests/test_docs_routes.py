"""How docs/fit_routes.py chooses: on embeddings that were drawn so that the right choice is known."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))  # the scripts there find each other so
import fit_routes
from fit_routes import Accepts, Measured, fit, inside, redraws, routed, row_bounds

PEOPLE, PHOTOS, PROBES, LENGTH = 24, 192, 900, 64


@pytest.fixture(scope="module")
def measured() -> Measured:
    """`good` and `cheap` take half of the error from noisy probes, `cheap` from small ones alone; `vain` takes none."""
    rng = np.random.default_rng(3)
    people = np.arange(PHOTOS) % PEOPLE
    photos = rng.integers(0, PHOTOS, PROBES)
    centres = unit(rng.normal(size=(PEOPLE, LENGTH)))
    heights, noise = np.exp(rng.uniform(np.log(10), np.log(64), PROBES)), rng.uniform(0, 6, PROBES)
    error = 0.3 * rng.normal(size=(2, PROBES, LENGTH))
    raw = unit(centres[people[photos]] + error[0])
    vain = unit(raw + 0.1 * rng.normal(size=raw.shape))
    good = np.where((noise >= 3)[:, None], unit(centres[people[photos]] + error[1] / 2), raw)
    cheap = np.where((heights < 20)[:, None], good, math.nan)
    blind = {"vain": vain, "good": good, "cheap": cheap}
    costs = {"vain": 1.0, "good": 30.0, "cheap": 10.0}
    ms = {name: np.where(np.isnan(rows[:, 0]), math.nan, costs[name]) for name, rows in blind.items()}
    quality = {figure: np.zeros(PROBES) for figure in fit_routes.FIGURES}
    quality |= {"face_height_px": heights, "noise": noise, "sharpness": rng.random(PROBES)}
    references = unit(centres[people] + 0.05 * rng.normal(size=(PHOTOS, LENGTH)))
    return Measured(people, references, photos, quality, raw, blind, ms, {"vain": 1, "good": 4, "cheap": 8})


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_restorer_is_chosen_where_it_helps_and_none_where_nothing_does(measured):
    weights = redraws(PEOPLE)[:81]

    routes = {tuple(bounds.values()): fit(bounds, measured, weights).routes for bounds in row_bounds("noise")}

    assert routes == {
        ((10, 20), (None, 3)): (), ((10, 20), (3, None)): ("cheap", "good"),
        ((20, 40), (None, 3)): (), ((20, 40), (3, None)): ("good",),
        ((40, 64), (None, 3)): (), ((40, 64), (3, None)): ("good",),
    }  # fmt: skip


def test_a_lead_beyond_its_error_outweighs_the_cost(measured):
    half = unit(measured.raw + unit(measured.raw + measured.blind["cheap"]))
    measured = replace(measured, blind=measured.blind | {"cheap": half})

    row = fit({"face_height_px": (10, 20), "noise": (3, None)}, measured, redraws(PEOPLE)[:81])

    assert row.gains["cheap"].low > 0 and row.gains["cheap"].ms < row.gains["good"].ms
    assert row.routes == ("good",)  # where that is too large, so is the other


def test_people_on_whom_nothing_was_fitted_gain_too(measured):
    weights = redraws(PEOPLE)[:41]

    embeddings, restored = routed("noise", measured, weights)

    noisy = measured.quality["noise"] >= 3
    assert restored == noisy.mean()
    assert (embeddings[~noisy] == measured.raw[~noisy]).all()
    chosen = inside({}, measured)
    gained, raw = (Accepts(each, measured.photos[chosen], measured) for each in (embeddings, measured.raw))
    assert gained.share(weights[0]) > raw.share(weights[0]) + 0.02


def test_true_accepts_are_counted_at_one_percent_of_false_ones(measured):
    people, photos = measured.people, measured.photos
    similarities = measured.raw @ measured.references.T
    same = people[photos][:, None] == people[None]
    mates = same & (photos[:, None] != np.arange(PHOTOS)[None])
    impostors = np.sort(similarities[~same])[::-1]
    threshold = impostors[math.floor(0.01 * len(impostors))]

    share = Accepts(measured.raw, photos, measured).share(np.ones(PEOPLE))

    accepted = (similarities > threshold) & mates
    assert share == pytest.approx((accepted.sum(1) / mates.sum(1)).mean())


def test_a_person_who_is_not_drawn_counts_neither_as_mate_nor_as_impostor(measured):
    weights = np.ones(PEOPLE)
    weights[:4] = 0
    kept = np.flatnonzero(measured.people >= 4)
    without = replace(measured, people=measured.people[kept] - 4, references=measured.references[kept])
    left = np.flatnonzero(measured.people[measured.photos] >= 4)
    photos = np.searchsorted(kept, measured.photos[left])

    share = Accepts(measured.raw, measured.photos, measured).share(weights)

    fewer = Accepts(measured.raw[left], photos, without).share(np.ones(PEOPLE - 4))
    assert share == pytest.approx(fewer)


def test_a_longer_run_begins_with_the_same_probes():
    assert fit_routes.draw(30, 100)[:40] == fit_routes.draw(30, 40)
    assert sorted(photo for photo, _ in fit_routes.draw(30, 30)) == list(range(30))
