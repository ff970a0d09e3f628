from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from engines.card import CardError, Int8, NetworkCard, card_for_family, file_sha256, known_cards, read_card
from engines.fetch import CENTERFACE

MODELS = Path(__file__).parents[2] / "../shared/models"
needs_models = pytest.mark.skipif(not MODELS.is_dir(), reason="needs foreign weights in ../shared/models")


def test_the_card_in_the_file_comes_back_as_it_was_written(
    make_network: Callable[..., Path], card: NetworkCard
) -> None:
    assert read_card(make_network(card=card)) == card


@pytest.mark.parametrize("name", ["tiny.json", "tiny.onnx.json"])
def test_a_card_may_lie_beside_the_file(make_network: Callable[..., Path], card: NetworkCard, name: str) -> None:
    path = make_network()
    path.with_name(name).write_text(card.model_dump_json())

    assert read_card(path) == card


def test_without_a_card_the_error_says_what_to_do(make_network: Callable[..., Path]) -> None:
    path = make_network()

    with pytest.raises(CardError, match=r"tiny\.onnx has no card.*tiny\.json.*detector\.family") as raised:
        read_card(path)
    assert "\n" not in str(raised.value)


def test_a_wrong_card_is_named_with_all_its_mistakes(make_network: Callable[..., Path]) -> None:
    path = make_network()
    path.with_suffix(".json").write_text('{"name": "x", "task": "singing", "inputs": [], "outputs": []}')

    with pytest.raises(CardError, match=r"tiny\.json is wrong: task: .*; license: .*") as raised:
        read_card(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"not a network\n" * 9, b"", b"\xff\xfe\x00binary"])
def test_a_file_that_is_no_network_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)

    with pytest.raises(CardError, match=r"x\.onnx is not an ONNX network") as raised:
        read_card(path)
    assert "\n" not in str(raised.value)


def test_a_truncated_network_is_refused(make_network: Callable[..., Path], card: NetworkCard) -> None:
    path = make_network(card=card)
    path.write_bytes(path.read_bytes()[:-40])

    with pytest.raises(CardError, match="damaged"):
        read_card(path)


def test_a_card_must_name_the_inputs_of_its_network(make_network: Callable[..., Path], card: NetworkCard) -> None:
    other = card.inputs[0].model_copy(update={"name": "picture"})

    with pytest.raises(CardError, match="takes image; its card says picture"):
        read_card(make_network(card=card.model_copy(update={"inputs": (other,)})))


def test_a_card_must_not_promise_an_output_that_is_not_there(
    make_network: Callable[..., Path], card: NetworkCard
) -> None:
    promised = card.outputs[0].model_copy(update={"name": "age"})

    with pytest.raises(CardError, match="gives mean, result; its card says also age"):
        read_card(make_network(card=card.model_copy(update={"outputs": (*card.outputs, promised)})))


@pytest.mark.parametrize("change", [{"dtype": "uint8"}, {"shape": ("n", 3, "h"), "layout": "NCH"}])
def test_a_card_must_have_the_dtypes_and_ranks_of_its_network(
    make_network: Callable[..., Path], card: NetworkCard, change: dict[str, object]
) -> None:
    changed = card.inputs[0].model_copy(update=change)

    with pytest.raises(CardError, match=r"image .*; its card says"):
        read_card(make_network(card=card.model_copy(update={"inputs": (changed,)})))


def test_a_card_must_not_call_free_what_its_network_fixes(make_network: Callable[..., Path], card: NetworkCard) -> None:
    with pytest.raises(CardError, match=r'image has shape \[1, 3, 32, 32\]; its card says \["n", 3, "h", "w"\]'):
        read_card(make_network(card=card, shape=(1, 3, 32, 32)))


def test_a_family_stands_in_for_the_card_of_a_detector(make_network: Callable[..., Path]) -> None:
    path = make_network("det_10g.onnx", shape=(1, 3, "h", "w"), weights_as_inputs=True)

    card = read_card(path, family="scrfd")

    assert card == card_for_family("scrfd", path)
    assert (card.task, card.family, card.name) == ("detection", "scrfd", "det_10g")
    assert [(spec.name, spec.shape) for spec in card.inputs] == [("image", (1, 3, "h", "w"))]
    assert [spec.name for spec in card.outputs] == ["result", "mean"]
    assert (card.color, card.mean, card.std) == ("RGB", (127.5,) * 3, (128.0,) * 3)
    assert (card.threshold, card.weak_threshold) == (0.5, 0.4)


def test_a_family_does_not_overrule_a_card(make_network: Callable[..., Path], card: NetworkCard) -> None:
    with pytest.raises(CardError, match="is of the family none, says its card; asked for is yunet"):
        read_card(make_network(card=card), family="yunet")


def test_the_known_detectors_have_thresholds_and_the_embedders_a_template() -> None:
    cards = known_cards().values()

    for card in cards:
        assert all(len(spec.layout) == len(spec.shape) for spec in (*card.inputs, *card.outputs))
        assert (card.threshold is not None) == (card.weak_threshold is not None) == (card.task == "detection")
        if card.task == "embedding":
            assert card.alignment
            assert card.alignment_size
            assert card.embedding_dim
            assert all(0 < value < card.alignment_size for point in card.alignment for value in point)
    assert {"centerface", "scrfd", "yunet"} <= {card.family for card in cards}
    assert known_cards()[CENTERFACE.sha256].threshold == 0.5


@needs_models
@pytest.mark.parametrize(
    "name",
    [
        "face-reidentification-retail-0095",
        "face_detection_yunet_2023mar",
        "offlineid_mobilefacenet_int8",
        "RealESRGAN_General_x4_v3",
        "scrfd_2.5g_kps",
        "scrfd_500m_kps",
        "yunet_n_dynamic",
    ],
)
def test_a_known_foreign_network_is_recognised_by_its_hash_whatever_its_name(tmp_path: Path, name: str) -> None:
    renamed = tmp_path / "renamed.onnx"
    renamed.symlink_to((MODELS / f"{name}.onnx").resolve())

    assert read_card(renamed).name == name
    assert read_card(renamed) is known_cards()[file_sha256(renamed)]


@needs_models
def test_a_known_network_that_was_changed_is_not_known(tmp_path: Path) -> None:
    network = onnx.load(MODELS / "yunet_n_dynamic.onnx")
    network.doc_string = "changed"
    onnx.save(network, tmp_path / "yunet_n_dynamic.onnx")

    with pytest.raises(CardError, match="has no card"):
        read_card(tmp_path / "yunet_n_dynamic.onnx")


def test_a_card_holds_the_ranges_of_int8_and_what_they_cost(
    make_network: Callable[..., Path], card: NetworkCard
) -> None:
    record = Int8(ranges={"image": (-1, 1)}, skip=("result",), faces=60, lost_db=0.01, lost_identity=0.001, psnr=50.3)
    stated = card.model_copy(update={"int8": record})

    assert read_card(make_network(card=stated)).int8 == record


def test_the_ranges_of_a_known_card_come_with_what_was_counted() -> None:
    for known in known_cards().values():
        if record := known.int8:
            assert all(low <= 0 <= high for low, high in record.ranges.values())
            if known.task == "detection":
                assert record.boxes
                assert record.lost_boxes == 0
