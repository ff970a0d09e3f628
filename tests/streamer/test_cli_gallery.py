"""`streamer enrol`, `gallery`, `keys new --gallery` and `audit`: what an operator types, and what a mistake answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from portraits import ASTRONAUT, portrait, write_embedder

from engines.store import default_store
from streamer.assembly import Networks
from streamer.enrolment import Desk
from streamer.vault import KEY_FILE_VARIABLE, KEY_VARIABLE

Answer = tuple[int, str, str]
SMALL = cv2.resize(ASTRONAUT, (256, 256), interpolation=cv2.INTER_AREA)
WALL = np.full((60, 80, 3), 130, np.uint8)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    detector = Networks(default_store(), threads=1).detector("centerface", size=480)
    return write_embedder(tmp_path_factory.mktemp("networks") / "tiny.onnx", detector)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the gallery is by default in these tests; its key is beside it."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "keys" / "gallery.key"))
    monkeypatch.setenv("STREAMER_GALLERY", str(tmp_path / "gallery"))
    return tmp_path / "gallery"


@pytest.fixture
def photo(tmp_path: Path) -> Callable[[str, np.ndarray], Path]:
    """Write a photo."""

    def write(name: str, image: np.ndarray) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)
        return path

    return write


@pytest.fixture
def ada(streamer: Callable[..., Answer], photo: Callable[..., Path], embedder: Path) -> str:
    """Enrol somebody; return her id."""
    code, out, err = streamer("enrol", "Ada Lovelace", photo("ada.png", SMALL), "--embedder", embedder, "--json")
    assert code == 0, err
    return str(json.loads(out)["enrolled"][0]["identity"])


def refused(answer: Answer, *words: str) -> None:
    """Exit code 2, nothing but lines of ours, no traceback."""
    code, _, err = answer
    lines = [line for line in err.splitlines() if line.startswith("streamer: ")]
    assert code == 2, err
    assert "Traceback" not in err
    assert any(all(word in line for word in words) for line in lines), err


def test_a_person_is_enrolled_listed_shown_checked_and_removed(streamer, photo, embedder, place, tmp_path):
    code, out, err = streamer("enrol", "Ada Lovelace", photo("ada.png", SMALL), "--embedder", embedder)
    assert code == 0, err
    assert f"its key is {tmp_path / 'keys' / 'gallery.key'}" in err
    assert "Ada Lovelace: 1 photo enrolled" in out
    identity = out.split()[0]

    code, out, _ = streamer("gallery", "list")
    assert code == 0 and out.startswith(f"{identity}    1 photo") and "Ada Lovelace" in out
    (listed,) = json.loads(streamer("gallery", "list", "--json")[1])
    assert (listed["id"], listed["name"], len(listed["photos"])) == (identity, "Ada Lovelace", 1)

    code, out, _ = streamer("gallery", "show", identity, "--save", tmp_path / "crops")
    assert code == 0 and "Ada Lovelace" in out and "sharpness" in out
    (crop,) = (tmp_path / "crops").iterdir()
    assert crop.stem == listed["photos"][0]
    assert cv2.imread(str(crop)).shape[0] > 50

    code, out, _ = streamer("gallery", "verify")
    assert (code, out) == (0, "1 persons, all as they were enrolled\n")

    refused(streamer("gallery", "remove", identity), "--yes")
    assert len(json.loads(streamer("gallery", "list", "--json")[1])) == 1
    assert streamer("gallery", "remove", identity, "--yes")[:2] == (0, f"removed {identity}\n")
    assert streamer("gallery", "list", "--json")[1] == "[]\n"

    code, out, _ = streamer("audit", "verify")
    assert (code, out) == (0, "the log is whole\n")
    assert streamer("audit", "export", tmp_path / "log.jsonl")[0] == 0
    log = (tmp_path / "log.jsonl").read_text()
    assert [json.loads(line)["what"] for line in log.splitlines()] == ["identity.enrolled", "identity.removed"]
    assert identity in log and "Lovelace" not in log


def test_a_folder_of_people_is_told_line_by_line_and_the_gallery_knows_its_embedder(streamer, photo, embedder, ada):
    photo("people/Grace/1.png", portrait("left"))
    folder = photo("people/Hedy/1.png", portrait("centre")).parents[1]

    code, out, err = streamer("enrol", "--folder", folder)

    assert code == 0, err
    assert [line for line in err.splitlines() if line.startswith(("1/2", "2/2"))] == [
        "1/2 Grace: 1 photo", "2/2 Hedy: 1 photo",
    ]  # fmt: skip
    assert [line.partition("  ")[2] for line in out.splitlines()] == [
        "Grace: 1 photo enrolled",
        "Hedy: 1 photo enrolled",
    ]


def test_a_refused_photo_is_one_line_and_keeps_everything_out(streamer, photo, embedder, place):
    good, bad = photo("good.png", SMALL), photo("wall.png", WALL)

    answer = streamer("enrol", "Ada", good, bad, "--embedder", embedder)
    refused(answer, f"{bad}: no face found")
    refused(answer, "nothing was enrolled")
    assert answer[1] == "" and not place.exists()

    code, out, err = streamer("enrol", "Ada", good, bad, "--embedder", embedder, "--keep-going", "--json")
    told = json.loads(out)
    assert code == 2 and "Traceback" not in err
    assert [each["name"] for each in told["enrolled"]] == ["Ada"]
    assert [(each["path"], each["can_be_forced"]) for each in told["refused"]] == [(str(bad), False)]


def test_a_watch_list_is_made_changed_filled_emptied_and_removed_and_the_log_has_it(streamer, ada, photo, tmp_path):
    def listed() -> list[dict[str, object]]:
        return json.loads(streamer("watchlist", "list", "--json")[1])

    refused(streamer("watchlist", "set", "Doors", "--priority", 3), "'Doors'", "--purpose", "--legal-basis")
    code, out, err = streamer(
        "watchlist", "set", "Doors", "--purpose", "Who may not enter", "--legal-basis", "House rules, 4"
    )
    assert code == 0, err
    assert (
        "0 persons" in out and "threshold 0.48" in out and "never expires" in out
    )  # what an unknown embedder's list has

    assert streamer("watchlist", "add", "Doors", ada, ada)[:2] == (0, "1 put on Doors\n")
    code, out, err = streamer(
        "watchlist", "set", "Doors", "--expires", "2999-01-31T18:00", "--priority", -2, "--threshold", 0.7,
        "--rename", "Gates",
    )  # fmt: skip
    assert code == 0 and "1 person " in out and "expires 2999-01-31 18:00 UTC" in out, err
    (watch_list,) = listed()
    assert {name: watch_list[name] for name in ("name", "persons", "threshold", "priority", "expired")} == {
        "name": "Gates", "persons": 1, "threshold": 0.7, "priority": -2, "expired": False,
    }  # fmt: skip
    assert watch_list["purpose"] == "Who may not enter" and watch_list["expires_at"].startswith("2999-01-31T18:00:00")
    code, out, _ = streamer("watchlist", "set", "Gates", "--expires", "never")
    assert code == 0 and "never expires" in out

    refused(
        streamer("watchlist", "set", "Gates", "--expires", "2016-01-31"), "--expires", "2016-01-31 00:00 UTC is over"
    )
    refused(streamer("watchlist", "set", "Gates", "--expires", "soon"), "--expires", "soon")
    refused(streamer("watchlist", "set", "Gates", "--expires", "0001-01-01T00:00+05:00"), "--expires")
    refused(streamer("watchlist", "set", "Gates", "--priority", "1" + 400 * "0"), "--priority")
    refused(streamer("watchlist", "set", " Gates ", "--threshold", 0.7), "would change")
    refused(streamer("watchlist", "add", "Gates", "a\nb"), "no id")
    refused(streamer("watchlist", "set", "Gates", "--threshold", 0.7), "nothing about list 'Gates' would change")
    refused(streamer("watchlist", "set", "Doors", "--rename", "X", "--purpose", "a", "--legal-basis", "b"), "--rename")
    refused(streamer("watchlist", "add", "Doors", ada), "no list 'Doors'")
    refused(streamer("watchlist", "drop", "Gates", ada, "0" * 16), "0" * 16)
    assert listed()[0]["persons"] == 1, "one of two cannot be taken off: neither is"

    assert streamer("watchlist", "drop", "Gates", ada)[:2] == (0, "1 taken off Gates\n")
    refused(streamer("watchlist", "remove", "Gates"), "--yes")
    assert streamer("watchlist", "remove", "Gates", "--yes")[:2] == (0, "removed Gates\n")
    assert listed() == [] and ada in streamer("gallery", "list")[1]

    assert streamer("audit", "export", tmp_path / "log.jsonl")[0] == 0
    log = (tmp_path / "log.jsonl").read_text()
    entries = [json.loads(line) for line in log.splitlines()]
    assert [entry["what"] for entry in entries] == [
        "identity.enrolled", "list.changed", "list.joined", "list.changed", "list.changed", "list.left", "list.removed",
    ]  # fmt: skip
    assert entries[3]["details"] == {
        "changed": ["name", "threshold", "priority", "expires_at"], "threshold": 0.7, "priority": -2,
        "expires_at": "2999-01-31T18:00:00+00:00",
    }  # fmt: skip
    assert "Gates" not in log and "Doors" not in log and "enter" not in log
    assert streamer("audit", "verify")[0] == 0


def test_one_photo_of_several_is_removed_and_the_last_one_is_not(streamer, ada, photo, tmp_path):
    first = json.loads(streamer("gallery", "list", "--json")[1])[0]["photos"][0]
    refused(streamer("gallery", "remove", ada, "--photo", first, "--yes"), first, "only one")
    answer = streamer("enrol", "Ada Lovelace", photo("other.png", portrait("left")), "--force", "--json")
    (second,) = [each["id"] for each in json.loads(answer[1])["enrolled"][0]["photos"]]
    refused(streamer("gallery", "remove", ada, "--photo", "0" * 16, "--yes"), "no photo")
    refused(streamer("gallery", "remove", ada, "--photo", "a\nb", "--yes"), "no id")
    refused(streamer("gallery", "remove", ada, "--photo", first), "--yes")

    assert streamer("gallery", "remove", ada, "--photo", first, "--yes")[:2] == (0, f"removed {first}\n")

    assert json.loads(streamer("gallery", "list", "--json")[1])[0]["photos"] == [second]
    assert streamer("gallery", "verify")[0] == 0
    assert streamer("audit", "export", tmp_path / "log.jsonl")[0] == 0
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert (last["what"], last["subjects"]) == ("photo.removed", [ada, first])


def test_an_export_goes_to_another_box_whole_or_not_at_all(streamer, ada, tmp_path, monkeypatch):
    secret, file = tmp_path / "secret", tmp_path / "all.gallery"
    secret.write_text("a passphrase of some length\n")
    assert streamer("gallery", "export", file, "--passphrase-file", secret)[0] == 0
    assert b"Lovelace" not in file.read_bytes()
    refused(streamer("gallery", "export", file, "--passphrase-file", secret), "all.gallery")
    refused(streamer("gallery", "export", tmp_path / "x"), "--passphrase-file")

    monkeypatch.setenv("STREAMER_GALLERY", str(tmp_path / "other"))
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "keys" / "other.key"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(streamer("gallery", "import", file, "--passphrase-file", secret), "all.gallery")
    assert streamer("gallery", "list", "--json")[1] == "[]\n"
    file.write_bytes(whole)
    assert streamer("gallery", "import", file, "--passphrase-file", secret)[0] == 0
    assert [each["id"] for each in json.loads(streamer("gallery", "list", "--json")[1])] == [ada]
    assert streamer("audit", "verify")[0] == 0


def test_an_export_is_in_the_log_before_the_file_is_there(streamer, ada, place, tmp_path):
    """One that breaks off may have let a copy of everybody out: an entry too many, never one too few."""
    secret, file = tmp_path / "secret", tmp_path / "all.gallery"
    secret.write_text("a passphrase of some length\n")

    for code in (0, 2):  # the second finds the file there
        assert streamer("gallery", "export", file, "--passphrase-file", secret)[0] == code

    done = [json.loads(line)["what"] for line in (place / "audit.jsonl").read_text().splitlines()]
    assert done[-3:] == ["gallery.export-begun", "gallery.exported", "gallery.export-begun"]


def test_a_gallery_that_was_changed_by_hand_fails_its_check(streamer, ada, place):
    log = place / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b"identity.enrolled", b"identity.enrolleD"))

    code, out, _ = streamer("audit", "verify")

    assert code == 1 and "line 1" in out


def test_another_embedder_than_the_gallerys_is_refused(streamer, ada, photo, embedder, tmp_path):
    other = tmp_path / "other.onnx"
    other.write_bytes(embedder.read_bytes())
    detector = Networks(default_store(), threads=1).detector("centerface", size=480)
    write_embedder(other, detector, cell=8)

    refused(streamer("enrol", "Ada", photo("b.png", SMALL[:, ::-1]), "--embedder", other), "cannot be compared")


def test_all_templates_are_made_anew_for_another_embedder_and_the_earlier_ones_stay(
    streamer, ada, embedder, place, tmp_path
):
    other = tmp_path / "other.onnx"
    write_embedder(other, Networks(default_store(), threads=1).detector("centerface", size=480), cell=8)
    assert streamer("watchlist", "set", "Doors", "--purpose", "a", "--legal-basis", "b", "--threshold", 0.7)[0] == 0

    code, out, err = streamer("gallery", "embed", "--embedder", other)

    assert code == 0, err
    sha256 = hashlib.sha256(other.read_bytes()).hexdigest()
    assert out.splitlines() == [
        f"1 photos embedded by {other} (sha256 {sha256[:12]})",
        "list Doors: threshold 0.7; by this embedder 0.48 is usual",
    ]
    with Desk.open(place) as desk:
        (person,) = desk.gallery.identities()
        photo = desk.gallery.photo(person.photos[0])
        assert set(photo.templates) == {hashlib.sha256(embedder.read_bytes()).hexdigest(), sha256}
        image = cv2.imdecode(np.frombuffer(photo.image, np.uint8), cv2.IMREAD_COLOR_BGR)
        embeds = Networks(default_store(), threads=1).embedder(str(other))
        assert photo.templates[sha256] == pytest.approx(embeds.embed([(image, photo.landmarks)])[0], abs=1e-6)
        assert desk.gallery.embedder() == (str(other), sha256)
        assert desk.gallery.snapshot(sha256).search(photo.templates[sha256])[0][0].identity == ada
    assert streamer("gallery", "embed")[1].startswith(f"1 photos embedded by {other}"), "what the gallery names"
    assert streamer("audit", "export", tmp_path / "log.jsonl")[0] == 0
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["what"] == "gallery.embedded"


def test_a_key_is_made_once_and_its_place_is_told(streamer, tmp_path):
    key = tmp_path / "keys" / "gallery.key"

    assert streamer("keys", "new", "--gallery")[:2] == (0, f"{key}\n")
    made = key.read_bytes()
    refused(streamer("keys", "new", "--gallery"), "never overwritten")
    refused(streamer("keys", "new"), "--gallery")
    assert key.read_bytes() == made
    assert made.decode().strip() not in "".join(streamer("keys", "new", "--gallery", "--out", tmp_path / "k2")[1:])


def test_a_gallery_that_is_not_there_or_has_lost_its_key_is_one_line(streamer, place, tmp_path):
    for command in (
        ["gallery", "list"], ["gallery", "show", "0" * 16], ["gallery", "remove", "0" * 16, "--yes"],
        ["gallery", "verify"], ["audit", "verify"], ["audit", "export", tmp_path / "x"],
    ):  # fmt: skip
        refused(streamer(*command), "no gallery", str(place))
    place.mkdir(mode=0o700)
    (place / "gallery.db").touch()
    refused(streamer("gallery", "list"), "no key")


def test_an_unknown_id_is_one_line(streamer, ada):
    refused(streamer("gallery", "show", "0" * 16), "0" * 16)
    refused(streamer("gallery", "remove", "Ada", "--yes"), "Ada")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["enrol"], "give NAME and PHOTO"),
        (["enrol", "Ada"], "give NAME and PHOTO"),
        (["enrol", "Ada", "none.jpg"], "none.jpg: no such file"),
        (["enrol", "--folder", "none"], "no such folder"),
        (["enrol", "Ada", __file__, "--purpose", "x"], "give --list"),
        (["enrol", "Ada", __file__, "--embedder", "sgen-small"], "embedding"),
        (["enrol", "Ada", __file__, "--embedder", "x", "--list", "wanted"], "--purpose"),
        (["gallery", "import", "none"], "--passphrase-file"),
        (["gallery", "fly"], "fly"),
        (["audit", "export", "x", "--since", "yesterday"], "--since"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_each(streamer, place, arguments, word):
    answer = streamer(*arguments)

    refused(answer, word)
    assert len(answer[2].splitlines()) == 1
    assert not place.exists()


def test_calibrating_on_too_few_people_or_none_is_one_line(streamer, tmp_path):
    (tmp_path / "people" / "Ada").mkdir(parents=True)
    code, _, errors = streamer("calibrate", tmp_path / "people", "--out", tmp_path / "table.json")

    assert code == 2
    assert "Traceback" not in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "table.json").exists()
