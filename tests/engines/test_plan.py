"""Plans are executable code: what is not ours, not whole or not proven is never loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.card import NetworkCard
from engines.engine import EngineError
from engines.plan import Attempt, Bucket, PlanStore, Record, plan_key
from engines.store import Model

FACTS = {"openvino": "1", "processor": "a", "driver": "2"}
BUCKET = Bucket({"image": ((1, 3, 32, 32), (8, 3, 64, 64), (8, 3, 128, 128))})
PLAN = b"a plan" * 100


@pytest.fixture
def model(make_network: Callable[..., Path], card: NetworkCard) -> Model:
    return Model.read(make_network(card=card))


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path / "plans")


def record(key: str, plan: bytes = PLAN, **changes: object) -> Record:
    given = {
        "key": key, "network": "tiny", "sha256": "0" * 64, "backend": "openvino-cpu", "precision": "fp32",
        "facts": FACTS, "plan_sha256": hashlib.sha256(plan).hexdigest(), "built_at": "2026-11-22T00:00:00+00:00",
        "build_s": 1.0, "attempts": (Attempt(precision="fp32", worst=99.0, unit="dB", cases=4, ms=1.0),),
    }  # fmt: skip
    return Record.model_validate({**given, **changes})


def kept(store: PlanStore, key: str = "a" * 64, **changes: object) -> Path:
    with store.building(key):
        store.keep(record(key, **changes), PLAN)
    return store.folder / key


# The key


def test_a_key_is_the_same_for_the_same_and_another_for_whatever_a_plan_depends_on(model: Model) -> None:
    def key_of(
        model: Model = model, backend: str = "openvino-cpu", facts: dict[str, str] = FACTS, **changes: object
    ) -> str:
        given = {"buckets": [BUCKET], "wish": "auto", "max_batch": 8, **changes}
        return plan_key(model, backend, facts, **given)

    key = key_of()
    wider = Bucket({"image": (*BUCKET.shapes["image"][:2], (8, 3, 256, 256))})
    other_card = model.card.model_copy(update={"exporter": "2"})

    assert key == key_of(facts=dict(reversed(FACTS.items())))
    others = [
        key_of(Model(model.path, "f" * 64, model.card)),
        key_of(Model(model.path, model.sha256, other_card)),
        key_of(backend="tensorrt"),
        key_of(buckets=[wider]),
        key_of(buckets=[]),
        key_of(wish="fp32"),
        key_of(max_batch=64),
        *(key_of(facts=FACTS | {name: "x"}) for name in FACTS),
    ]
    assert len({key, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("shape", "inside"),
    [((1, 3, 32, 32), True), ((8, 3, 128, 64), True), ((9, 3, 64, 64), False), ((1, 3, 31, 64), False),
     ((1, 3, 64, 129), False), ((3, 64, 64), False)],
)  # fmt: skip
def test_a_bucket_holds_what_lies_between_its_smallest_and_its_largest(shape: tuple[int, ...], inside: bool) -> None:
    assert BUCKET.holds({"image": shape}) is inside


# The store


def test_what_is_kept_is_found_again_in_a_folder_that_only_its_owner_can_read(store: PlanStore) -> None:
    place = kept(store)

    found = store.find("a" * 64)

    assert found is not None and found.plan == PLAN and found.record == record("a" * 64)
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in place.iterdir()) == ["plan", "record.json"]
    assert store.records() == [found.record]
    store.remove("a" * 64)
    assert store.find("a" * 64) is None and store.records() == []


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        (place / name).write_bytes(change((place / name).read_bytes()))

    return damage


def other(**changes: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        edit("plan", lambda content: content[:-1]),
        edit("plan", lambda content: b"b" + content[1:]),
        edit("plan", lambda content: b""),
        edit("record.json", lambda content: content[:-20]),
        edit("record.json", lambda content: b"\xff\xfe"),
        edit("record.json", other(key="b" * 64)),
        edit("record.json", other(plan_sha256="0" * 64)),
        edit("record.json", other(attempts=[])),
        edit("record.json", other(attempts=[{"precision": "fp32", "refused": "it is wrong"}])),
        edit("record.json", other(surprise=1)),
        lambda place: (place / "record.json").unlink(),
        lambda place: (place / "plan").unlink(),
    ],
    ids=["cut", "foreign", "empty", "half a record", "no text", "another's", "another hash", "never tried", "failed",
         "unknown field", "no record", "no plan"],
)  # fmt: skip
def test_a_plan_that_is_damaged_foreign_or_unproven_is_removed_with_a_warning(
    store: PlanStore, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    place = kept(store)
    damage(place)

    assert store.find("a" * 64) is None

    assert not place.exists()
    assert "is not loaded" in caplog.text


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_not_trusted(
    store: PlanStore, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    place = kept(store)
    store.folder.chmod(mode)

    assert store.find("a" * 64) is None
    assert "can be written to by others" in caplog.text
    assert place.exists()  # it is the operator's to say whose it is
    with pytest.raises(EngineError, match="can be written to by others"), store.building("a" * 64):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_trusted(store: PlanStore, caplog: pytest.LogCaptureFixture) -> None:
    kept(store)
    os.chown(store.folder, 12345, 12345)

    assert store.find("a" * 64) is None
    assert "belongs to another user" in caplog.text


def test_a_store_that_cannot_be_made_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = PlanStore(tmp_path / "file" / "plans")

    with pytest.raises(EngineError, match=r"plans: Not a directory"), store.building("a" * 64):
        pass
    assert store.find("a" * 64) is None


def test_a_new_plan_takes_the_place_of_the_old_and_leavings_of_a_killed_build_go(store: PlanStore) -> None:
    kept(store)
    left = store.folder / f".{'a' * 64}.new"
    left.mkdir()
    (left / "plan").write_bytes(b"half")

    kept(store, built_at="2027-01-01T00:00:00+00:00")

    found = store.find("a" * 64)
    assert found is not None and found.record.built_at.startswith("2027")
    assert not left.exists()


def test_a_record_without_a_plan_is_kept_and_does_not_pay(store: PlanStore) -> None:
    kept(store, precision="")

    found = store.find("a" * 64)

    assert found is not None and found.plan == b"" and found.record.chosen is None and not found.record.pays


@pytest.mark.parametrize(("raced", "reference_ms", "pays"), [(True, 0.9, False), (True, 1.1, True), (False, 0.9, True)])
def test_a_plan_on_the_processor_pays_where_onnx_runtime_is_not_the_faster(
    raced: bool, reference_ms: float, pays: bool
) -> None:
    assert record("a" * 64, raced=raced, reference_ms=reference_ms).pays is pays


def test_what_is_no_plan_of_ours_is_never_touched(store: PlanStore) -> None:
    kept(store)
    (store.folder / "docs").mkdir()
    (store.folder / "docs" / "thesis.md").write_text("years of work")
    (store.folder / ("b" * 64)).mkdir()

    assert [each.key for each in store.records()] == ["a" * 64]
    assert store.find("b" * 64, discard=False) is None

    assert (store.folder / "docs" / "thesis.md").exists()
