"""The command line: parses, calls, sets the exit code."""

from __future__ import annotations

import json
import logging
import os
import pwd
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from engines.card import CardError
from engines.compile import Request
from engines.engine import EngineError, ModelError
from engines.load import Plans, default_plans, on_gpu
from engines.plan import PlanStore
from engines.store import ModelStore, default_store
from streamer import __version__, calibrate, enrolment, explain, photos, plans, vault, watchlist
from streamer.assembly import (
    Networks,
    load_restorers,
    load_stages,
    make_cameras,
    make_pipeline,
    make_router,
    threads_for,
    wanted,
)
from streamer.audit import AuditError
from streamer.bench import bench
from streamer.buckets import plan_buckets, plan_lines, read_histogram
from streamer.calibration import CalibrationError
from streamer.camera import Camera, CameraError
from streamer.client import EventSubscriber, SubscribeError
from streamer.config import ConfigError, RestorerConfig, StreamerConfig, load_config
from streamer.evidence import EvidenceError
from streamer.gallery import GalleryError
from streamer.listen import describe, readable, save_side_by_side, to_json_line
from streamer.metrics import Metrics
from streamer.pipeline import Stages
from streamer.publisher import PublishError
from streamer.router import RouteError

logger = logging.getLogger(__name__)

DONE, FAILED, WRONG_INPUT = 0, 1, 2
_NO_CAMERA = [{"name": "none", "url": "rtsp://127.0.0.1/"}]
"""For what needs a config's defaults and opens no source."""
_INTERRUPTED = 130
"""What Typer makes of a Ctrl-C."""
WRONG = (
    ConfigError, CameraError, CardError, ModelError, PublishError, SubscribeError, photos.PhotoError, plans.PlanError,
    enrolment.EnrolmentError, vault.VaultError, GalleryError, AuditError, CalibrationError, RouteError,
    explain.ExplainError, EvidenceError,
)  # fmt: skip
"""What the user can mend: exit code 2."""

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode=None)
engines_app = typer.Typer(help="Plans: networks compiled and proven for this machine.", rich_markup_mode=None)
app.add_typer(engines_app, name="engines")
models_app = typer.Typer(help="The networks: which there are, fetching one, its card.", rich_markup_mode=None)
app.add_typer(models_app, name="models")
gallery_app = typer.Typer(help="Who is enrolled: listing, removing, checking, taking elsewhere.", rich_markup_mode=None)
app.add_typer(gallery_app, name="gallery")
watchlist_app = typer.Typer(help="Watch lists: why persons are looked for, and until when.", rich_markup_mode=None)
app.add_typer(watchlist_app, name="watchlist")
keys_app = typer.Typer(help="Keys.", rich_markup_mode=None)
app.add_typer(keys_app, name="keys")
audit_app = typer.Typer(help="The log of what was done to a gallery.", rich_markup_mode=None)
app.add_typer(audit_app, name="audit")


