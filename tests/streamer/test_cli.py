"""The command line: what a user types, and what a mistake answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import zmq
from media import write_video
from onnx import TensorProto, helper
from skimage.data import astronaut

from engines.card import CARD_KEY
from engines.store import default_store
from streamer import types, wire

PHOTO = np.ascontiguousarray(astronaut()[..., ::-1])


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return write_video(tmp_path / "film.mp4", frames=5)


@pytest.fixture
def config(tmp_path: Path, film: Path) -> Callable[..., Path]:
    def write(more: str = "", *, url: object = film, endpoint: str = f"ipc://{tmp_path}/events") -> Path:
        path = tmp_path / "camera.yaml"
        path.write_text(f"cameras:\n  - name: door\n    url: {url}\npublish:\n  endpoint: {endpoint}\n{more}")
        return path

    return write


@contextmanager
def publishing(endpoint: str, *messages: list[bytes]) -> Iterator[None]:
    """Send messages as soon as somebody listens."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as socket, ThreadPoolExecutor(1) as pool:
        socket.bind(endpoint)
        socket.rcvtimeo = 60_000  # a loaded machine is slow to start a process

        def send() -> None:
            while socket.recv() != b"\1":  # the subscription to all topics
                pass
            for message in messages:
                socket.send_multipart(message)

        sent = pool.submit(send)
        yield
        sent.result()


def message(event: types.Event, seq: int) -> list[bytes]:
    now = datetime.now(UTC)
    return wire.encode(event, stream="box", epoch="e1", seq=seq, topic_seq=0, published_at=now)


def an_identified_face() -> types.FaceIdentified:
    moment = types.Moment("hall", 12, 0.48, datetime.now(UTC), "file")
    track = types.Track(4, moment, np.zeros(4), np.zeros((5, 2)), 0.9)
    crop = types.Crop(track, PHOTO[:20, :20].copy(), np.eye(2, 3), types.Quality(23.4, 8, 0.5, 3, 0, 0, 0))
    return types.FaceIdentified(crop, types.Route("none", "the face is large"), None, None, "no embedder")


ENDED = message(types.SystemStatus("ended", "1", {}, {}, {}, {}), 9)


