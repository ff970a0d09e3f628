"""The gallery as a run sees it: changes are seen, and what cannot be read does not stop it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import cv2
import numpy as np
import pytest

from streamer.gallery import Change, Gallery, GalleryError, WatchList
from streamer.live_gallery import LiveGallery
from streamer.vault import Vault

VAULT = Vault(bytes(range(32)))
EMBEDDER = "e" * 64
POINTS = np.array([[38, 51], [73, 51], [56, 71], [41, 92], [70, 92]], np.float32)
WANTED = WatchList("Wanted", "to find bicycles", "court order 7", threshold=0.4)


def add(change: Change, name: str, *, on: str = "", grey: int = 100) -> str:
    identity = change.add_identity(name)
    photo = cv2.imencode(".png", np.full((112, 112, 3), grey, np.uint8))[1].tobytes()
    template = np.random.default_rng(len(name)).standard_normal(8).astype(np.float32)
    change.add_template(
        change.add_photo(identity, photo, POINTS, quality={}), EMBEDDER, template / np.linalg.norm(template)
    )
    if on:
        change.join(identity, on)
    return identity


@pytest.fixture
def gallery(tmp_path) -> Iterator[Gallery]:
    with Gallery.open(tmp_path / "gallery", VAULT, create=True) as opened:
        with opened.change("ada") as change:
            change.use_embedder("face.onnx", EMBEDDER)
            add(change, "Ada")
        yield opened


def live(gallery: Gallery, **settings: object) -> LiveGallery:
    return LiveGallery(Gallery.open(gallery.folder, VAULT), EMBEDDER, look_every_s=0, **settings)


def test_who_is_enrolled_or_removed_meanwhile_is_seen_at_the_next_look(gallery, caplog):
    seen = live(gallery)
    before = seen.current()
    with gallery.change("bob") as change:
        new = add(change, "Bo")
    after = seen.current()
    with gallery.change("bob") as change:
        change.remove_identity(new)

    assert len(before) == 1, "what was searched does not change"
    assert new in after.identities
    assert new not in seen.current().identities
    seen.close()


def test_without_a_change_the_same_snapshot_is_given(gallery):
    seen = live(gallery)

    assert seen.current() is seen.current()
    seen.close()


def test_it_looks_no_more_often_than_it_was_told(gallery):
    seen = LiveGallery(Gallery.open(gallery.folder, VAULT), EMBEDDER, look_every_s=3600)
    seen.current()
    with gallery.change("bob") as change:
        add(change, "Bo")

    assert len(seen.current()) == 1
    seen.close()


def test_another_embedder_meanwhile_is_told_and_who_was_enrolled_is_still_found(gallery, caplog):
    seen = live(gallery)
    with gallery.change("bob") as change:
        change.use_embedder("newer.onnx", "f" * 64)

    assert len(seen.current()) == 1
    assert any(
        "newer.onnx" in each.getMessage() and "start the app anew" in each.getMessage() for each in caplog.records
    )
    seen.close()


def test_a_list_that_expires_is_out_though_nothing_was_changed(gallery):
    now = datetime.now(UTC)
    with gallery.change("bob") as change:
        change.put_list(replace(WANTED, expires_at=now + timedelta(hours=1)))
        late = add(change, "Bo", on=WANTED.name)
    times = [now]
    seen = live(gallery, clock=lambda: times[0])
    assert late in seen.current().identities

    times[0] = now + timedelta(hours=2)

    assert late not in seen.current().identities
    seen.close()


def test_a_guide_is_the_enrolled_photo_and_goes_with_it(gallery):
    seen = live(gallery)
    (ada,) = seen.current().identities

    (guide,) = seen.guides(ada)

    assert guide.image.shape == (112, 112, 3) and (guide.image == 100).all()
    assert np.array_equal(guide.landmarks, POINTS)
    assert guide.name == gallery.identity(ada).photos[0]
    assert seen.guides(ada)[0] is guide, "decrypted once"
    with gallery.change("bob") as change:
        change.remove_identity(ada)
    seen.current()
    assert seen.guides(ada) == []
    seen.close()


def test_a_gallery_that_cannot_be_read_any_more_is_searched_as_it_was_and_that_is_told_once(gallery, caplog):
    seen = live(gallery)
    before = seen.current()
    with gallery.change("bob") as change:
        add(change, "Bo")
    for path in gallery.folder.glob("gallery.db*"):
        path.write_bytes(b"\0" * path.stat().st_size)

    assert seen.current() is before
    assert seen.current() is before
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1 and "searched as it was" in told[0]
    shutil.rmtree(gallery.folder)


def test_a_list_expires_though_the_gallery_cannot_be_read_any_more(gallery):
    now = datetime.now(UTC)
    with gallery.change("bob") as change:
        change.put_list(replace(WANTED, expires_at=now + timedelta(hours=1)))
        late = add(change, "Bo", on=WANTED.name)
    times = [now]
    seen = live(gallery, clock=lambda: times[0])
    assert seen.current().lists_of(late)
    for path in gallery.folder.glob("gallery.db*"):
        path.write_bytes(b"\0" * path.stat().st_size)

    times[0] = now + timedelta(hours=2)

    assert not seen.current().lists_of(late)
    shutil.rmtree(gallery.folder)


def test_templates_of_another_embedder_are_refused_at_the_start(gallery):
    with (
        Gallery.open(gallery.folder, VAULT) as other,
        pytest.raises(GalleryError, match=r"face\.onnx .*cannot be compared"),
    ):
        LiveGallery(other, "d" * 64)