class LogLevel(StrEnum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The config file.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never download, never build.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print for programs.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 1 failed while running, 2 the input is wrong."""
    try:
        code = app(arguments, prog_name="streamer", standalone_mode=False)
    except typer.TyperException as exc:
        code = _refuse(exc.format_message())
    except WRONG as exc:
        code = _refuse(str(exc))
    except EngineError as exc:
        code = _refuse(str(exc), FAILED)
    sys.exit(_refuse("interrupted", FAILED) if code == _INTERRUPTED else code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"streamer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    log_level: Annotated[LogLevel, typer.Option("--log-level", help="How much is logged.")] = LogLevel.info,
) -> None:
    """Restore faces in surveillance video, recognise them honestly, publish both."""
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)sZ %(levelname)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )  # fmt: skip


@app.command()
def run(
    config: ConfigArgument,
    duration: Annotated[float | None, typer.Option(metavar="SECONDS", min=0, help="End after this time.")] = None,
    offline: OfflineOption = False,
) -> int:
    """Run the main job: cameras in, events out, until the files end or a SIGTERM."""
    settings = load_config(config)
    if settings.publish.insecure:
        logger.warning("publish.insecure: whoever reaches %s sees the faces, in clear", settings.publish.endpoint)
    stop = threading.Event()

    def give_up() -> None:
        stop.set()  # an exit raised within a library's callback can be lost: the pipeline looks at this
        sys.exit(DONE)

    _on_signals(give_up)
    cameras = make_cameras(settings, stop)
    _inspect([camera for camera in cameras if not camera.live])
    stages = _load(settings, offline, build=True)
    with closing(stages):
        metrics = Metrics()
        pipeline = make_pipeline(settings, cameras, stages, metrics=metrics, stop=stop)
        _on_signals(stop.set)
        started = time.monotonic()
        pipeline.run(duration)
    for line in _details(metrics):
        logger.info(line)
    print(_summary(metrics, time.monotonic() - started), flush=True)
    return FAILED if any(camera.broken for camera in cameras) else DONE


@app.command()
def check(config: ConfigArgument, offline: OfflineOption = False) -> int:
    """Validate the config, open each source, load every network, and say what a run would do."""
    settings = load_config(config)
    stages, mistakes = None, []
    try:
        stages = _load(settings, offline, build=False)
    except WRONG as exc:
        mistakes.append(str(exc))
    try:
        _inspect(make_cameras(settings, threading.Event()), tell=True)
    except CameraError as exc:
        mistakes.append(str(exc))
    if stages is None or mistakes:
        return _refuse("\n".join(mistakes))
    for engine in stages.engines.values():
        print(f"{engine.card.task}: {engine.card.name} on {engine.backend} in {engine.precision}")
    if stages.embedder is None:
        print("embedding: none configured; events carry no scores")
    elif stages.search is None:
        print("gallery: none configured; nobody is looked for")
    else:
        print(f"gallery: {settings.gallery.folder}: {stages.search.enrolment.told()}")
    stages.close()
    print(f"publishes to {settings.publish.endpoint}")
    return DONE


@app.command()
def listen(
    endpoint: Annotated[str, typer.Argument(metavar="[ENDPOINT]", help="Where a streamer publishes.")] = (
        "tcp://127.0.0.1:5556"
    ),
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write crop and restoration side by side.")] = None,
    as_json: JsonOption = False,
    limit: Annotated[int | None, typer.Option(min=1, help="End after this many events.")] = None,
) -> int:
    """Print the events of a streamer until it ends, or until Ctrl-C."""
    if save is not None:
        _make_folder("--save", save)
    with suppress(KeyboardInterrupt), EventSubscriber(endpoint) as events:
        for number, event in enumerate(readable(events), start=1):
            print(to_json_line(event) if as_json else describe(event), flush=True)
            if save is not None and event.images:
                try:
                    save_side_by_side(event, save)
                except OSError as exc:
                    return _refuse(f"--save {save}: {exc.strerror}", FAILED)
            if number == limit:
                break
    return DONE


@app.command()
def restore(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Photos or face crops, files or folders.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")],
    restorer: Annotated[str | None, typer.Option(metavar="NAME", help="Which; by default the route decides.")] = None,
    guide: Annotated[
        list[Path] | None, typer.Option(metavar="PHOTO", help="A photo of the same person; may be given several times.")
    ] = None,
    fuse: Annotated[bool, typer.Option("--fuse", help="All guides at once, not the one of the nearest pose.")] = False,
    parts: Annotated[bool, typer.Option("--parts", help="Write what the guide did as a picture too.")] = False,
    crops: Annotated[bool, typer.Option("--crops", help="Each image is the face crop itself.")] = False,
    detector: Annotated[str, typer.Option(metavar="MODEL", help="What finds the faces.")] = "centerface",
    max_size: Annotated[int, typer.Option(min=16, help="Longest side of a restored face.")] = 256,
    offline: OfflineOption = False,
) -> int:
    """Restore the faces of photos, or face crops."""
    if (fuse or parts) and not guide:
        raise photos.PhotoError(f"--{'fuse' if fuse else 'parts'} wants a --guide")
    paths = photos.gather(inputs)
    photos.refuse_overwriting([*paths, *(guide or [])], out, crops=crops)
    # a plan for a GPU has the sizes of a run; here a network that is named runs at any
    plans_here = Plans(default_plans(), build=False)
    networks = Networks(_store(offline), plans=None if on_gpu("auto") else plans_here)
    finder = None if crops else networks.detector(detector)
    if guide:
        # of one size wherever it runs
        guided = Networks(_store(offline), plans=plans_here).guided_restorer(restorer or "gfrnet")
        guides = photos.read_guides(guide, finder)
        stages = photos.PhotoStages(finder, None, None, photos.Guiding(guided, guides, fuse=fuse, parts=parts))
    else:
        chosen = networks.restorer(restorer or "sgen-small", max_size=max_size)
        router = make_router(chosen, max_size=max_size) if restorer is None else None
        stages = photos.PhotoStages(finder, router, chosen)
    _make_folder("--out", out)
    failed = False
    for number, path in enumerate(paths, start=1):
        try:
            routes = [photos.restore_crop(path, out, stages)] if crops else photos.restore_photo(path, out, stages)
        except photos.PhotoError as exc:
            failed = True
            _say(str(exc))
            continue
        told = "; ".join(f"{route.restorer} ({route.reason})" for route in routes) or "no face, skipped"
        print(f"{number}/{len(paths)} {path}: {told}", flush=True)
    return WRONG_INPUT if failed else DONE


GalleryOption = Annotated[
    Path | None,
    typer.Option("--gallery", metavar="DIR", envvar="STREAMER_GALLERY", help="Its folder; by default the user's own."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def _id(text: str) -> str:
    """Return an id as it was typed. Raises BadParameter for what can be none."""
    if not re.fullmatch("[0-9a-f]{16}", text):
        raise typer.BadParameter(f"{text!a} is no id: 16 hex digits")
    return text


IdArgument = Annotated[str, typer.Argument(metavar="ID", help="As `streamer gallery list` gives it.", parser=_id)]
PassphraseOption = Annotated[
    Path | None,
    typer.Option("--passphrase-file", metavar="FILE", help="Its first line; by default the passphrase is asked for."),
]
TimeOption = Annotated[
    datetime | None, typer.Option(metavar="TIME", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="In UTC.")
]


@app.command()
def enrol(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Whose photos they are.")] = None,
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="PHOTO...", help="Photos of this person, files or folders.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Instead: a folder that holds one of photos for each person.")
    ] = None,
    gallery: GalleryOption = None,
    watch_list: Annotated[str | None, typer.Option("--list", metavar="LIST", help="Put them on this list.")] = None,
    purpose: Annotated[str | None, typer.Option(metavar="TEXT", help="Of a new list: what it is for.")] = None,
    legal_basis: Annotated[str | None, typer.Option(metavar="TEXT", help="Of a new list: what allows it.")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Of a new list: least similarity of a match.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Enrol what is refused too; it is recorded.")] = False,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Enrol what passes though some is refused.")] = False,
    embedder: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What embeds; by default what the gallery was made with.")
    ] = None,
    detector: Annotated[str, typer.Option(metavar="MODEL", help="What finds the faces.")] = "centerface",
    as_json: JsonOption = False,
    offline: OfflineOption = False,
) -> int:
    """Enrol a person's photos, or those of many persons: all of them, or none where one is refused."""
    people = enrolment.gather(name, inputs or [], folder)
    wish = enrolment.ListWish.of(watch_list, purpose=purpose, legal_basis=legal_basis, threshold=threshold)
    plans_here = Plans(default_plans(), build=False)
    networks = Networks(_store(offline), plans=None if on_gpu("auto") else plans_here)

    def load_gate(model: str) -> enrolment.Gate:
        embeds = networks.embedder(model)
        assert embeds is not None
        return enrolment.Gate(networks.detector(detector), embeds)

    outcome = enrolment.enrol(
        people, gallery or enrolment.default_gallery(), load_gate, who=_operator(), embedder=embedder, wish=wish,
        force=force, keep_going=keep_going, tell=_photo_progress(people),
    )  # fmt: skip
    if outcome.made_key:
        _say(f"made a gallery; its key is {outcome.made_key}: without it the gallery is of no use, so keep a copy")
    for refused in outcome.refused:
        _say(refused.line)
    if outcome.refused and not outcome.enrolled:
        _say("nothing was enrolled")
    if as_json:
        print(json.dumps(outcome.as_json()))
    else:
        for line in outcome.lines():
            print(line)
    return WRONG_INPUT if outcome.refused else DONE


@gallery_app.command("list")
def gallery_list(gallery: GalleryOption = None, as_json: JsonOption = False) -> int:
    """List who is enrolled."""
    with _desk(gallery) as desk:
        identities = desk.gallery.identities()
    if as_json:
        print(json.dumps([enrolment.identity_json(identity) for identity in identities]))
        return DONE
    for identity in identities:
        count = f"{len(identity.photos)} photo{'s' * (len(identity.photos) != 1)}"
        print(f"{identity.id}  {count:>9}  {identity.added_at:%Y-%m-%d}  {identity.name}  {', '.join(identity.lists)}")
    return DONE


@gallery_app.command("show")
def gallery_show(
    identity: IdArgument,
    gallery: GalleryOption = None,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the enrolled crops to this folder.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Show a person's photos: their quality, and what was let through."""
    if save is not None:
        _make_folder("--save", save)
    with _desk(gallery) as desk:
        person = desk.gallery.identity(identity)
        enrolled = [desk.gallery.photo(photo) for photo in person.photos]
    if save is not None:
        for photo in enrolled:
            enrolment.save_photo(photo, save)
    if as_json:
        print(json.dumps(enrolment.identity_json(person, enrolled)))
        return DONE
    lists = ", ".join(person.lists) or "none"
    print(f"{person.id}  {person.name}, enrolled {person.added_at:%Y-%m-%d}; lists: {lists}")
    for photo in enrolled:
        print(enrolment.photo_line(photo))
    return DONE


@gallery_app.command("remove")
def gallery_remove(
    identity: IdArgument,
    gallery: GalleryOption = None,
    photo: Annotated[
        str | None,
        typer.Option(metavar="PHOTO", help="Only this photo, as `streamer gallery show` gives it.", parser=_id),
    ] = None,
    yes: YesOption = False,
) -> int:
    """Remove a person for good: name, photos and templates; or one photo of several."""
    with _desk(gallery) as desk:
        person = desk.gallery.identity(identity)
        what = f"{person.name} with {len(person.photos)} photos" if photo is None else f"a photo of {person.name}"
        if not (yes or _sure(f"Remove {what} for good?")):
            return FAILED
        if photo is None:
            desk.remove(person, who=_operator())
        else:
            desk.remove_photo(person, photo, who=_operator())
    print(f"removed {photo or identity}")
    return DONE


@gallery_app.command("verify")
def gallery_verify(gallery: GalleryOption = None) -> int:
    """Open everything that is enrolled, and say what is wrong."""
    with _desk(gallery) as desk:
        findings, count = desk.gallery.verify(), len(desk.gallery.identities())
    return _findings(findings, f"{count} persons, all as they were enrolled")


@gallery_app.command("embed")
def gallery_embed(
    gallery: GalleryOption = None,
    embedder: Annotated[
        str | None, typer.Option(metavar="MODEL", help="By what; by default what the gallery names, as it is now.")
    ] = None,
    offline: OfflineOption = False,
) -> int:
    """Make the templates of all photos anew: for another embedder, or for a newer one of the same name."""
    networks = Networks(_store(offline), plans=None if on_gpu("auto") else Plans(default_plans(), build=False))
    with _desk(gallery) as desk:
        source = enrolment.embedder_of(desk.gallery, embedder)
        embeds = networks.embedder(source)
        assert embeds is not None
        tell = _progress() if sys.stderr.isatty() else lambda *_: None
        count = desk.embed(embeds, source, who=_operator(), tell=lambda share: tell("gallery", "embedded", share))
        lists = desk.gallery.lists()
    print(f"{count} photos embedded by {source} (sha256 {embeds.engine.sha256[:12]})")
    usual = enrolment.likeness_of(embeds.engine.card.name).alarm
    for each in lists:
        print(f"list {each.name}: threshold {each.threshold:g}; by this embedder {usual:g} is usual")
    return DONE


@gallery_app.command("export")
def gallery_export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="To be written, encrypted.")],
    gallery: GalleryOption = None,
    passphrase: PassphraseOption = None,
) -> int:
    """Write everything to one encrypted file."""
    with _desk(gallery) as desk:
        count = desk.export(file, _passphrase(passphrase, twice=True), who=_operator())
    print(f"{count} persons in {file}")
    return DONE


