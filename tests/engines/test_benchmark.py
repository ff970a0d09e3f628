import json
import sys

import pytest

from engines.benchmark import input_size, main, measure
from engines.store import Model


def test_a_restorer_that_enlarges_is_given_an_input_smaller_by_its_scale(card):
    assert input_size(card, (208, 176)) == (208, 176)
    assert input_size(card.model_copy(update={"scales": (4,)}), (208, 176)) == (52, 44)


def test_an_input_is_padded_to_the_networks_multiple(card):
    sized = card.model_copy(update={"scales": (4, 2, 1), "enlarge": "cubic", "size_multiple": 16})

    assert input_size(sized, (200, 176)) == (208, 176)


def test_every_network_is_timed_on_every_backend_at_every_batch_size(card, make_network):
    models = [Model.read(make_network(f"{name}.onnx", card.model_copy(update={"name": name}))) for name in ("a", "b")]

    timings = measure(models, (32, 24), [1, 3], threads=1, rounds=2)

    told = {(timing.network, timing.backend, timing.batch) for timing in timings}
    assert {(name, "onnxruntime-cpu", batch) for name in ("a", "b") for batch in (1, 3)} <= told
    for timing in timings:
        assert timing.items_per_second * timing.ms_per_item == pytest.approx(1000)
        assert (timing.height, timing.width) == (32, 24)


def test_a_network_made_for_one_image_is_timed_at_one(card, make_network):
    shape = (1, 3, 16, 16)
    fixed = card.model_copy(update={"inputs": (card.inputs[0].model_copy(update={"shape": shape}),)})

    timings = measure([Model.read(make_network("one.onnx", fixed, shape))], (64, 64), [1, 8], threads=1, rounds=1)

    assert {(timing.batch, timing.height, timing.width) for timing in timings} == {(1, 16, 16)}


def test_the_last_line_is_json(card, make_network, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", str(make_network(card=card)), "--size", "16x16", "--rounds", "1"])

    main()

    timings = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {timing["network"] for timing in timings} == {"tiny"}


@pytest.mark.parametrize("wrong", [["--size", "16"], ["--batches", "1,x"], ["--rounds", "0"]])
def test_numbers_that_are_none_are_one_line_and_exit_code_2(card, make_network, monkeypatch, capsys, wrong):
    monkeypatch.setattr(sys, "argv", ["benchmark", str(make_network(card=card)), *wrong])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_network_that_is_not_there_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["benchmark", str(tmp_path / "none.onnx")])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
