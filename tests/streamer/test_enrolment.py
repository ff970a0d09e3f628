"""Enrolment: photos that may stand for a person, those that may not and why, and a gallery that has all or nothing."""

from __future__ import annotations

import csv
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from portraits import ASTRONAUT, portrait, write_embedder
from skimage.data import astronaut

from engines.load import load_engine
from engines.store import Model, default_store
from streamer import enrolment
from streamer.assembly import Networks
from streamer.audit import AuditLog
from streamer.embedder import FaceEmbedder
from streamer.enrolment import EnrolmentError, Gate, ListWish, Outcome, Person, enrol
from streamer.gallery import Gallery
from streamer.geometry import UPRIGHT
from streamer.photos import PhotoError, read_image
from streamer.vault import KEY_FILE_VARIABLE, KEY_VARIABLE, VaultError, load_key


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    detector = Networks(default_store(), threads=1).detector(
        "centerface", size=480
    )  # half the default: four times as fast
    model = Model.read(write_embedder(tmp_path_factory.mktemp("networks") / "tiny.onnx", detector))
    return Gate(detector, FaceEmbedder(load_engine(model, backend="onnxruntime", threads=1)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a gallery may be made; its key lies elsewhere."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "keys" / "gallery.key"))
    return tmp_path / "gallery"


@pytest.fixture
def photo(tmp_path: Path) -> Callable[..., Path]:
    """Write a photo."""

    def write(name: str, image: np.ndarray, *options: int) -> Path:
        path = tmp_path / "photos" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        assert cv2.imwrite(str(path), image, options)
        return path

    return write


@pytest.fixture
def admit(gate: Gate, folder: Path) -> Callable[..., Outcome]:
    """Enrol somebody, as the command line would."""

    def call(name: str, *paths: Path, **options: object) -> Outcome:
        options = {"embedder": "tiny", **options}
        return enrol([Person(enrolment.clean_name(name), paths)], folder, lambda _: gate, who="test", **options)

    return call


def others(image: np.ndarray) -> np.ndarray:
    """Return another photo of the same person: mirrored, so that it is no copy."""
    return image[:, ::-1].copy()


def checks(face: enrolment.Face) -> set[str]:
    return {refusal.check for refusal in face.refusals}


# The gate.


def test_a_good_photo_gives_a_crop_its_landmarks_its_quality_and_a_unit_template(gate, photo):
    face = gate.examine(photo("a.png", ASTRONAUT))
    crop, landmarks = enrolment.cut_face(ASTRONAUT, face.box, face.landmarks)

    assert face.refusals == ()
    assert crop.shape[0] == crop.shape[1] == pytest.approx(1.6 * face.quality["face_height_px"], abs=2)
    assert (landmarks > 0).all() and (landmarks < len(crop)).all()
    assert {"eye_distance_px", "sharpness", "yaw", "pitch", "brightness", "contrast"} <= face.quality.keys()
    assert np.linalg.norm(face.embedding) == pytest.approx(1, abs=1e-5)


def test_a_large_crop_is_kept_at_512_pixels_with_its_landmarks_in_place(gate, photo):
    large = cv2.resize(ASTRONAUT, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    face = gate.examine(photo("large.png", large))

    crop, landmarks = enrolment.cut_face(large, face.box, face.landmarks)
    again = gate._detector.detect([crop])[0]

    assert crop.shape == (512, 512, 3)
    assert np.abs(again.landmarks[0] - landmarks).max() < 0.03 * 512


def test_a_photo_may_be_jpeg_turned_by_exif_cmyk_16_bit_palette_or_transparent(gate, tmp_path):
    rgb = Image.fromarray(astronaut())
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90° clockwise
    rgb.rotate(90, expand=True).save(tmp_path / "exif.jpg", exif=turned, quality=95)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    cv2.imwrite(str(tmp_path / "deep.png"), ASTRONAUT.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / "deep.tif"), ASTRONAUT.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / "grey.png"), cv2.cvtColor(ASTRONAUT, cv2.COLOR_BGR2GRAY).astype(np.uint16) * 257)
    rgb.quantize(256).save(tmp_path / "palette.png")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    rgb.save(tmp_path / "photo.webp", quality=95)
    reference = gate.examine(_saved(rgb, tmp_path / "reference.png"))

    for name in (
        "exif.jpg", "cmyk.jpg", "deep.png", "deep.tif", "grey.png", "palette.png", "alpha.png", "photo.webp"
    ):  # fmt: skip
        face = gate.examine(tmp_path / name)
        assert face.refusals == (), name
        assert np.abs(face.landmarks - reference.landmarks).max() < 3, name
        if name != "grey.png":
            assert face.embedding @ reference.embedding > 0.98, name


def _saved(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


def test_what_is_transparent_is_white_whatever_colour_hides_in_it(tmp_path):
    hidden = np.zeros((20, 20, 4), np.uint8)
    hidden[:10] = (10, 20, 30, 255)
    Image.fromarray(hidden).save(tmp_path / "cut-out.png")

    image = read_image(tmp_path / "cut-out.png")

    assert (image[:10] == (30, 20, 10)).all()
    assert (image[10:] == 255).all()


def test_somebody_small_in_the_background_is_no_second_face(gate, photo):
    small = cv2.resize(portrait("left"), None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    scene = ASTRONAUT.copy()
    scene[20 : 20 + small.shape[0], 440 : 440 + small.shape[1]] = small
    beside = np.hstack([ASTRONAUT[:, :330], cv2.resize(portrait("left"), (400, 512))])

    assert "faces" not in checks(gate.examine(photo("background.png", scene)))
    assert "faces" in checks(gate.examine(photo("beside.png", beside)))


def test_a_soft_photo_of_a_large_face_is_judged_as_it_is_compared(gate, photo):
    large = cv2.GaussianBlur(cv2.resize(ASTRONAUT, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC), (0, 0), 2)

    assert "sharpness" not in checks(gate.examine(photo("large.png", large)))
    assert "sharpness" in checks(gate.examine(photo("small.png", cv2.GaussianBlur(ASTRONAUT, (0, 0), 5))))


def test_pitch_is_level_for_the_template_and_grows_as_the_nose_sinks():
    level, sunk, raised = UPRIGHT * 100, UPRIGHT * 100, UPRIGHT * 100
    sunk = sunk + np.array([[0, 0], [0, 0], [0, 10], [0, 0], [0, 0]])
    raised = raised - np.array([[0, 0], [0, 0], [0, 10], [0, 0], [0, 0]])

    assert enrolment.measure_pitch(level) == pytest.approx(0, abs=1e-9)
    assert enrolment.measure_pitch(sunk) > 0.4
    assert enrolment.measure_pitch(raised) == pytest.approx(-enrolment.measure_pitch(sunk))
    assert enrolment.measure_pitch(np.zeros((5, 2))) == 0


# Bad photos.


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few hundred bytes that claims to be huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


def as_bytes(image: np.ndarray, kind: str) -> bytes:
    return cv2.imencode(kind, image)[1].tobytes()


def animated() -> bytes:
    rgb, content = Image.fromarray(astronaut()), io.BytesIO()
    rgb.save(content, "GIF", save_all=True, append_images=[rgb.rotate(90)])
    return content.getvalue()


def pushed(image: np.ndarray, gain: float, offset: float) -> np.ndarray:
    return np.clip(np.rint(image * gain + offset), 0, 255).astype(np.uint8)


def test_twenty_kinds_of_bad_photos_are_refused_with_their_reasons_and_the_gallery_stays_as_it_is(
    admit, gate, folder, tmp_path
):
    bad = tmp_path / "bad"
    bad.mkdir()
    jpeg = as_bytes(ASTRONAUT, ".jpg")
    png = bytearray(as_bytes(ASTRONAUT, ".png"))
    png[len(png) // 2] ^= 255
    small = cv2.resize(ASTRONAUT, None, fx=0.2, fy=0.2, interpolation=cv2.INTER_AREA)
    kinds: dict[str, tuple[bytes, str]] = {
        "zero.jpg": (b"", "the file is empty"),
        "text.jpg": (b"this is no photo\n" * 99, "not an image that can be decoded"),
        "broken-off.jpg": (jpeg[: len(jpeg) // 2], "damaged or cut off"),
        "damaged.png": (bytes(png), "damaged or cut off"),
        "bomb.png": (bomb(20_000, 5_001), "20000x5001 pixels; 100 million"),
        "huge.png": (bomb(2**31 - 1, 2**31 - 1), "million pixels"),
        "animated.gif": (animated(), "2 pictures in one file"),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(999), "HEIC"),
        "one-pixel.png": (as_bytes(ASTRONAUT[:1, :1], ".png"), "no face found"),
        "wall.png": (as_bytes(np.full((300, 400, 3), 130, np.uint8), ".png"), "no face found"),
        "two.png": (as_bytes(np.hstack([ASTRONAUT, ASTRONAUT[:, ::-1]]), ".png"), "2 faces; a photo shows 1"),
        "small.png": (as_bytes(small, ".png"), "px between the eyes, at least"),
        "blurred.png": (as_bytes(cv2.GaussianBlur(ASTRONAUT, (0, 0), 5), ".png"), "blurred: sharpness"),
        "aside.png": (as_bytes(portrait("aside"), ".png"), "turned aside: by"),
        "lying.png": (as_bytes(np.rot90(ASTRONAUT), ".png"), "lies on its side"),
        "dark.png": (as_bytes(pushed(ASTRONAUT, 0.06, 0), ".png"), "too dark: mean grey level"),
        "bright.png": (as_bytes(pushed(ASTRONAUT, 0.3, 210), ".png"), "too bright: mean grey level"),
        "flat.png": (as_bytes(pushed(ASTRONAUT, 0.1, 100), ".png"), "too little contrast"),
        "cut.png": (as_bytes(ASTRONAUT[:, 205:], ".png"), "cut off by the edge"),
        "again.jpg": (as_bytes(cv2.resize(ASTRONAUT, (400, 400)), ".jpg"), "the same photo as another"),
        "somebody-else.png": (as_bytes(portrait("left"), ".png"), "unlike all other photos"),
    }
    good = bad / "good.png"
    good.write_bytes(as_bytes(ASTRONAUT, ".png"))
    admit("Ada", good)
    before = contents(folder)

    for name, (content, _) in kinds.items():
        (bad / name).write_bytes(content)
    os.mkfifo(bad / "pipe.jpg")
    told = {"pipe.jpg": "not a file", "missing.jpg": "No such file"} | {name: why for name, (_, why) in kinds.items()}
    for name, reason in told.items():
        outcome = admit("Ada", bad / name)
        assert outcome.enrolled == (), name
        (refused,) = outcome.refused
        assert refused.line.startswith(f"{bad / name}: ") and reason in refused.line, refused.line
        assert "\n" not in refused.line
    outcome = admit("Grace", good)
    assert "looks like somebody else: similarity 1.00 to identity" in outcome.refused[0].line

    assert len(told) + 1 >= 20
    assert contents(folder) == before


def contents(folder: Path) -> tuple[object, ...]:
    """Return what is in a gallery and in its log."""
    with Gallery.open(folder, load_key()) as gallery:
        names = [(each.id, each.name, each.photos) for each in gallery.identities()]
        return gallery.version(), names, (folder / "audit.jsonl").read_bytes()


def test_photos_of_people_who_stood_before_a_camera_for_it_pass(shared, admit, gate, folder, tmp_path):
    model = Model.read(shared / "models" / "face-reidentification-retail-0095.onnx")
    real = Gate(gate._detector, FaceEmbedder(load_engine(model, backend="onnxruntime", threads=1)))
    rows = csv.DictReader((shared / "data" / "london_512.csv").read_text().splitlines())
    names = sorted({row["file"].partition("/")[0] for row in rows if row["split"] == "train"})[:5]
    with tarfile.open(shared / "data" / "london_512.tar") as tar:
        tar.extractall(tmp_path, [member for member in tar if member.name.partition("/")[0] in names], filter="data")
    people = [person for name in names for person in enrolment.gather(name, [tmp_path / name], None)]

    outcome = enrol(people, folder, lambda _: real, who="test", embedder="retail")

    assert [each.line for each in outcome.refused] == []
    assert [len(each.photos) for each in outcome.enrolled] == [2] * 5


# Beside others.


def face_like(embedding: np.ndarray, name: str = "x.jpg") -> enrolment.Face:
    unit = (embedding / np.linalg.norm(embedding)).astype(np.float32)
    return enrolment.Face(Path(name), "0" * 64, np.zeros(4), np.zeros((5, 2)), {}, unit, ())


def at(similarity: float) -> np.ndarray:
    """Return a unit vector of this similarity to (1, 0, 0)."""
    return np.array([similarity, np.sqrt(1 - similarity**2), 0], np.float32)


LIKENESS = enrolment.Likeness(((1e-3, 0.4), (1e-5, 0.6), (1e-6, 0.7)), duplicate=0.95, unlike=0.2)
NOBODY = np.empty((0, 3), np.float32)


def judged(own: np.ndarray, stranger: tuple[float, str] = (-1, ""), identities: int = 10) -> dict[str, float]:
    (face,) = enrolment.judge([face_like(at(1))], own, [stranger], LIKENESS, identities=identities)
    return {refusal.check: refusal.figure for refusal in face.refusals}


def test_a_photo_that_is_nearer_to_somebody_else_than_to_its_own_person_is_a_collision():
    assert judged(NOBODY, (0.5, "identity 1")) == {"collision": 0.5}
    assert judged(np.array([at(0.45)]), (0.5, "identity 1")) == {"collision": 0.5}
    assert judged(np.array([at(0.55)]), (0.5, "identity 1")) == {}
    assert judged(NOBODY, (0.39, "identity 1")) == {}
    assert judged(NOBODY) == {}


def test_photos_of_one_call_that_are_alike_do_not_hide_that_they_are_somebody_elses():
    faces = [face_like(at(1)), face_like(at(0.9))]

    first, second = enrolment.judge(faces, NOBODY, [(0.5, "1"), (0.5, "1")], LIKENESS, identities=1)

    assert checks(first) == checks(second) == {"collision"}


def test_the_more_people_there_are_the_more_alike_a_collision_is():
    assert judged(NOBODY, (0.5, "identity 1"), identities=1000) == {}
    assert [LIKENESS.collision(count) for count in (1, 10, 1000, 10_000, 10**9)] == pytest.approx(
        [0.4, 0.4, 0.6, 0.7, 0.7]
    )


def test_a_photo_that_is_like_none_of_its_own_is_refused_and_the_same_photo_twice_too():
    assert judged(np.array([at(0.1), at(-0.3)])).keys() == {"unlike"}
    assert judged(np.array([at(0.1), at(0.3)])) == {}
    assert judged(np.array([at(0.96)])).keys() == {"duplicate"}


def test_of_two_photos_alike_in_one_call_the_first_one_stays():
    first, second = enrolment.judge(
        [face_like(at(1)), face_like(at(0.99))], NOBODY, [(-1, "")] * 2, LIKENESS, identities=0
    )

    assert [len(each.refusals) for each in (first, second)] == [0, 1]


# The work.


def test_the_first_enrolment_makes_the_gallery_and_its_key_outside_of_it(admit, folder, photo):
    outcome = admit("Ada", photo("a.png", ASTRONAUT))

    assert outcome.made_key is not None
    assert not outcome.made_key.is_relative_to(folder)
    assert outcome.made_key.stat().st_mode & 0o777 == 0o600
    (ada,) = outcome.enrolled
    with Gallery.open(folder, load_key()) as gallery:
        (identity,) = gallery.identities()
        kept = gallery.photo(identity.photos[0])
    assert (identity.id, identity.name, ada.new) == (ada.identity, "Ada", True)
    side = cv2.imdecode(np.frombuffer(kept.image, np.uint8), cv2.IMREAD_COLOR).shape[0]
    assert side == pytest.approx(1.6 * kept.quality["face_height_px"], abs=2)
    assert kept.quality["eye_distance_px"] == pytest.approx(47, abs=3)


def test_where_nothing_passes_neither_a_gallery_nor_a_key_is_made(admit, folder, photo):
    outcome = admit("Ada", photo("wall.png", np.full((300, 400, 3), 130, np.uint8)))

    assert outcome.refused and not outcome.enrolled
    assert not folder.exists()
    with pytest.raises(VaultError):
        load_key()


def test_a_gallery_whose_key_is_gone_gets_no_new_one(admit, folder, photo):
    outcome = admit("Ada", photo("a.png", ASTRONAUT))
    assert outcome.made_key
    outcome.made_key.unlink()

    with pytest.raises(VaultError):
        admit("Ada", photo("b.png", others(ASTRONAUT)))
    assert not outcome.made_key.exists()


def test_a_key_is_not_made_in_the_folder_that_it_locks(admit, folder, photo, monkeypatch):
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(folder / "gallery.key"))

    with pytest.raises(EnrolmentError, match="apart from what it locks"):
        admit("Ada", photo("a.png", ASTRONAUT))
    assert not folder.exists()


def test_more_photos_of_a_name_go_to_the_same_person(admit, folder, photo):
    first = admit("Ada", photo("a.png", ASTRONAUT)).enrolled[0]
    second = admit("  Ada ", photo("b.png", others(ASTRONAUT))).enrolled[0]

    assert (first.identity, first.new, second.new) == (second.identity, True, False)
    with Gallery.open(folder, load_key()) as gallery:
        assert len(gallery.identities()[0].photos) == 2


def test_one_bad_photo_keeps_all_of_a_call_out_unless_the_rest_is_wanted(admit, folder, photo):
    good, bad = photo("good.png", ASTRONAUT), photo("wall.png", np.full((300, 400, 3), 130, np.uint8))

    nothing = admit("Ada", good, bad)
    assert (nothing.enrolled, [each.path for each in nothing.refused]) == ((), [bad])
    assert not folder.exists()

    rest = admit("Ada", good, bad, keep_going=True)
    assert [len(each.photos) for each in rest.enrolled] == [1]
    assert [each.path for each in rest.refused] == [bad]


def test_what_is_forced_is_kept_with_the_photo_and_in_the_log(admit, folder, photo):
    blurred = photo("blurred.png", cv2.GaussianBlur(ASTRONAUT, (0, 0), 5))

    assert admit("Ada", blurred).enrolled == ()
    (ada,) = admit("Ada", blurred, force=True).enrolled

    with Gallery.open(folder, load_key()) as gallery:
        assert "sharpness" in gallery.photo(ada.photos[0][0]).forced
    log = (folder / "audit.jsonl").read_text()
    assert "sharpness" in log and ada.identity in log and "Ada" not in log


def test_no_force_enrols_what_has_no_face(admit, folder, photo):
    outcome = admit("Ada", photo("wall.png", np.full((300, 400, 3), 130, np.uint8)), force=True)

    assert not outcome.enrolled and not folder.exists()


def test_two_people_of_one_call_who_look_alike_are_both_refused(gate, folder, photo):
    people = [Person("Ada", (photo("a.png", ASTRONAUT),)), Person("Grace", (photo("b.jpg", ASTRONAUT),))]

    outcome = enrol(people, folder, lambda _: gate, who="test", embedder="tiny")

    assert outcome.enrolled == ()
    assert [[refusal.check for refusal in each.refusals] for each in outcome.refused] == [["collision"]] * 2
    assert str(people[1].photos[0]) in outcome.refused[0].line


def test_people_who_differ_are_enrolled_together(gate, folder, photo):
    names = {"Ada": ASTRONAUT, "Grace": portrait("centre"), "Hedy": portrait("left")}
    people = [Person(name, (photo(f"{name}.png", image),)) for name, image in names.items()]
    told = []

    outcome = enrol(
        people, folder, lambda _: gate, who="test", embedder="tiny", tell=lambda person, path: told.append(path)
    )

    assert [each.name for each in outcome.enrolled] == list(names), [each.line for each in outcome.refused]
    assert told == [person.photos[0] for person in people]
    assert AuditLog(folder / "audit.jsonl", load_key()).verify() == []


def test_a_new_list_wants_its_purpose_and_its_ground(admit, folder, photo):
    picture = photo("a.png", ASTRONAUT)
    with pytest.raises(EnrolmentError, match="--purpose and --legal-basis"):
        admit("Ada", picture, wish=ListWish("missing"))
    assert not folder.exists()

    admit("Ada", picture, wish=ListWish("missing", "find a missing person", "§ 1"))
    admit("Ada", photo("b.png", others(ASTRONAUT)), wish=ListWish("missing"))

    with Gallery.open(folder, load_key()) as gallery:
        (watch_list,) = gallery.lists()
        assert gallery.identities()[0].lists == ("missing",)
    assert (watch_list.purpose, watch_list.legal_basis) == ("find a missing person", "§ 1")
    assert 0.3 < watch_list.threshold < 0.8
    with pytest.raises(EnrolmentError, match="there already"):
        admit("Ada", picture, wish=ListWish("missing", purpose="something else"))


def test_a_new_gallery_takes_the_embedder_that_ships_and_an_old_one_what_it_knows(gate, folder, photo):
    asked = []

    def load(model: str) -> Gate:
        asked.append(model)
        return gate

    for name, image in (("a.png", ASTRONAUT), ("b.png", others(ASTRONAUT))):
        enrol([Person("Ada", (photo(name, image),))], folder, load, who="test")

    assert asked == [enrolment.EMBEDDER, enrolment.EMBEDDER]
    with Gallery.open(folder, load_key()) as gallery:
        assert gallery.embedder()[0] == enrolment.EMBEDDER


def test_a_gallery_keeps_in_mind_which_embedder_it_was_made_with(admit, photo, folder):
    admit("Ada", photo("a.png", ASTRONAUT))
    admit("Ada", photo("b.png", others(ASTRONAUT)), embedder=None)

    with Gallery.open(folder, load_key()) as gallery:
        assert gallery.embedder()[0] == "tiny"


def test_a_photo_that_changes_after_it_was_looked_at_is_not_enrolled(gate, folder, photo, monkeypatch):
    first, second = photo("a.png", ASTRONAUT), photo("b.png", others(ASTRONAUT))

    def swap(person: Person, path: Path) -> None:
        if path == second:
            photo("a.png", portrait("left"))

    with pytest.raises(PhotoError, match=r"a\.png: changed while"):
        enrol([Person("Ada", (first, second))], folder, lambda _: gate, who="test", embedder="tiny", tell=swap)
    with Gallery.open(folder, load_key()) as gallery:
        assert gallery.identities() == []


# Names and folders.


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x1b[31mb", "x" * 201])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(EnrolmentError, match="a name has"):
        enrolment.gather(name, [Path("a.png")], None)


def test_a_folder_of_people_gives_one_person_a_folder(tmp_path):
    for name in ("Zoe\u0308/2.jpg", "Zoe\u0308/1.HEIC", "Zoe\u0308/notes.txt", "Ada/a.png", ".hidden/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    people = enrolment.gather(None, [], tmp_path)

    assert [(person.name, [path.name for path in person.photos]) for person in people] == [
        ("Ada", ["a.png"]), ("Zo\u00eb", ["1.HEIC", "2.jpg"]),
    ]  # fmt: skip


def test_folders_without_people_or_photos_are_refused(tmp_path):
    (tmp_path / "Ada").mkdir()

    with pytest.raises(EnrolmentError, match="Ada: no photo in this folder"):
        enrolment.gather(None, [], tmp_path)
    with pytest.raises(EnrolmentError, match="no folder of a person"):
        enrolment.gather(None, [], tmp_path / "Ada")
    with pytest.raises(EnrolmentError, match="no such folder"):
        enrolment.gather(None, [], tmp_path / "none")
    for name, folder in ((None, None), ("Ada", tmp_path), ("Ada", None)):
        with pytest.raises(EnrolmentError, match="give NAME and PHOTO"):
            enrolment.gather(name, [], folder)