@gallery_app.command("import")
def gallery_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `streamer gallery export` wrote.")],
    gallery: GalleryOption = None,
    passphrase: PassphraseOption = None,
) -> int:
    """Add everything of an exported file, or nothing."""
    secret = _passphrase(passphrase)
    desk, made_key = enrolment.Desk.open_or_make(gallery or enrolment.default_gallery())
    with desk:
        count = desk.import_(file, secret, who=_operator())
    if made_key:
        _say(f"made a gallery; its key is {made_key}: without it the gallery is of no use, so keep a copy")
    print(f"{count} persons out of {file}")
    return DONE


ListArgument = Annotated[str, typer.Argument(metavar="LIST", help="Its name.")]
IdsArgument = Annotated[
    list[str], typer.Argument(metavar="ID...", help="As `streamer gallery list` gives them.", parser=_id)
]


@watchlist_app.command("list")
def watchlist_list(gallery: GalleryOption = None, as_json: JsonOption = False) -> int:
    """List the watch lists, the highest priority first: how many are on each, its threshold, when it expires."""
    with _desk(gallery) as desk:
        lists = desk.gallery.lists()
        counts = Counter(name for identity in desk.gallery.identities() for name in identity.lists)
    if as_json:
        print(json.dumps([watchlist.as_json(each, counts[each.name]) for each in lists]))
        return DONE
    for each in lists:
        print(watchlist.line(each, counts[each.name]))
    return DONE


