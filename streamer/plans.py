"""What `streamer engines` does: builds the plans of a config's networks, lists them, proves them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from engines.compile import Request, make, told
from engines.engine import EngineError
from engines.load import Backend, Precision, make_compiler, make_request, prove
from engines.plan import Compiler, Kept, PlanStore, Record
from streamer.assembly import Wanted

Say = Callable[[str], None]


class PlanError(ValueError):
    """No plan can be made here, or one that was named is not to be had. The message is one line."""


def requests(
    networks: Sequence[Wanted], *, backend: Backend, precision: Precision, threads: int, portable: bool = False
) -> list[Request]:
    """Return the plans that these networks want here. Raises PlanError where nothing here makes plans."""
    compiler = _compiler(backend, portable)
    return [
        make_request(each.model, compiler, each.proof, precision=precision, threads=threads, max_batch=each.max_batch)
        for each in networks
        if each.proof is not None
    ]


def compile_plans(
    wishes: Sequence[Request], store: PlanStore, say: Say, tell: Callable[[str, str, float], None]
) -> bool:
    """Build what is missing; say what came of each, and tell how far it is. Return whether every network has a plan, or
    is better off without. Raises EngineError."""
    whole = True
    for wish in wishes:
        name, key = wish.model.card.name, wish.key
        kept = store.find(key)
        if kept and kept.record.precision:
            say(f"{name}: there is one already: {told(kept.record)[-1]}")
            continue
        store.remove(key)  # what failed is tried anew
        record = make(wish, store, lambda what, share, name=name: tell(name, what, share))  # type: ignore[misc]
        for line in told(record):
            say(line)
        whole &= bool(record.precision)
    return whole


def add_plans(wishes: Sequence[Request], carried: PlanStore, store: PlanStore, say: Say) -> bool:
    """Take over plans that `compile --portable` made elsewhere, for these networks, each after it is proven here.

    Return whether all passed. Raises PlanError where none is for these networks.
    """
    brought = _carried(carried)
    found = [(wish, [kept for kept in brought if kept.record.sha256 == wish.model.sha256]) for wish in wishes]
    if not any(choices for _, choices in found):
        names = ", ".join(wish.model.card.name for wish in wishes)
        raise PlanError(f"{carried.folder} holds no plan for {names}")
    whole = True
    for wish, choices in found:
        passed = not choices
        for kept in choices:
            record = make(wish, store, lambda what, share: None, given=kept)
            for line in told(record):
                say(line)
            passed |= bool(record.precision)
        whole &= passed
    return whole


def check_plans(wishes: Sequence[Request], store: PlanStore, say: Say) -> bool:
    """Prove the plans anew; one that fails is removed. Return whether none failed. Raises EngineError."""
    whole = True
    for wish in wishes:
        name, kept = wish.model.card.name, store.find(wish.key)
        if kept is None:
            say(f"{name}: no plan yet; `streamer engines compile` makes it")
        elif not kept.record.precision:
            say(told(kept.record)[-1])
        elif refused := prove(wish, kept):  # what cannot even be compared is raised, and the plan stays
            store.remove(wish.key)
            say(f"{name}: the plan {kept.record.key[:12]} fails and is removed: {refused}")
            whole = False
        else:
            say(f"{name}: the plan {kept.record.key[:12]} ({kept.record.backend}, {kept.record.precision}) passes")
    return whole


def lines(records: Sequence[Record]) -> Iterator[str]:
    """Return a line for each plan."""
    for record in records:
        chosen = record.chosen
        known = "nothing passed" if chosen is None else f"{chosen.worst:.4g} {chosen.unit} at worst"
        known += "" if chosen is None or record.pays else "; ONNX Runtime is the faster"
        pace = (
            ""
            if chosen is None or chosen.ms is None
            else f", {chosen.ms:.1f} ms (ONNX Runtime {record.reference_ms:.1f})"
        )
        yield (
            f"{record.network:16} {record.backend:14} {record.precision or '-':5} {record.key[:12]}  "
            f"{record.built_at}  {known}{pace}"
        )


def _compiler(backend: Backend, portable: bool) -> Compiler:
    if portable and backend not in ("auto", "tensorrt"):
        raise PlanError(f"engine.backend: {backend} makes no portable plans; tensorrt does")
    backend = "tensorrt" if portable else backend
    try:
        compiler = make_compiler(backend, portable=portable)
        if compiler is not None:
            compiler.facts()
    except EngineError as exc:
        raise PlanError(str(exc)) from exc
    if compiler is None:
        raise PlanError(
            "nothing here makes plans: pip install 'streamer[openvino]' for a processor, `make gpu` for an NVIDIA GPU"
        )
    return compiler


def _carried(store: PlanStore) -> list[Kept]:
    found = (store.find(key, discard=False) for key in store.held())
    return [kept for kept in found if kept and kept.record.precision]