@pytest.fixture
def unloadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of sgen-small: an ONNX with its card, of an operator that nobody has."""
    image = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", 3, "h", "w")) for name in ("image", "out")]
    graph = helper.make_graph([helper.make_node("Conjure", ["image"], ["out"])], "wrong", image[:1], image[1:])
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    card = default_store().find("sgen-small").card.model_dump(mode="json")
    for side, name in (("inputs", "image"), ("outputs", "out")):
        card[side] = [{"name": name, "layout": "NCHW", "shape": ["n", 3, "h", "w"]}]
    network.metadata_props.add(key=CARD_KEY, value=json.dumps(card))
    folder = tmp_path / "networks"
    folder.mkdir()
    onnx.save(network, folder / "sgen-small.onnx")
    monkeypatch.setenv("STREAMER_MODELS", str(folder))
    return folder / "sgen-small.onnx"


def interrupted(*arguments: object, when: Callable[[subprocess.Popen[str]], object]) -> tuple[int, str]:
    """Press Ctrl-C; return exit code and errors."""
    with subprocess.Popen(
        [sys.executable, "-m", "streamer.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            when(process)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()  # else a test that fails would wait for it for ever
    return process.returncode, err


def refused(answer: tuple[int, str, str], *words: str) -> None:
    """Exit code 2 and one line for each mistake, no traceback."""
    code, _, err = answer
    lines = [line for line in err.splitlines() if line.startswith("streamer: ")]
    assert code == 2, err
    assert "Traceback" not in err
    assert any(all(word in line for word in words) for line in lines), err


def test_bad_configs_are_refused_in_one_line_each(streamer, config, tmp_path):
    refused(streamer("run", tmp_path / "none.yaml"), "none.yaml")
    refused(streamer("run", config("detektor: {}\n")), "detektor")
    refused(streamer("run", config("detector: {size: big}\n")), "detector.size")
    refused(streamer("run", config("gallery: {folders: x}\n")), "gallery.folders", "folder?")


def test_all_mistakes_of_a_config_are_told_together(streamer, config):
    code, _, err = streamer("check", config("detector: {size: big, model: 7}\nrestorer: {max_size: -1}\n"))

    assert code == 2
    assert [place for place in ("detector.size", "detector.model", "restorer.max_size") if place in err] == [
        "detector.size", "detector.model", "restorer.max_size",
    ]  # fmt: skip


def test_two_cameras_of_one_name_are_refused(streamer, tmp_path, film):
    path = tmp_path / "two.yaml"
    path.write_text(f"cameras:\n  - {{name: door, url: {film}}}\n  - {{name: door, url: {film}}}\n")

    refused(streamer("run", path), "cameras.1.name", "cameras.0")


def test_an_unknown_name_in_the_environment_is_refused(streamer, config, monkeypatch):
    monkeypatch.setenv("STREAMER__DETECTOR__SIZ", "960")

    refused(streamer("run", config()), "STREAMER__DETECTOR__SIZ")


def test_sources_that_are_no_video_are_refused_before_anything_starts(streamer, config, tmp_path):
    text = tmp_path / "notes.mp4"
    text.write_text("this is not a film\n" * 50)
    empty = tmp_path / "empty.mp4"
    empty.touch()

    refused(streamer("run", config(url=tmp_path / "missing.mp4")), "missing.mp4")
    refused(streamer("run", config(url=text)), "notes.mp4")
    refused(streamer("run", config(url=empty)), "empty.mp4")


def test_a_camera_out_of_reach_fails_the_check(streamer, config):
    refused(streamer("check", config(url="rtsp://user:hush@127.0.0.1:9/stream")), "door")


def test_check_tells_of_cameras_and_networks_together(streamer, config, tmp_path):
    answer = streamer("check", config("detector: {model: ./none.onnx}\n", url="rtsp://127.0.0.1:9/stream"))

    refused(answer, "door")
    refused(answer, "none.onnx")


def test_a_film_that_breaks_off_is_one_error_in_the_log(streamer, config, tmp_path, caplog):
    film = write_video(tmp_path / "cut.mp4", frames=50, options={"movflags": "faststart"})
    os.truncate(film, film.stat().st_size * 6 // 10)

    code, out, _ = streamer("run", config(url=film), "--offline")

    assert code == 1
    assert out.startswith("frames ") and not out.startswith("frames 0")
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert errors[0].startswith("door") and "breaks off" in errors[0]


@pytest.mark.parametrize("duration", ["nan", "-1", "long"])
def test_a_duration_that_is_none_is_refused(streamer, config, duration):
    refused(streamer("run", config(), "--duration", duration), "--duration")


def test_a_password_never_shows(streamer, config):
    _, out, err = streamer("check", config(url="rtsp://user:hush@127.0.0.1:9/stream"))

    assert "hush" not in out + err


def test_a_port_in_use_is_refused(streamer, config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        refused(streamer("run", config(endpoint=f"tcp://127.0.0.1:{port}")), str(port))


def test_networks_that_are_none_or_do_not_fit_are_refused(streamer, config, tmp_path):
    fake = tmp_path / "fake.onnx"
    fake.write_text("no network")

    refused(streamer("run", config(f"detector: {{model: {fake}}}\n")), "fake.onnx")
    refused(streamer("run", config("detector: {model: sgen-small}\n")), "restoration", "detection")
    refused(streamer("run", config("restorer: {name: centerface}\n")), "detection", "restoration")
    refused(streamer("run", config("restorer: {name: sgenn}\n")), "sgenn")


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "--fast", "x.yaml"], ["fly"], [], ["listen", "--limit", "many"], ["restore", "x.png"]],
)
def test_wrong_words_on_the_command_line_are_one_line_each(streamer, arguments):
    code, _, err = streamer(*arguments)

    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("streamer: ")


def test_a_subscriber_cannot_listen_to_nonsense(streamer):
    refused(streamer("listen", "nonsense"), "nonsense")


def test_a_folder_that_cannot_be_made_is_refused(streamer, tmp_path):
    (tmp_path / "file").touch()
    cv2.imwrite(str(tmp_path / "a.png"), PHOTO[:64, :64])

    refused(streamer("listen", "--save", tmp_path / "file" / "x"), "--save", "Not a directory")
    refused(streamer("listen", "--save", tmp_path / "file"), "--save", "File exists")
    refused(streamer("restore", tmp_path / "a.png", "--out", tmp_path / "file" / "x"), "--out", "Not a directory")


def test_listen_passes_over_what_is_no_event(streamer, tmp_path):
    endpoint = f"ipc://{tmp_path}/events"

    with publishing(endpoint, [b"weather", b"rain"], message(an_identified_face(), 1), ENDED):
        code, out, err = streamer("listen", endpoint, "--json")

    assert code == 0
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["face.identified", "system.status"]
    assert "Traceback" not in err


def test_listen_ends_with_one_line_where_it_cannot_save(streamer, tmp_path):
    endpoint = f"ipc://{tmp_path}/events"
    (tmp_path / "saved" / "e1_hall_0004_000012.png").mkdir(parents=True)

    with publishing(endpoint, message(an_identified_face(), 1), ENDED):
        code, _, err = streamer("listen", endpoint, "--save", tmp_path / "saved")

    assert code == 1
    assert [line for line in err.splitlines() if line.startswith("streamer: ")] == [
        f"streamer: --save {tmp_path}/saved: Is a directory"
    ]


def test_ctrl_c_is_the_ordinary_end_of_listen(tmp_path):
    endpoint = f"ipc://{tmp_path}/events"

    def is_told(listener: subprocess.Popen[str]) -> None:
        with publishing(endpoint, message(an_identified_face(), 1)):
            assert "hall" in listener.stdout.readline()

    code, err = interrupted("listen", endpoint, when=is_told)

    assert code == 0
    assert err.strip() == ""


def test_ctrl_c_fails_what_was_not_finished(tmp_path):
    for number in range(200):
        cv2.imwrite(str(tmp_path / f"{number}.png"), PHOTO[:64, :64])

    code, err = interrupted(
        "restore", tmp_path, "--crops", "--out", tmp_path / "out", when=lambda it: it.stdout.readline()
    )

    assert code == 1
    assert err.strip().splitlines()[-1] == "streamer: interrupted"
    assert "Traceback" not in err


def test_check_says_what_a_run_would_do(streamer, config):
    code, out, _ = streamer("check", "--offline", config())

    assert code == 0
    assert "camera door: 160x120, 25 fps, h264, 0.2 s" in out
    assert "centerface" in out
    assert "sgen-small" in out


def test_run_and_listen_agree_on_what_was_published(config, tmp_path):
    faces = [PHOTO[0:360, 60:500]] * 12
    path = config(
        "detector: {size: 448}\n", url=write_video(tmp_path / "face.mp4", [np.ascontiguousarray(f) for f in faces])
    )
    path.write_text(path.read_text().replace("publish:\n", "publish:\n  wait_for: 1\n"))
    streamer = [sys.executable, "-m", "streamer.cli"]
    listen = [*streamer, "listen", f"ipc://{tmp_path}/events", "--json", "--save", str(tmp_path / "saved")]

    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as listener:
        run = subprocess.run([*streamer, "run", "--offline", str(path)], capture_output=True, text=True, timeout=60)
        received = [json.loads(line) for line in listener.communicate(timeout=30)[0].splitlines()]

    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("frames 12, faces 1, restored ")
    assert f"published {len(received)}," in run.stdout
    assert "research-only" in run.stderr
    identified = [event for event in received if event["kind"] == "face.identified"]
    assert len(list((tmp_path / "saved").glob("*.png"))) == len(identified) > 0


def test_restore_writes_crop_restoration_and_the_photo_put_together(streamer, tmp_path):
    small = tmp_path / "astronaut.png"
    cv2.imwrite(str(small), cv2.resize(PHOTO, (160, 160), interpolation=cv2.INTER_AREA))
    out = tmp_path / "out"

    code, told, _ = streamer("restore", small, "--out", out, "--offline")

    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "astronaut.face1.crop.png", "astronaut.face1.restored.png", "astronaut.restored.png",
    ]  # fmt: skip
    crop, restored = (cv2.imread(str(out / f"astronaut.face1.{kind}.png")) for kind in ("crop", "restored"))
    assert restored.shape[0] in (crop.shape[0] * 2, crop.shape[0] * 4)
    changed = (cv2.imread(str(small)) != cv2.imread(str(out / "astronaut.restored.png"))).any(2)
    assert changed[20:55, 55:85].mean() > 0.8  # her face
    assert not changed[80:].any()
    assert "sgen-small" in told


def test_restore_takes_crops_of_any_aspect_as_they_are(streamer, tmp_path):
    crop = tmp_path / "crop.jpg"
    cv2.imwrite(str(crop), cv2.resize(PHOTO[0:200, 130:300], (34, 40), interpolation=cv2.INTER_AREA))

    assert streamer("restore", crop, "--crops", "--restorer", "sgen-small", "--out", tmp_path / "out")[0] == 0
    assert streamer("restore", crop, "--crops", "--restorer", "none", "--out", tmp_path / "same")[0] == 0

    assert cv2.imread(str(tmp_path / "out/crop.png")).shape == (160, 136, 3)
    assert np.array_equal(cv2.imread(str(tmp_path / "same/crop.png")), cv2.imread(str(crop)))


def test_restore_never_overwrites_its_inputs(streamer, tmp_path):
    crop, photo = tmp_path / "crops" / "a.png", tmp_path / "photos" / "a.png"
    for path in (crop, photo):
        path.parent.mkdir()
        cv2.imwrite(str(path), cv2.resize(PHOTO, (160, 160), interpolation=cv2.INTER_AREA))
    before = crop.read_bytes()

    refused(streamer("restore", crop.parent, "--crops", "--out", crop.parent), "a.png", "--out")
    assert crop.read_bytes() == before

    assert streamer("restore", photo.parent, "--out", photo.parent)[0] == 0
    written = {path.name: path.read_bytes() for path in photo.parent.iterdir()}
    refused(streamer("restore", photo.parent, "--out", photo.parent), "a.face1.crop.png", "--out")
    assert {path.name: path.read_bytes() for path in photo.parent.iterdir()} == written


def test_a_network_that_does_not_load_is_the_users_to_mend(streamer, config, unloadable, film, tmp_path):
    cv2.imwrite(str(tmp_path / "crop.png"), PHOTO[:64, :64])

    refused(streamer("run", config()), str(unloadable))
    refused(streamer("restore", tmp_path / "crop.png", "--crops", "--out", tmp_path / "out"), str(unloadable))
    refused(streamer("bench", "--runs", 1, "--clip", film), str(unloadable))


def test_restore_names_what_it_cannot_do_and_does_the_rest(streamer, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "text.png").write_text("no picture")
    cv2.imwrite(str(inputs / "wall.png"), np.full((90, 120, 3), 130, np.uint8))
    cv2.imwrite(str(inputs / "woman.png"), PHOTO)
    out = tmp_path / "out"

    answer = streamer("restore", inputs, "--out", out)

    refused(answer, "text.png")
    assert "wall.png: no face, skipped" in answer[1]
    assert (out / "woman.restored.png").exists()
    assert not (out / "wall.restored.png").exists()


def test_restore_refuses_two_inputs_of_one_stem_and_a_missing_one(streamer, tmp_path):
    for name in ("a.png", "a.jpg"):
        cv2.imwrite(str(tmp_path / name), PHOTO[:64, :64])
    out = tmp_path / "out"

    refused(streamer("restore", tmp_path / "a.png", tmp_path / "a.jpg", "--out", out), "a.png")
    refused(streamer("restore", tmp_path / "b.png", "--out", out), "b.png")
    assert not out.exists()


def test_models_list_and_show_tell_the_licence(streamer):
    code, listed, _ = streamer("models", "list", "--json")
    shown = json.loads(streamer("models", "show", "sgen-small")[1])

    assert code == 0
    assert {"centerface", "sgen-small"} <= {model["name"] for model in json.loads(listed)}
    assert shown["license"].startswith("research-only")
    assert shown["scales"] == [4, 2, 1]


def test_an_unknown_model_is_refused_with_those_that_are_known(streamer):
    refused(streamer("models", "show", "sgem"), "sgem", "sgen-small")
    refused(streamer("models", "fetch", "sgem"), "sgem")


def test_version_is_printed(streamer):
    code, out, _ = streamer("--version")

    assert code == 0
    assert out.startswith("streamer 0.")


def test_bench_measures_each_stage_and_the_whole(streamer, tmp_path):
    face = cv2.resize(PHOTO[0:360, 60:500], (220, 180), interpolation=cv2.INTER_AREA)
    clip = write_video(tmp_path / "face.mp4", [face] * 6)

    code, out, _ = streamer("bench", "--runs", 2, "--clip", clip, "--offline")

    *told, last = out.splitlines()
    measured = json.loads(last)
    stages = [measured[stage] for stage in ("read", "detect", "track", "identify", "publish")]
    assert code == 0
    assert [line.split(":")[0] for line in told] == ["run 1/2", "run 2/2"]
    assert measured["runs"] == 2
    assert min(stages) > 0
    assert measured["detect"] == max(stages)
    assert measured["fps"] == pytest.approx(12 / measured["wall"], rel=0.1)
    assert 0 < measured["share"] < 1.3