@watchlist_app.command("set")
def watchlist_set(
    name: ListArgument,
    gallery: GalleryOption = None,
    purpose: Annotated[str | None, typer.Option(metavar="TEXT", help="What it is for.")] = None,
    legal_basis: Annotated[str | None, typer.Option(metavar="TEXT", help="What allows it.")] = None,
    threshold: Annotated[float | None, typer.Option(min=-1, max=1, help="Least similarity of a match.")] = None,
    priority: Annotated[
        int | None,
        typer.Option(min=-1000, max=1000, help="Of the lists whose threshold is reached, the highest tells."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="From then on, in UTC, nobody is matched by it; or: never.")
    ] = None,
    rename: Annotated[str | None, typer.Option(metavar="NAME", help="Its new name.")] = None,
) -> int:
    """Change a watch list, or make it: a new one wants a purpose and a legal basis."""
    change = watchlist.ListChange(
        rename and enrolment.clean_name(rename), purpose, legal_basis, threshold, priority,
        expires_at="never" if expires == "never" else _time("--expires", expires),
    )  # fmt: skip
    with _desk(gallery) as desk:

        def usual() -> float:
            source, _ = desk.gallery.embedder() or (enrolment.EMBEDDER, "")
            try:
                return enrolment.likeness_of(_store(True).find(source, task="embedding").card.name).alarm
            except ModelError as exc:
                raise enrolment.EnrolmentError(f"--threshold is wanted: {source} is not here") from exc

        after = watchlist.put(desk, name, change, who=_operator(), threshold=usual)
        persons = sum(after.name in identity.lists for identity in desk.gallery.identities())
    print(watchlist.line(after, persons))
    return DONE


