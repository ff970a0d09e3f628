"""Configs are read whole, said to be wrong whole, and never tell a secret."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from streamer.config import CameraConfig, ConfigError, SecretUrl, StreamerConfig, example, load_config

ROOT = Path(__file__).parents[2]
LEAST = """
cameras:
  - name: entrance
    url: rtsp://user:${CAMERA_PASSWORD}@10.0.0.7/stream1
publish:
  endpoint: tcp://127.0.0.1:5556
"""
FILES = """
cameras:
  - {name: one, url: one.mp4}
  - {name: two, url: two.mp4}
"""


@pytest.fixture
def load(tmp_path):
    def load(text, environ=None):
        path = tmp_path / "camera.yaml"
        path.write_text(text)
        return load_config(path, {} if environ is None else environ)

    return load


@pytest.fixture
def mistakes_of(load, tmp_path):
    def mistakes_of(text, environ=None):
        with pytest.raises(ConfigError) as caught:
            load(text, environ)
        assert str(caught.value).splitlines() == list(caught.value.mistakes), "each mistake is one line"
        return [line.replace(str(tmp_path / "camera.yaml"), "FILE") for line in caught.value.mistakes]

    return mistakes_of


def the_url(config, index=0):
    return config.cameras[index].url.get_secret_value()


# What is read.


def test_the_least_config_works_and_all_else_has_a_default(load):
    config = load(LEAST, {"CAMERA_PASSWORD": "hunter2"})

    assert the_url(config) == "rtsp://user:hunter2@10.0.0.7/stream1"
    assert config.cameras[0].transport == "tcp"
    assert (config.detector.model, config.detector.size, config.detector.threshold) == ("centerface", 960, None)
    assert (config.restorer.name, config.restorer.max_size) == ("auto", 256)
    assert config.embedder.model is None
    assert (config.publish.wait_for, config.publish.image_format, config.publish.insecure) == (0, "png", False)


def test_the_stream_is_by_default_the_host_name_made_fit_for_events(load, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "box-7.example.org")

    assert load(FILES).stream == "box-7-example-org"


def test_an_empty_section_means_its_defaults(load):
    assert load(FILES + "detector:\npublish:\n") == load(FILES)


def test_paths_start_from_the_folder_of_the_config(load, tmp_path):
    config = load(
        """
        cameras:
          - {name: a, url: clips/a.mp4}
          - {name: b, url: /videos/b.mp4}
          - {name: c, url: "rtsp://10.0.0.7/c"}
        detector: {model: models/scrfd.onnx}
        restorer: {name: sgen.onnx}
        embedder: {model: ../embedder.onnx}
        """
    )

    assert [the_url(config, i) for i in range(3)] == [f"{tmp_path}/clips/a.mp4", "/videos/b.mp4", "rtsp://10.0.0.7/c"]
    assert config.detector.model == f"{tmp_path}/models/scrfd.onnx"
    assert config.restorer.name == f"{tmp_path}/sgen.onnx"
    assert config.embedder.model == f"{tmp_path}/../embedder.onnx"


@pytest.mark.parametrize("model", ["centerface", "retail-0095", "https://example.org/net.onnx"])
def test_names_and_addresses_of_models_stay_as_they_are(load, model):
    assert load(FILES + f"detector: {{model: '{model}'}}").detector.model == model


def test_what_several_cameras_share_can_be_written_once(load):
    config = load(
        """
        cameras:
          - &first {name: a, url: "rtsp://10.0.0.1/a", transport: udp}
          - {<<: *first, name: b}
        """
    )

    assert [(camera.name, camera.transport) for camera in config.cameras] == [("a", "udp"), ("b", "udp")]


def test_the_example_in_the_repository_is_current_and_says_the_defaults(load):
    shipped = (ROOT / "configs" / "camera.yaml").read_text()
    environ = {"CAMERA_PASSWORD": "x"}

    assert shipped == example(), "run: python -m streamer.config > configs/camera.yaml"
    assert load(shipped, environ) == load(LEAST, environ)


def test_the_example_names_every_field_under_its_sentence():
    lines = [line.strip() for line in example().splitlines()]

    for section in [StreamerConfig, *(field.annotation for field in StreamerConfig.model_fields.values())]:
        for name, field in getattr(section, "model_fields", CameraConfig.model_fields).items():
            assert field.description
            assert any(line.removeprefix("# ").startswith(f"{name}:") for line in lines), name
            assert any(field.description[:40] in line for line in lines), name


def test_the_module_prints_the_example():
    done = subprocess.run(
        [sys.executable, "-m", "streamer.config"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout == example()


def test_a_config_made_in_code_reads_no_environment(monkeypatch):
    monkeypatch.setenv("STREAMER__STREAM", "from-outside")

    assert StreamerConfig(stream="mine", cameras=({"name": "a", "url": "a.mp4"},)).stream == "mine"


def test_a_config_cannot_be_changed(load):
    config = load(FILES)

    with pytest.raises(ValidationError, match="frozen"):
        config.stream = "other"
    with pytest.raises(ValidationError, match="frozen"):
        config.publish.insecure = True


def test_buckets_are_sides_that_rise(load, mistakes_of):
    assert load(FILES).restorer.buckets is None
    assert load(FILES + "restorer: {buckets: [128, 256]}").restorer.buckets == (128, 256)
    assert load(FILES, {"STREAMER__RESTORER__BUCKETS": "[128, 256]"}).restorer.buckets == (128, 256)

    for value, mistake in [
        ("[256, 128]", "restorer.buckets: should rise from entry to entry"),
        ("[128, 128]", "restorer.buckets: should rise from entry to entry"),
        ("[0, 16]", "restorer.buckets.0: should be greater than or equal to 1"),
        ("[16, large]", "restorer.buckets.1: should be a valid integer, unable to parse string as an integer"),
        ("[]", "restorer.buckets: should have at least one entry"),
        ("128", "restorer.buckets: should be a list: each entry begins with -"),
    ]:
        assert mistakes_of(FILES + f"restorer: {{buckets: {value}}}") == [mistake]


@pytest.mark.parametrize("text", ["128, 256", "[128, ", "many"])
def test_a_variable_that_is_no_list_is_a_mistake(mistakes_of, text):
    assert mistakes_of(FILES, {"STREAMER__RESTORER__BUCKETS": text}) == [
        "restorer.buckets: should be a list: each entry begins with - (set by STREAMER__RESTORER__BUCKETS)"
    ]


# The environment.


def test_a_variable_overrides_one_field_of_one_camera(load):
    config = load(FILES, {"STREAMER__CAMERAS__1__URL": "rtsp://10.0.0.9/x", "STREAMER__DETECTOR__SIZE": "640"})

    assert [camera.name for camera in config.cameras] == ["one", "two"]
    assert the_url(config, 0).endswith("one.mp4")
    assert the_url(config, 1) == "rtsp://10.0.0.9/x"
    assert config.detector.size == 640


def test_variables_can_add_a_camera_or_make_up_the_whole_config(load):
    third = {"STREAMER__CAMERAS__2__NAME": "3", "STREAMER__CAMERAS__2__URL": "three.mp4"}
    only = {"STREAMER__CAMERAS__0__NAME": "a", "STREAMER__CAMERAS__0__URL": "a.mp4"}

    assert [camera.name for camera in load(FILES, third).cameras] == ["one", "two", "3"]
    assert [camera.name for camera in load("", only).cameras] == ["a"]


def test_a_variable_is_converted_to_the_type_of_its_field(load):
    config = load(FILES, {"STREAMER__PUBLISH__INSECURE": "true", "STREAMER__DETECTOR__THRESHOLD": "0.25"})

    assert config.publish.insecure is True
    assert config.detector.threshold == 0.25


def test_an_empty_variable_and_one_of_another_prefix_change_nothing(load):
    environ = {"STREAMER__DETECTOR__SIZE": "", "STREAMER_MODELS": "/models", "STREAMER_CACHE": "/cache"}

    assert load(FILES, environ) == load(FILES)


def test_a_mistyped_variable_is_a_mistake_with_its_name_for_a_place(mistakes_of):
    environ = {
        "STREAMER__DETECTOR__SIZ": "640",
        "STREAMER__CAMERA__0__URL": "x.mp4",
        "STREAMER__CAMERAS__FIRST__URL": "x.mp4",
        "STREAMER__CAMERAS": "x.mp4",
        "STREAMER__": "",
    }

    assert mistakes_of(FILES, environ) == [
        "STREAMER__: unknown key",
        "STREAMER__CAMERAS: is a section; name one of its fields",
        "STREAMER__CAMERAS__FIRST__URL: unknown key",
        "STREAMER__CAMERA__0__URL: unknown key; did you mean cameras?",
        "STREAMER__DETECTOR__SIZ: unknown key; did you mean size?",
    ]


def test_a_wrong_value_names_the_variable_that_set_it(mistakes_of):
    (mistake,) = mistakes_of(FILES, {"STREAMER__DETECTOR__SIZE": "large"})

    assert mistake.startswith("detector.size: should be a valid integer")
    assert mistake.endswith("(set by STREAMER__DETECTOR__SIZE)")


def test_a_variable_for_a_camera_beyond_the_last_leaves_gaps_that_are_told(mistakes_of):
    assert mistakes_of(FILES, {"STREAMER__CAMERAS__3__NAME": "x"}) == [
        "cameras.2.name: is missing",
        "cameras.2.url: is missing",
        "cameras.3.url: is missing",
    ]


# ${NAME}.


@given(password=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_password_survives_the_user_part_of_an_address(tmp_path_factory, password):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(LEAST)

    url = urlsplit(the_url(load_config(path, {"CAMERA_PASSWORD": password})))

    assert unquote(url.password) == password
    assert (url.hostname, url.path) == ("10.0.0.7", "/stream1")


def test_outside_the_user_part_a_value_goes_in_as_it_is(load):
    text = FILES.replace("one.mp4", '"rtsp://${HOST}/${PATH_}?x=${X}"') + "embedder: {model: '${MODEL}'}"
    environ = {"HOST": "u:p@10.0.0.7:554", "PATH_": "a/b", "X": "1&y=2", "MODEL": "/m/a b.onnx"}

    config = load(text, environ)

    assert the_url(config) == "rtsp://u:p@10.0.0.7:554/a/b?x=1&y=2"
    assert config.embedder.model == "/m/a b.onnx"


def test_a_value_is_not_looked_at_again_nor_is_a_key_or_a_comment(load, mistakes_of):
    assert the_url(load(FILES.replace("one.mp4", "'/${A}'") + "# ${NOPE}", {"A": "${B}"})) == "/${B}"
    assert mistakes_of(FILES + "${A}: 1", {"A": "stream"}) == ["${A}: unknown key"]


def test_a_dollar_is_a_dollar_and_two_keep_a_brace_from_being_filled(load):
    assert the_url(load(FILES.replace("one.mp4", "'/a$b$$c$${D}'"))) == "/a$b$$c${D}"


@pytest.mark.parametrize("text", ["/${", "/${}", "/${A", "/${A B}", "/${A:-x}"])
def test_a_brace_without_a_name_is_a_mistake(mistakes_of, text):
    assert mistakes_of(FILES.replace("one.mp4", f'"{text}"'), {"A": "x"}) == [
        "cameras.0.url: holds a ${ that begins no ${NAME}; as plain text it is written $${"
    ]


def test_a_variable_that_is_not_set_is_a_mistake_with_its_path(mistakes_of):
    assert mistakes_of(LEAST) == ["cameras.0.url: the environment variable CAMERA_PASSWORD is not set"]


# Mistakes.


def test_all_mistakes_are_told_at_once_each_with_its_path(mistakes_of):
    text = """
    stream: 12
    cameras:
      - {name: entrance, url: a.mp4, transport: tpc}
      - {name: entrance, url: b.mp4}
      - {name: a b, url: ""}
      - {nane: c}
      - 5
    detector: {size: 100, threshold: .nan, model: ""}
    tracker: [bytetrack]
    selector: {retry_s: .inf}
    publish: {endpoint: "udp://127.0.0.1:5556", wait_for: -1}
    galery: here
    """

    assert mistakes_of(text, {"STREAMER__DETEKTOR__SIZE": "1"}) == [
        "STREAMER__DETEKTOR__SIZE: unknown key; did you mean detector?",
        "cameras.1.name: cameras.0 has this name too",
        "stream: should be text; what looks like a number, a date or a yes needs quotes",
        "cameras.0.transport: should be 'tcp' or 'udp'",
        "cameras.2.name: should be 1 to 64 letters, digits, - and _",
        "cameras.2.url: is empty",
        "cameras.3.name: is missing",
        "cameras.3.url: is missing",
        "cameras.3.nane: unknown key; did you mean name?",
        "cameras.4: should be a section: `key: value` lines, indented",
        "detector.model: is empty",
        "detector.size: should be a multiple of 32",
        "detector.threshold: should be a finite number",
        "tracker: should be a section: `key: value` lines, indented",
        "selector.retry_s: should be a finite number",
        "publish.endpoint: should be tcp://ADDRESS:PORT or ipc://PATH",
        "publish.wait_for: should be greater than or equal to 0",
        "galery: unknown key; did you mean gallery?",
    ]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "cameras: is missing"),
        ("cameras:", "cameras: should be a list: each entry begins with -"),
        ("cameras: []", "cameras: should have at least one entry"),
        ("cameras: 5", "cameras: should be a list: each entry begins with -"),
        ("cameras: {name: a}", "cameras: should be a list: each entry begins with -"),
        ("cameras: [{url: 1}]", "cameras.0.name: is missing"),
        ("- a", "FILE: should hold settings, one `key: value` a line"),
        ("just words", "FILE: should hold settings, one `key: value` a line"),
        ("cameras: [", "FILE: line 1, column 11: expected the node content, but found '<stream end>'"),
        ("a: 1\n b: 2", "FILE: line 2, column 3: mapping values are not allowed here"),
        ("a: *b", "FILE: line 1, column 4: found undefined alias 'b'"),
        ("a: 2024-13-45", "FILE: holds a date or a number that does not exist"),
        ("a: !!python/object:os.system {}", "FILE: line 1, column 4: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "FILE: line 2, column 1: but found another document"),
        ("a: \x01", "FILE: character 4: special characters are not allowed"),
        ("? [a]\n: 1", "FILE: line 1, column 3: found unhashable key"),
        ("[" * 500, "FILE: is nested too deeply"),
        ("detector: &a\n  model: *a", "detector.model.model.model"),
        ("&a {<<: *a}", "cameras: is missing"),
        (FILES + "stream: a\nstream: b", "FILE: line 6, column 1: stream is there twice"),
        (FILES.replace("one,", "one, name: x,"), "FILE: line 3, column 17: name is there twice"),
        (FILES + "1: 2", "1: unknown key"),
    ],
)
def test_a_file_that_is_no_config_is_told_in_a_line(mistakes_of, text, mistake):
    assert mistakes_of(text)[0].startswith(mistake)


def test_a_file_that_cannot_be_read_is_told_in_a_line(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("stream: Möller".encode("latin-1"))

    for path, mistake in [
        (tmp_path / "none.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (latin, "is no text in UTF-8"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(path, {})
        assert caught.value.mistakes == (f"{path}: {mistake}",)


@pytest.mark.parametrize(
    "url", ["rtsp://10.0.0.7:8554/a", "RTSPS://[fe80::1]/a", "udp://239.0.0.1:1234", "./odd:name.mp4"]
)
def test_addresses_and_paths_that_can_be_opened_are_taken(load, url):
    assert the_url(load(FILES.replace("one.mp4", f'"{url}"'))).endswith(url.removeprefix("./"))


@pytest.mark.parametrize(
    "url",
    [
        "rstp://10.0.0.7/a",
        "rtsp:/10.0.0.7/a",
        "rtsp://",
        "rtsp:///a",
        "rtsp://h:x/a",
        "rtsp://h:0/a",
        "file:///a",
        "u:p@h/a",
    ],
)
def test_an_address_that_can_never_be_opened_is_a_mistake(mistakes_of, url):
    (mistake,) = mistakes_of(FILES.replace("one.mp4", f'"{url}"'))

    assert mistake.startswith("cameras.0.url: ")


# Endpoints.


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://127.0.0.1:5556", "tcp://127.9.9.9:1", "tcp://localhost:*", "tcp://[::1]:5556", "ipc:///run/streamer"],
)
def test_an_endpoint_that_stays_on_this_box_needs_no_leave(load, endpoint):
    assert load(FILES + f'publish: {{endpoint: "{endpoint}"}}').publish.endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:5556", "tcp://*:5556", "tcp://10.0.0.7:5556", "tcp://[::]:5556", "tcp://eth0:5556"]
)
def test_an_endpoint_that_others_can_reach_needs_leave(load, mistakes_of, endpoint):
    text = FILES + f'publish: {{endpoint: "{endpoint}"}}'

    assert mistakes_of(text) == [
        "publish.endpoint: can be reached from the network, where faces would cross in clear; set publish.insecure"
    ]
    assert load(text.replace("{endpoint", "{insecure: true, endpoint")).publish.endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint", ["", "5556", "tcp://127.0.0.1", "tcp://127.0.0.1:65536", "tcp://:5556", "ipc://", "inproc://x"]
)
def test_what_is_no_endpoint_is_a_mistake(mistakes_of, endpoint):
    assert mistakes_of(FILES + f'publish: {{endpoint: "{endpoint}", insecure: true}}') == [
        "publish.endpoint: should be tcp://ADDRESS:PORT or ipc://PATH"
    ]


# Secrets.


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://user:hunter2@10.0.0.7:554/a", "rtsp://***@10.0.0.7:554/a"),
        ("rtsp://hunter2@10.0.0.7/a", "rtsp://***@10.0.0.7/a"),
        ("rtsp://user:hun/ter2@hunter2@10.0.0.7/a", "rtsp://***@10.0.0.7/a"),
        ("http://10.0.0.7/a?user=x&pwd=hunter2", "http://10.0.0.7/a?***"),
        ("rtsp://10.0.0.7/user=x_password=hunter2_channel=1/b", "rtsp://10.0.0.7/user=x_password=***/b"),
        ("user:hunter2@10.0.0.7/a", "***@10.0.0.7/a"),
        ("/videos/cam@7.mp4", "/videos/cam@7.mp4"),
    ],
)
def test_an_address_shows_no_secret_but_tells_which_it_is(url, shown):
    secret = SecretUrl(url)

    assert str(secret) == f"{secret}" == shown
    assert repr(secret) == f"SecretUrl('{shown}')"
    assert secret.get_secret_value() == url


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://user:hunter2@10.0.0.7:port/a",
        "rtsp://user:hunter2/@10.0.0.7/a",
        "rtsp://user:hunter2#@10.0.0.7/a",
        "rstp://user:hunter2@10.0.0.7/a",
        "user:hunter2@10.0.0.7/a",
        "rtsp://[hunter2/a",
        "rtsp://user:hunter2${@10.0.0.7/a",
        "rtsp://user:hunter2${NOPE}@10.0.0.7/a",
    ],
)
@pytest.mark.parametrize("origin", ["file", "variable", "placeholder"])
def test_a_mistake_does_not_tell_what_was_in_an_address(mistakes_of, url, origin):
    environ = (
        {"STREAMER__CAMERAS__0__URL": url} if origin == "variable" else {"URL": url} if origin == "placeholder" else {}
    )
    text = FILES.replace("one.mp4", {"file": f'"{url}"', "variable": "one.mp4", "placeholder": '"${URL}"'}[origin])
    text = text.replace("two.mp4", "[]")  # so that there is a mistake whatever the url

    mistakes = mistakes_of(text, environ)

    assert not any("hunter2" in mistake for mistake in mistakes)


def test_an_address_in_the_place_of_a_key_tells_no_secret(mistakes_of):
    line = "rtsp://user:hunter2@10.0.0.7/a: entrance\n"

    assert mistakes_of(FILES + line + line) == [
        "FILE: line 6, column 1: rtsp://***@10.0.0.7/a is there twice",
        "rtsp://***@10.0.0.7/a: unknown key",
    ]


def test_a_whole_config_shows_no_secret(load):
    config = load(LEAST, {"CAMERA_PASSWORD": "hunter2"})

    assert "hunter2" not in f"{config} {config!r} {config.model_dump()} {config.cameras[0]}"
