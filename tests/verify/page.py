"""The page of a verification: one HTML file that needs nothing from outside, with drawings that
fit a phone and paper. Made from a run whose texts are fit for strangers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import jinja2
from markupsafe import Markup

from callready import __version__
from callready.diagnosis.model import Tried
from tests.verify.check import ms
from tests.verify.history import Changes, Row, Run
from tests.verify.screen import seconds, times, way, ways

# Of lines in the drawing: with more, those of a host, then those of a pool are drawn as one.
_HOSTS_AT, _POOLS_AT = 40, 70
_ROW, _BAR = 26, 28  # pixels
_WATERFALLS = 40


def page(run: Run, changed: Changes | None) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ms"] = ms
    causes = sorted(run.causes, key=lambda cause: cause.latent)
    rows = {row.name: row for row in run.rows}
    # Of several causes of one check, the most likely.
    number_of = {
        name: number
        for number, cause in reversed([*enumerate(causes, 1)])
        for name in cause.symptoms
    }
    environment.tests["of_cause"] = lambda row, number: number_of.get(row.name) == number
    return environment.get_template("report.html.j2").render(
        run=run,
        changed=changed,
        causes=causes,
        rows=rows,
        number_of=number_of,
        unexplained=[rows[name] for name in run.unexplained if name in rows],
        drawings={"narrow": topology(run, 320), "wide": topology(run, 940)},
        paths=slowest_first(run.paths),
        waterfalls=_WATERFALLS,
        named=named,
        failed_at=failed_at,
        seconds=seconds,
        connects=distribution(run),
        version=__version__,
    )


# The topology: from callers on the left to servers on the right, a line for each path.


@dataclass(frozen=True)
class Line:
    """One path, or several that are drawn as one: `ok` is None where nothing was tried."""

    text: str
    ok: bool | None
    is_behind: bool = False
    """It failed behind the station that it goes through."""


@dataclass(frozen=True)
class Section:
    """Lines that go through one station (nothing: directly), below one heading."""

    heading: str
    station: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Group:
    """What leads to the same end."""

    end: str
    heading: str
    sections: tuple[Section, ...]


def topology(run: Run, width: int) -> Markup:
    """All of it, as SVG of so many pixels."""
    groups = _groups(run)
    lines = sum(len(section.lines) for group in groups for section in group.sections)
    if not lines:
        return Markup()
    drawn, y = [], 4.0
    for group in groups:
        top = y
        y += 24
        if group.heading:
            drawn.append(_text(_BAR + 12, y - 7, group.heading, "heading"))
        else:
            y -= 24
        for section in group.sections:
            y += 8
            if section.heading:
                y += 20
                drawn.append(_text(_BAR + 12, y - 6, section.heading, "sub"))
            drawn += _section(section, y, width)
            y += len(section.lines) * _ROW
        y += 6
        drawn.append(_bar(width - _BAR, top, y, group.end))
        y += 14
    height = y - 10
    drawn.append(_bar(0, 4, height - 4, "Callers"))
    bad = sum(1 for g in groups for s in g.sections for each in s.lines if each.ok is False)
    label = f"Paths from callers to the servers: {bad or 'none'} of {lines} closed; listed below"
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" '
        'aria-label="{}">{}</svg>'
    ).format(width, round(height), label, Markup("\n").join(drawn))


def _section(section: Section, y: float, width: int) -> Iterator[Markup]:
    left, right = _BAR, width - _BAR
    start, end = (width * 0.72, width * 0.88) if section.station else (0.0, 0.0)
    for row, line in enumerate(section.lines):
        at = y + row * _ROW + _ROW / 2
        kind = {True: "ok", False: "no", None: "na"}[line.ok]
        broken = right
        if line.ok is False:
            behind = line.is_behind or not section.station
            broken = round(
                (end + right) / 2 if behind and end else start - 14 if start else right - 20
            )
        yield Markup('<path class="line {}" d="M{} {}H{}"/>').format(kind, left, at, broken)
        if broken != right:
            yield Markup('<path class="line na" d="M{} {}H{}"/>').format(broken, at, right)
            cross = f"M{broken - 5} {at - 5}l10 10m0 -10l-10 10"
            yield Markup('<path class="cross" d="{}"/>').format(cross)
        text = f"{'✓' if line.ok else '○' if line.ok is None else '✗'} {line.text}"
        pill = min(len(text) * 7.2 + 18, (start or right) - left - 30)
        yield Markup('<rect class="pill {}" x="{}" y="{}" width="{}" height="20" rx="10"/>').format(
            kind, left + 10, at - 10, round(pill)
        )
        yield _text(left + 18, at + 4, text, f"way {kind}")
    if section.station:
        height = len(section.lines) * _ROW - 4
        yield Markup('<rect class="station" x="{}" y="{}" width="{}" height="{}" rx="6"/>').format(
            round(start), y + 2, round(end - start), height
        )
        yield _text((start + end) / 2, y + 2 + height / 2 + 4, section.station, "station-name")


def _bar(x: float, top: float, bottom: float, text: str) -> Markup:
    middle = (top + bottom) / 2
    return Markup(
        '<rect class="bar" x="{}" y="{}" width="{}" height="{}" rx="6"/>'
        '<text class="bar-name" transform="translate({} {}) rotate(-90)">{}</text>'
    ).format(x, top, _BAR, round(bottom - top), x + _BAR / 2 + 4, round(middle), text)


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, round(x), round(y), text)


def _groups(run: Run) -> list[Group]:
    sfus = {each.name for each in run.hosts if "SFU" in each.roles}
    ends = {path.path.sfu for path in run.paths}
    roles = {each.name: each.roles for each in run.hosts}
    groups = []
    for sfu in dict.fromkeys([*(host for host in roles if host in sfus), *sorted(ends - {""})]):
        sections = list(_sections([each for each in run.paths if each.path.sfu == sfu], run))
        signalling = [row for row in run.rows if row.host == sfu and row.check == "test_signalling"]
        if signalling:
            edge = "Edge" if "Edge" in roles.get(sfu, ()) else ""
            sections.insert(0, Section("", edge, (_line("signalling", signalling),)))
        if sections:
            groups.append(Group("SFU", sfu, tuple(sections)))
    peers = list(_sections([each for each in run.paths if not each.path.sfu], run))
    tried = {(each.path.turn, each.path.pool) for each in run.paths}
    for host, of_host in roles.items():
        for role in of_host:
            pool = role.removeprefix("TURN ")
            if role != pool and (host, pool) not in tried:
                between = [
                    row
                    for row in run.rows
                    if row.host == host
                    and row.check in ("test_peer_to_peer", "test_media")
                    and f"({pool})" in row.title
                ]
                line = _line("peer to peer", between)
                peers.append(Section(f"{host} · {role}", "TURN", (line,)))
    if peers:
        groups.append(Group("Peers", "", tuple(peers)))
    for host, of_host in roles.items():
        if "App" in of_host:
            asked = [
                row
                for row in run.rows
                if row.host == host
                and (row.title.startswith("App") or row.check == "test_call_from_the_app")
            ]
            edge = "Edge" if "Edge" in of_host else ""
            section = Section("", edge, (_line("HTTPS and calls", asked),))
            groups.append(Group("App", host, (section,)))
    return groups


def _line(text: str, rows: Sequence[Row]) -> Line:
    return Line(text, all(row.ok for row in rows) if rows else None, is_behind=True)


def _sections(paths: Sequence[Tried], run: Run) -> Iterator[Section]:
    """A section for each host that packets go to first; of many, what is well together."""

    def station(tried: Tried) -> tuple[str, str]:
        return tried.path.pool, tried.path.turn

    by_station = {
        key: list(tried) for key, tried in groupby(sorted(paths, key=station), key=station)
    }
    fine: dict[str, list[tuple[str, str]]] = {}
    if len(run.paths) > _POOLS_AT:
        for key, tried in by_station.items():
            if key[1] and all(each.ok for each in tried):
                fine.setdefault(key[0], []).append(key)
    draw = _together if len(run.paths) > _HOSTS_AT else _single
    for (pool, turn), tried in by_station.items():
        together = fine.get(pool, [])
        if len(together) < 2 or (pool, turn) not in together:
            heading = f"{turn} · TURN {pool}" if turn else ""
            yield Section(heading, "TURN" if turn else "", tuple(draw(tried)))
        elif (pool, turn) == together[0]:
            every = [each for key in together for each in by_station[key]]
            heading = f"{len(together)} hosts · TURN {pool}"
            yield Section(heading, "TURN", tuple(_together(every)))


def _single(tried: Sequence[Tried]) -> Iterator[Line]:
    for name in ways(tried):
        for each in sorted(tried, key=lambda each: each.path.family):
            if way(each) == name:
                told = ms(each.rtt) if each.ok and each.rtt else ""
                told = f"at {failed_at(each)}" if failed_at(each) else told
                text = f"{name} IPv{each.path.family} · {told}".rstrip(" ·")
                yield Line(text, each.ok, _is_behind(each))


def _together(tried: Sequence[Tried]) -> Iterator[Line]:
    """A line for each family, where the ways agree."""
    for family in (4, 6):
        of_family = [each for each in tried if each.path.family == family]
        if len({(each.ok, _is_behind(each)) for each in of_family}) > 1:
            yield from _single(of_family)
        elif of_family:
            text = f"{', '.join(ways(of_family))} IPv{family} · {times(of_family)}".rstrip(" ·")
            yield Line(text, of_family[0].ok, _is_behind(of_family[0]))


def _is_behind(tried: Tried) -> bool:
    """Whether it came to the relay, and not from there to the other end."""
    return failed_at(tried).startswith(("permission", "ICE", "loss"))


def failed_at(tried: Tried) -> str:
    """The step that failed; `why` begins with it."""
    return tried.why.partition(":")[0] if tried.ok is False else ""


# Single connections, and all of them.


def named(tried: Tried) -> str:
    """A path in words."""
    path = tried.path
    through = f"{way(tried)} to {path.turn} ({path.pool})" if path.turn else f"direct {path.way}"
    return f"{through}, IPv{path.family}" + (f", {path.sfu}" if path.sfu else "")


def slowest_first(paths: Iterable[Tried]) -> list[Tried]:
    """Those that failed, then those that were tried, the slowest first."""
    tried = [each for each in paths if each.ok is not None]
    return sorted(tried, key=lambda each: (bool(each.ok), -seconds(each)))


@dataclass(frozen=True)
class Connects:
    """How long calls took to connect: count, and in seconds; drawn for a phone and for more."""

    count: int
    median: float
    p95: float
    longest: float
    narrow: Markup
    wide: Markup


def distribution(run: Run) -> Connects | None:
    """Of all calls of a run; None if it made none."""
    found = sorted(seconds for row in run.rows for seconds in row.connects)
    if not found:
        return None
    p95 = statistics.quantiles(found, n=20, method="inclusive")[-1] if len(found) > 1 else found[0]
    median, longest = statistics.median(found), found[-1]
    drawn = (_dots(found, median, p95, width) for width in (320, 940))
    return Connects(len(found), median, p95, longest, *drawn)


def _dots(found: Sequence[float], median: float, p95: float, width: int) -> Markup:
    """A dot for each time, side by side and one above the other."""
    bins, end = width // 10, 1.1 * found[-1]  # room to the right, for the names of the marks
    stacks = [0] * (bins + 1)
    for each in found:
        stacks[round(each / end * bins)] += 1
    step = min(9.0, 90 / max(stacks))
    base = 22 + max(stacks) * step

    def x(value: float) -> float:
        return round(8 + value / end * (width - 16), 1)

    drawn = [Markup('<path class="axis" d="M8 {}H{}"/>').format(round(base), width - 8)]
    dot = Markup('<circle class="dot" cx="{}" cy="{}" r="{}"/>')
    for number, height in enumerate(stacks):
        for level in range(height):
            at = round(base - 5 - level * step, 1)
            drawn.append(dot.format(x(number / bins * end), at, round(min(4.0, step / 2), 1)))
    mark = Markup('<path class="mark" d="M{0} 4V{1}"/>')
    name = Markup('<text class="sub" x="{}" y="{}" text-anchor="{}">{}</text>')
    for value, text, anchor, off in ((median, "median", "end", -4), (p95, "95 %", "start", 4)):
        drawn.append(mark.format(x(value), round(base)))
        drawn.append(name.format(x(value) + off, 14, anchor, text))
    drawn.append(name.format(8, round(base) + 16, "start", "0"))
    drawn.append(name.format(width - 8, round(base) + 16, "end", ms(end)))
    label = (
        f"{len(found)} calls: median {ms(median)}, 95 % within {ms(p95)}, longest {ms(found[-1])}"
    )
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, round(base) + 22, label, Markup("").join(drawn)
    )