@watchlist_app.command("remove")
def watchlist_remove(name: ListArgument, gallery: GalleryOption = None, yes: YesOption = False) -> int:
    """Remove a watch list; who was on it stays enrolled."""
    with _desk(gallery) as desk:
        found = watchlist.find(desk, name)
        if not (yes or _sure(f"Remove list {name}?")):
            return FAILED
        watchlist.remove(desk, found, who=_operator())
    print(f"removed {name}")
    return DONE


@watchlist_app.command("add")
def watchlist_add(name: ListArgument, identities: IdsArgument, gallery: GalleryOption = None) -> int:
    """Put persons on a watch list: all, or none."""
    with _desk(gallery) as desk:
        watchlist.join(desk, name, ids := list(dict.fromkeys(identities)), who=_operator())
    print(f"{len(ids)} put on {name}")
    return DONE


@watchlist_app.command("drop")
def watchlist_drop(name: ListArgument, identities: IdsArgument, gallery: GalleryOption = None) -> int:
    """Take persons off a watch list, all or none; they stay enrolled."""
    with _desk(gallery) as desk:
        watchlist.leave(desk, name, ids := list(dict.fromkeys(identities)), who=_operator())
    print(f"{len(ids)} taken off {name}")
    return DONE


@keys_app.command("new")
def keys_new(
    gallery: Annotated[bool, typer.Option("--gallery", help="A gallery's.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where; by default where it is looked for.")] = None,
) -> int:
    """Make a key. None is ever overwritten."""
    if not gallery:
        raise typer.BadParameter("is wanted: there is no other kind of key yet", param_hint="--gallery")
    path = out or vault.key_file()
    vault.new_key(path)
    print(path)
    return DONE


@audit_app.command("verify")
def audit_verify(gallery: GalleryOption = None) -> int:
    """Check the log's chain: what was changed, taken out or cut off shows."""
    with _desk(gallery) as desk:
        return _findings(desk.log.verify(), "the log is whole")


@audit_app.command("export")
def audit_export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="To be written, as JSON lines.")],
    gallery: GalleryOption = None,
    since: TimeOption = None,
    until: TimeOption = None,
) -> int:
    """Write the log, or a part of it, to a file."""
    with _desk(gallery) as desk:
        count = desk.log.export(file, _utc(since), _utc(until))
    print(f"{count} entries in {file}")
    return DONE


