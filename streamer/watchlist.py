"""Watch lists as an operator changes them. Each change is in the audit log before it is done, without names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from streamer.enrolment import Desk, EnrolmentError, clean_name, list_details
from streamer.gallery import WatchList


@dataclass(frozen=True, slots=True)
class ListChange:
    """What is to be different; None stays as it is."""

    name: str | None = None
    purpose: str | None = None
    legal_basis: str | None = None
    threshold: float | None = None
    priority: int | None = None
    expires_at: datetime | Literal["never"] | None = None

    def applied(self, watch_list: WatchList) -> WatchList:
        """Return the list as it then is."""
        asked = {name: getattr(self, name) for name in self.__slots__}
        fields = {name: value for name, value in asked.items() if value is not None}
        if self.expires_at == "never":
            fields["expires_at"] = None
        return replace(watch_list, **fields)


def find(desk: Desk, name: str) -> WatchList:
    """Return a list by its name. Raises EnrolmentError where there is none."""
    found = _named(desk, name)
    if found is None:
        raise EnrolmentError(f"there is no list {name!r}: `streamer watchlist list` tells which there are")
    return found


def put(desk: Desk, name: str, change: ListChange, *, who: str, threshold: Callable[[], float]) -> WatchList:
    """Change a list, or make it where there is none of this name; return it. Logged as `list.changed`.

    `threshold` gives a new list's unless the change does. Raises GalleryError or EnrolmentError for what cannot be.
    """
    if isinstance(change.expires_at, datetime) and change.expires_at <= datetime.now(UTC):
        raise EnrolmentError(f"--expires: {change.expires_at:%Y-%m-%d %H:%M} UTC is over")
    with desk.gallery.change(who) as opened:
        before = _named(desk, name)
        if before is None:
            if not (change.purpose and change.legal_basis):
                raise EnrolmentError(f"there is no list {name!r}: --purpose and --legal-basis make it")
            if change.name is not None:
                raise EnrolmentError(f"--rename: there is no list {name!r}")
            start = threshold() if change.threshold is None else change.threshold
            after = change.applied(WatchList(clean_name(name), change.purpose, change.legal_basis, start))
            changed = ["made"]
        else:
            after = change.applied(before)
            changed = [field for field in ListChange.__slots__ if getattr(after, field) != getattr(before, field)]
            if not changed:
                raise EnrolmentError(f"nothing about list {name!r} would change")
        after = replace(after, id=opened.put_list(after))
        desk.log.append(who, "list.changed", [after.id], list_details(after, changed))
    return after


def remove(desk: Desk, watch_list: WatchList, *, who: str) -> None:
    """Remove a list for good; who was on it stays enrolled. Logged as `list.removed`.

    Raises EnrolmentError where it is not what it was when it was found.
    """
    with desk.gallery.change(who) as opened:
        if find(desk, watch_list.name) != watch_list:
            raise EnrolmentError(f"list {watch_list.name!r} was changed by somebody else meanwhile: it stays")
        opened.remove_list(watch_list.name)
        desk.log.append(who, "list.removed", [watch_list.id])


def join(desk: Desk, name: str, identities: Sequence[str], *, who: str) -> None:
    """Put persons on a list, all or none. Logged as `list.joined`."""
    with desk.gallery.change(who) as opened:
        watch_list = find(desk, name)
        for identity in identities:
            opened.join(identity, watch_list.name)
        desk.log.append(who, "list.joined", [watch_list.id, *identities])


def leave(desk: Desk, name: str, identities: Sequence[str], *, who: str) -> None:
    """Take persons off a list, all or none. Logged as `list.left`."""
    with desk.gallery.change(who) as opened:
        watch_list = find(desk, name)
        for identity in identities:
            opened.leave(identity, watch_list.name)
        desk.log.append(who, "list.left", [watch_list.id, *identities])


def as_json(watch_list: WatchList, persons: int) -> dict[str, object]:
    """Return a list for programs, with how many persons are on it."""
    ends = watch_list.expires_at
    return {
        "id": watch_list.id, "name": watch_list.name, "persons": persons, "threshold": watch_list.threshold,
        "priority": watch_list.priority, "expires_at": ends.isoformat() if ends else None,
        "expired": expired(watch_list), "purpose": watch_list.purpose, "legal_basis": watch_list.legal_basis,
    }  # fmt: skip


def line(watch_list: WatchList, persons: int) -> str:
    """Return what to tell of a list."""
    ends = watch_list.expires_at
    until = f"{'EXPIRED' if expired(watch_list) else 'expires'} {ends:%Y-%m-%d %H:%M} UTC" if ends else "never expires"
    return (
        f"{watch_list.id}  {persons:>5} person{'s' if persons != 1 else ' '}  threshold {watch_list.threshold:g}  "
        f"priority {watch_list.priority}  {until}  {watch_list.name}: {watch_list.purpose} ({watch_list.legal_basis})"
    )


def expired(watch_list: WatchList) -> bool:
    """Tell whether nobody is matched by it any more."""
    return watch_list.expires_at is not None and watch_list.expires_at <= datetime.now(UTC)


def _named(desk: Desk, name: str) -> WatchList | None:
    wanted = clean_name(name)
    return next((each for each in desk.gallery.lists() if each.name == wanted), None)
