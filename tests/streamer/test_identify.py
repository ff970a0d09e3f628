"""From crops to identified faces with a real gallery: what is published, kept, and not touched by a guide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from portraits import ASTRONAUT, group, write_embedder

from engines.load import load_engine
from engines.store import Model, default_store
from streamer.assembly import Networks
from streamer.detector import FaceDetector
from streamer.embedder import FaceEmbedder
from streamer.gallery import Gallery, WatchList
from streamer.guided import GuidedRestorer
from streamer.identify import Identifier, Search
from streamer.live_gallery import LiveGallery
from streamer.metrics import Metrics
from streamer.probes import Damage, Sample, probe
from streamer.restorer import FaceRestorer
from streamer.router import RestorerRouter
from streamer.scoring import Scored, Scorer
from streamer.types import Crop, EventName, FaceIdentified, Track
from streamer.vault import Vault

VAULT = Vault(bytes(range(32)))
NETWORKS = Networks(default_store(), backend="onnxruntime", threads=1)


@dataclass
class Witnessed:
    """Remembers what it was given to keep; `why` is why it cannot."""

    why: str = ""
    kept: list[tuple[EventName, FaceIdentified, Scored, int]] = field(default_factory=list)

    def prune(self) -> None:
        pass

    def keep(self, name: EventName, face: FaceIdentified, scored: Scored, gallery_version: int) -> str:
        self.kept.append((name, face, scored, gallery_version))
        return self.why


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return NETWORKS.detector("centerface", size=480)


@pytest.fixture(scope="module")
def embedder(detector: FaceDetector, tmp_path_factory: pytest.TempPathFactory) -> FaceEmbedder:
    path = write_embedder(tmp_path_factory.mktemp("networks") / "tiny.onnx", detector)
    return FaceEmbedder(load_engine(Model.read(path), backend="onnxruntime", threads=1))


@pytest.fixture(scope="module")
def people(detector: FaceDetector) -> list[Sample]:
    """The astronaut, then those of the group photo."""
    samples = []
    for name, image in (("astronaut", ASTRONAUT), ("group", group())):
        found = detector.detect([image])[0]
        samples += [
            Sample(f"{name}{number}", f"{name}{number}", image, found.boxes[number], found.landmarks[number])
            for number in np.flatnonzero(found.scores > 0.5)
        ]
    return samples


@pytest.fixture(scope="module")
def restorer() -> FaceRestorer:
    found = NETWORKS.restorer("sgen-small")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def guided() -> GuidedRestorer:
    return NETWORKS.guided_restorer("gfrnet-small")


@pytest.fixture
def gallery(tmp_path: Path, embedder: FaceEmbedder, people: list[Sample]) -> Iterator[Gallery]:
    """The astronaut and one of the group, on a list."""
    with Gallery.open(tmp_path / "gallery", VAULT, create=True) as opened:
        with opened.change("ada") as change:
            change.use_embedder("tiny.onnx", embedder.engine.sha256)
            change.put_list(WatchList("wanted", "a test", "none", threshold=0.8))
            for person in people[:2]:
                crop = probe(person, Damage(100, noise=0, jpeg=None))
                identity = change.add_identity(person.person)
                photo = change.add_photo(
                    identity, cv2.imencode(".png", crop.image)[1].tobytes(), crop.landmarks, quality={}
                )
                change.add_template(photo, embedder.engine.sha256, embedder.embed([(crop.image, crop.landmarks)])[0])
                change.join(identity, "wanted")
        yield opened


def name_of(track: Track) -> EventName:
    return EventName("box", "now", f"{track.id:032x}")


def passers_by(people: list[Sample]) -> list[Crop]:
    crops = [probe(person, Damage(36, noise=6, jpeg=70)) for person in people]
    return [replace(crop, track=replace(crop.track, id=number)) for number, crop in enumerate(crops, start=1)]


def identifier(
    gallery: Gallery, embedder: FaceEmbedder, restorer: FaceRestorer, witness: Witnessed,
    guided: GuidedRestorer | None = None,
) -> Identifier:  # fmt: skip
    enrolment = LiveGallery(Gallery.open(gallery.folder, VAULT), embedder.engine.sha256, look_every_s=0)
    router = RestorerRouter("sgen-small", max_size=256, least_scale=1)
    search = Search(enrolment, Scorer(short_list_margin=0.1), witness, guided)
    return Identifier(router, {"sgen-small": restorer}, embedder, search, metrics=Metrics(), name_of=name_of)


def names_of(gallery: Gallery) -> dict[str, str]:
    return {each.id: each.name for each in gallery.identities()}


def test_who_is_enrolled_is_matched_and_kept_and_strangers_are_neither(gallery, embedder, restorer, people):
    witness = Witnessed()
    found = identifier(gallery, embedder, restorer, witness).identify(passers_by(people))

    names = names_of(gallery)
    assert [face.match and names[face.match.identity] for face in found] == [
        people[0].person, people[1].person, *[None] * (len(people) - 2),
    ]  # fmt: skip
    assert all(face.scores is not None and face.scores_absent == "" for face in found)
    assert [name.id for name, *_ in witness.kept] == [f"{1:032x}", f"{2:032x}"]
    name, kept, scored, version = witness.kept[0]
    assert kept == found[0] and name.stream == "box"
    assert scored.face.crops == 1
    assert version == gallery.version()


def test_a_match_that_cannot_be_recorded_does_not_go_out(gallery, embedder, restorer, people, caplog):
    looking = identifier(gallery, embedder, restorer, Witnessed(why="no space left on device"))

    (face, *_) = looking.identify(passers_by(people[:1]))

    assert face.match is None
    assert face.scores, "what was measured is told"
    assert looking.metrics.counts()["matches_withheld"] == 1
    assert "no space left on device" in caplog.text


def test_what_is_enrolled_meanwhile_is_matched_from_the_next_batch_on(gallery, embedder, restorer, people):
    looking = identifier(gallery, embedder, restorer, Witnessed())
    crops = passers_by(people)[2:3]
    assert looking.identify(crops)[0].match is None
    with gallery.change("ada") as change:
        new = change.add_identity("late")
        crop = probe(people[2], Damage(100, noise=0, jpeg=None))
        photo = change.add_photo(new, cv2.imencode(".png", crop.image)[1].tobytes(), crop.landmarks, quality={})
        change.add_template(photo, embedder.engine.sha256, embedder.embed([(crop.image, crop.landmarks)])[0])
        change.join(new, "wanted")

    looking.left(crops[0].track)
    match = looking.identify(crops)[0].match

    assert match is not None and match.identity == new


def test_nothing_but_the_guided_score_and_picture_depends_on_guides(gallery, embedder, restorer, guided, people):
    crops = passers_by(people)
    without = identifier(gallery, embedder, restorer, Witnessed()).identify(crops)
    with_guides = identifier(gallery, embedder, restorer, Witnessed(), guided).identify(crops)

    drawn = [face for face in with_guides if face.guided]
    assert drawn, "somebody was near enough"
    for plain, face in zip(without, with_guides, strict=True):
        assert face.match == plain.match and face.route == plain.route
        assert {who: replace(each, guided=None) for who, each in face.scores.items()} == plain.scores
        assert (face.guided is None) == (not plain.scores)


def test_a_guided_picture_names_its_guide_and_lies_where_it_says(gallery, embedder, restorer, guided, people):
    (crop,) = passers_by(people[:1])
    (face,) = identifier(gallery, embedder, restorer, Witnessed(), guided).identify([crop])

    picture = face.guided
    assert picture is not None
    person = gallery.identity(picture.identity)
    assert person.name == people[0].person and picture.photo in person.photos
    assert picture.model == "gfrnet-small"
    assert picture.image.shape[:2] == (256, 256)
    small = cv2.resize(picture.image, crop.image.shape[1::-1], interpolation=cv2.INTER_AREA).astype(float)
    assert np.corrcoef(small.ravel(), crop.image.ravel())[0, 1] > 0.8
    assert np.allclose(picture.landmarks, (crop.landmarks + 0.5) * 256 / crop.image.shape[0] - 0.5, atol=0.01)
    assert face.scores[picture.identity].guided is not None


def test_a_tracks_crops_count_together_until_it_leaves(gallery, embedder, restorer, people):
    witness = Witnessed()
    looking = identifier(gallery, embedder, restorer, witness)
    (crop,) = passers_by(people[:1])
    for _ in range(2):
        looking.identify([crop])
    looking.left(crop.track)
    looking.identify([crop])

    assert [scored.face.crops for _, _, scored, _ in witness.kept] == [1, 2, 1]


def test_without_an_embedder_or_a_gallery_the_reason_is_told(embedder, restorer, people):
    router = RestorerRouter("sgen-small", max_size=256, least_scale=1)
    crops = passers_by(people[:1])

    for embeds, why in ((None, "no embedder is configured"), (embedder, "no gallery")):
        plain = Identifier(router, {"sgen-small": restorer}, embeds, None, metrics=Metrics(), name_of=name_of)
        (face,) = plain.identify(crops)
        assert (face.scores, face.scores_absent) == (None, why)
        assert (face.embeddings is None) == (embeds is None)
        plain.left(crops[0].track)


def test_no_crops_are_no_faces(gallery, embedder, restorer):
    assert identifier(gallery, embedder, restorer, Witnessed()).identify([]) == []