EventArgument = Annotated[str, typer.Argument(metavar="EVENT", help="An event's id, or the first 8 digits or more.")]


@app.command("calibrate")
def run_calibrate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Holds one of photos for each person.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The table to be written.")],
    embedder: Annotated[str, typer.Option(metavar="MODEL", help="Whose similarities.")] = enrolment.EMBEDDER,
    restorer: Annotated[str, typer.Option(metavar="NAME", help="As restorer.name in a config.")] = "auto",
    detector: Annotated[str, typer.Option(metavar="MODEL", help="What finds the faces.")] = "centerface",
    offline: OfflineOption = False,
) -> int:
    """Fit what similarities mean to photos of known people."""
    people = calibrate.gather(folder)
    plans_here = Plans(default_plans(), build=False)
    networks = Networks(_store(offline), plans=None if on_gpu("auto") else plans_here)
    embeds = networks.embedder(embedder)
    assert embeds is not None
    router, restorers = load_restorers(RestorerConfig(name=restorer), networks, embedder)
    _make_folder("--out", out.parent)
    table = calibrate.calibrate(
        people, enrolment.Gate(networks.detector(detector), embeds),
        calibrate.make_identifier(router, restorers, embeds),
        data=str(folder), command=shlex.join(["streamer", "calibrate", str(folder)]), tell=_photo_progress(people),
    )  # fmt: skip
    table.write(out)
    for line in table.lines():
        print(line)
    return DONE


@app.command("explain")
def explain_match(
    event: EventArgument,
    gallery: GalleryOption = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write crop, restored crop and enrolled photo side by side.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Say what a match rests on: the photo that carried it, the score without it, the runner-up. It is logged."""
    if save is not None:
        _make_folder("--save", save)
    with _desk(gallery) as desk:
        told = explain.explain(desk, event, who=_operator(), save=save is not None)
    if save is not None:
        told.save(save)
    if as_json:
        print(json.dumps(told.as_json()))
    else:
        for line in told.lines():
            print(line)
    return FAILED if told.damaged else DONE


@app.command("verdict")
def give_verdict(
    event: EventArgument,
    word: Annotated[str, typer.Argument(metavar="right|wrong|unsure", help="Is it this person?")],
    gallery: GalleryOption = None,
    note_code: Annotated[
        str | None, typer.Option(metavar="WORD", help="One of your own codes; never a name: it is kept for ever.")
    ] = None,
) -> int:
    """Log whether a match is right. It may be said again; the log keeps all."""
    with _desk(gallery) as desk:
        entry = explain.record_verdict(desk, event, word, who=_operator(), note_code=note_code)
    print(f"{entry.subjects[0]}: {word}")
    return DONE


def _desk(folder: Path | None) -> enrolment.Desk:
    return enrolment.Desk.open(folder or enrolment.default_gallery())


def _findings(findings: list[str], otherwise: str) -> int:
    for finding in findings or [otherwise]:
        print(finding)
    return FAILED if findings else DONE


def _operator() -> str:
    """Return who is at it, for the audit log: the account, whatever the environment says."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _sure(question: str) -> bool:
    """Ask. Raises BadParameter where nobody can be asked."""
    if not sys.stdin.isatty():
        raise typer.BadParameter("is wanted where nobody can be asked", param_hint="--yes")
    if typer.confirm(question):
        return True
    _say("nothing was removed")
    return False


def _time(option: str, text: str | None) -> datetime | None:
    """Return a time in UTC: a day's is its beginning."""
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        reason = f"{text!r} is no time such as 2027-01-31 or 2027-01-31T18:00:00"
        raise typer.BadParameter(reason, param_hint=option) from None


def _utc(time: datetime | None) -> datetime | None:
    return time and time.replace(tzinfo=UTC)


def _passphrase(file: Path | None, *, twice: bool = False) -> str:
    if file is not None:
        try:
            return file.read_text().partition("\n")[0]
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "is no text"
            raise typer.BadParameter(f"{file}: {reason}", param_hint="--passphrase-file") from exc
    if not sys.stdin.isatty():
        raise typer.BadParameter("is wanted where nobody can be asked", param_hint="--passphrase-file")
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=twice, err=True))


def _photo_progress(people: list[enrolment.Person]) -> Callable[[enrolment.Person, Path], None]:
    """Return what shows how far it is: on a terminal a bar that grows, elsewhere a line for each of several persons."""
    total, done = sum(len(person.photos) for person in people), 0
    begun: set[str] = set()

    def tell(person: enrolment.Person, path: Path) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            bar = "#" * (20 * done // total)
            ends = "\n" if done == total else "\r"
            print(f"[{bar:20}] {done}/{total} {path.name}"[:79].ljust(79), end=ends, file=sys.stderr, flush=True)
        elif len(people) > 1 and person.name not in begun:
            begun.add(person.name)
            photos_of = f"{len(person.photos)} photo{'s' * (len(person.photos) != 1)}"
            print(f"{len(begun)}/{len(people)} {person.name}: {photos_of}", file=sys.stderr, flush=True)

    return tell


@app.command("bench")
def run_bench(
    runs: Annotated[int, typer.Option(min=1, help="How often; the medians are told.")] = 5,
    clip: Annotated[Path | None, typer.Option(metavar="FILE", help="A film; by default the demo's.")] = None,
    offline: OfflineOption = False,
) -> int:
    """Measure each stage alone and the pipeline as a whole; the last line is JSON."""
    for line in bench(_store(offline), runs=runs, clip=clip):
        print(line, flush=True)
    return DONE


PlanConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Whose networks; by default the default ones.")
]
PortableOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write plans for boxes with TensorRT's lean runtime to this folder.")
]


@engines_app.command("compile")
def engines_compile(
    config: PlanConfigArgument = None, portable: PortableOption = None, offline: OfflineOption = False
) -> int:
    """Build the plans that a config's networks lack, and prove them."""
    if offline:
        raise typer.BadParameter("forbids building; leave it away", param_hint="--offline")
    wishes = _wishes(config, portable=portable is not None)
    store = default_plans() if portable is None else PlanStore(portable)
    return DONE if plans.compile_plans(wishes, store, _print, _progress()) else FAILED


@engines_app.command("add")
def engines_add(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `compile --portable` wrote elsewhere.")],
    config: PlanConfigArgument = None,
) -> int:
    """Take over plans that were built on another machine, once they are proven on this one."""
    if not folder.is_dir():
        raise plans.PlanError(f"{folder}: no such folder")
    return DONE if plans.add_plans(_wishes(config), PlanStore(folder), default_plans(), _print) else FAILED


@engines_app.command("list")
def engines_list(as_json: JsonOption = False) -> int:
    """List the plans of this machine."""
    records = default_plans().records()
    if as_json:
        print(json.dumps([record.model_dump(mode="json") for record in records]))
    else:
        for line in plans.lines(records):
            print(line)
    return DONE


@engines_app.command("check")
def engines_check(config: PlanConfigArgument = None) -> int:
    """Prove the plans of a config's networks anew; remove what fails."""
    return DONE if plans.check_plans(_wishes(config), default_plans(), _print) else FAILED


@engines_app.command("plan")
def engines_plan(
    histogram: Annotated[
        Path, typer.Option("--from", metavar="FILE", help='{"64": 12, ...}, or events of `streamer listen --json`.')
    ],
    restorer: Annotated[str, typer.Option(metavar="NAME", help="For which.")] = "sgen-small",
    count: Annotated[int, typer.Option(min=1, max=16, help="How many buckets at most.")] = 4,
    max_size: Annotated[int, typer.Option(min=16, help="Longest side of a restored face.")] = 256,
    as_json: JsonOption = False,
) -> int:
    """Choose the sides that a restorer is best fed with, from the faces that were restored."""
    card = _store(True).find(restorer, task="restoration").card
    try:
        chosen = plan_buckets(read_histogram(histogram), card, max_size=max_size, count=count)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--from") from exc
    if as_json:
        print(json.dumps(asdict(chosen)))
    else:
        for line in plan_lines(chosen, card):
            print(line)
    return DONE


def _wishes(config: Path | None, *, portable: bool = False) -> list[Request]:
    settings = load_config(config) if config else StreamerConfig.model_validate({"cameras": _NO_CAMERA})
    found = wanted(settings, _networks(settings, False, build=False))
    engine = settings.engine
    return plans.requests(
        found, backend=engine.backend, precision=engine.precision, threads=threads_for(settings), portable=portable
    )


def _print(line: str) -> None:
    print(line, flush=True)


def _progress() -> Callable[[str, str, float], None]:
    """Return what shows how far a plan is: on a terminal in one line that changes, elsewhere a line for each step."""
    ends = "\r" if sys.stderr.isatty() else "\n"

    def tell(name: str, what: str, share: float) -> None:
        print(f"{name}: {what}, {share:4.0%}".ljust(60), end=ends, file=sys.stderr, flush=True)

    return tell


@models_app.command("list")
def models_list(as_json: JsonOption = False) -> int:
    """List the networks that a name finds."""
    listings = _store(True).list()
    if as_json:
        rows = [
            {
                "name": item.name, "task": item.task, "path": item.path and str(item.path), "size": item.size,
                "license": item.license, "problem": item.problem,
            }
            for item in listings
        ]  # fmt: skip
        print(json.dumps(rows))
        return DONE
    for item in listings:
        place = item.path or "to be fetched"
        size = f"{item.size / 2**20:.1f} MiB"
        print(f"{item.name:24} {item.task or '?':12} {size:>9}  {item.problem or item.license}  {place}")
    return DONE


@models_app.command("fetch")
def models_fetch(model: Annotated[str, typer.Argument(help="A name or a URL.")]) -> int:
    """Bring a network into the cache."""
    print(_store(False).fetch(model))
    return DONE


@models_app.command("show")
def models_show(model: Annotated[str, typer.Argument(help="A name, a path or a URL.")]) -> int:
    """Print a network's card."""
    found = _store(True).find(model)
    card = {"path": str(found.path), "sha256": found.sha256, **found.card.model_dump(mode="json")}
    print(json.dumps(card, indent=2))
    return DONE


def _load(settings: StreamerConfig, offline: bool, *, build: bool) -> Stages:
    return load_stages(settings, _networks(settings, offline, build=build and not offline))


def _networks(settings: StreamerConfig, offline: bool, *, build: bool) -> Networks:
    return Networks(
        _store(offline),
        backend=settings.engine.backend,
        precision=settings.engine.precision,
        threads=threads_for(settings),
        plans=Plans(default_plans(), build=build),
    )


def _store(offline: bool) -> ModelStore:
    return default_store(offline=offline)


def _make_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise typer.BadParameter(f"{folder}: {exc.strerror}", param_hint=option) from exc


def _inspect(cameras: list[Camera], *, tell: bool = False) -> None:
    """Open each source and decode a frame; raise CameraError with a line for each that fails."""
    mistakes = []
    for camera in cameras:
        try:
            shown = camera.inspect()
        except CameraError as exc:
            mistakes.append(str(exc))
            continue
        if tell:
            length = "live" if shown.duration_s is None else f"{shown.duration_s:.1f} s"
            print(f"camera {camera.name}: {shown.width}x{shown.height}, {shown.fps:g} fps, {shown.codec}, {length}")
    if mistakes:
        raise CameraError("\n".join(mistakes))


def _on_signals(act: Callable[[], object]) -> None:
    """The first SIGTERM or SIGINT does `act`, the second kills."""

    def on_signal(number: int, _: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        print(f"streamer: {signal.Signals(number).name}: ending", file=sys.stderr)
        act()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, on_signal)


def _details(metrics: Metrics) -> Iterator[str]:
    """Tell of each stage how long and in what batches it worked, of each camera how old its frames were."""
    batches = metrics.batch_sizes()
    for stage, seconds in metrics.stage_seconds().items():
        items = sum(size * number for size, number in batches[stage].items())
        largest, runs = max(batches[stage]), sum(batches[stage].values())
        yield f"{stage}: {items} in {runs} batches (largest {largest}), {1000 * seconds / items:.1f} ms each"
    drops = metrics.drops()
    for camera, (mean, worst) in metrics.frame_ages().items():
        dropped = ", ".join(f"{reason} {number}" for reason, number in drops.get(camera, {}).items()) or "none"
        yield f"{camera}: frames {mean:.2f} s old when looked at, at worst {worst:.2f} s; drops: {dropped}"


def _summary(metrics: Metrics, seconds: float) -> str:
    counts = metrics.counts()
    frames, faces, restored, published = (counts.get(what, 0) for what in ("frames", "faces", "restored", "published"))
    rate = frames / seconds if seconds else 0.0
    return (
        f"frames {frames}, faces {faces}, restored {restored}, published {published}, "
        f"fps {rate:.1f}, drops {counts['drops']}"
    )


def _refuse(message: str, code: int = WRONG_INPUT) -> int:
    for line in message.splitlines():
        _say(line)
    return code


def _say(line: str) -> None:
    print(f"streamer: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
