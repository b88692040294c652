"""What is wrong with a host's units: those that serve callers, the app's, and those around them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from callready.diagnosis.files import edit, unreadable
from callready.diagnosis.inspection import Inspection, Process, workers
from callready.diagnosis.model import Cause, Place
from callready.diagnosis.seen import FIREWALL, GIB, Seen
from callready.release.plan import RULES
from callready.settings.ports import EGRESS

ON = ("enabled", "enabled-runtime", "masked", "masked-runtime", "static", "indirect")

# In a drop-in: neither calls nor their safety depend on them.
_HARMLESS = re.compile(
    r"(Description|Documentation|After|Before|Wants|LogLevelMax|LogRateLimit\w*"
    r"|Syslog\w*|Standard\w+|OOMScoreAdjust|OOMPolicy|Restart|CPUAccounting|MemoryAccounting"
    r"|IOAccounting|IPAccounting|TasksAccounting|Slice|Delegate|OnFailure|OnSuccess|MemoryMin"
    r"|MemoryLow|LogExtraFields|LogNamespace|StartLimit\w*|RefuseManualStop|TimeoutStartSec"
    # These are judged by what they amount to.
    r"|CPUQuota|CPUWeight|StartupCPUWeight|MemoryMax|MemoryHigh|MemorySwapMax|TasksMax|Nice"
    r"|LimitNOFILE|CPUAffinity|CPUSchedulingPolicy|AllowedCPUs|IOWeight|LimitNPROC)$"
)
_HARMLESS_VARIABLE = re.compile(r"\W*(TZ|LANG|LANGUAGE|LC_\w+|TERM|HOME|TMPDIR)=")
_NAME = r"([A-Za-z_]\w*)="
# In a drop-in: they change what runs or whom it may talk to, and not just its cage.
_OF_SERVICE = re.compile(
    r"([A-Z_]+=|Environment|PassEnvironment|Exec\w+|Type|User|Group|LoadCredential|IPAddress\w+|RuntimeMaxSec|WatchdogSec|Socket\w*"
    r"|RestrictNetwork\w+|RestrictAddress\w+|IPIngress\w+|IPEgress\w+|NetworkNamespacePath"
    r"|PrivateNetwork|CPU\w+|IO\w+|Limit\w+)"
)
# Less than this is too little: of a unit's properties, and of its control group's files.
_LEAST = {"MemoryMax": GIB // 4, "MemoryHigh": GIB // 4, "TasksMax": 64, "CPUWeight": 50}
_LEAST_OF = {"memory.max": GIB // 4, "memory.high": GIB // 4, "pids.max": 64, "cpu.weight": 50}
_FILE_OF = {
    **{"CPUQuota": "cpu.max", "CPUWeight": "cpu.weight", "TasksMax": "pids.max"},
    **{"MemoryMax": "memory.max", "MemoryHigh": "memory.high"},
}
_SHORT_OF = {
    "unit-limits": "files and sockets that it may open",
    "unit-throttled": "processor time, memory or threads",
}


def causes(seen: Seen) -> Iterator[Cause]:
    """Units that do not run, hang, restart, or will not start; and what the host boots to."""
    release = seen.node.release
    of_app = [unit for each in release.environments.values() for unit in each.units]
    of_app += [item.unit for item in workers(seen.node)]
    for unit in dict.fromkeys([*release.services, *of_app]):
        if seen.inspection.unit(unit):
            yield from _Unit(seen, unit).causes()
    yield from _boot(seen)


class _Unit:
    """A unit that callers or the app need."""

    def __init__(self, seen: Seen, name: str) -> None:
        self.seen, self.name, self.state = seen, name, seen.inspection.unit(name)
        self.is_ours = name in seen.node.release.services
        self.is_running = self.state.get("ActiveState") in ("active", "reloading")
        load, active, sub, result = (
            self.state.get(key, "") for key in ("LoadState", "ActiveState", "SubState", "Result")
        )
        self.shown = f"systemctl: {load}, {active} ({sub}), result {result}"
        self.processes = [p for p in seen.inspection.processes if p.unit == name]
        paths = self.state.get("DropInPaths", "").split()
        if self.is_ours:
            paths += re.findall(r"/\S+", self.state.get("EnvironmentFiles", ""))
        self.foreign = [path for path in paths if not path.endswith("/callready.conf")]
        self.drop_ins = list(_telling(seen.inspection, self.foreign, self.is_ours))
        self.told = "; ".join(f"{path}: {', '.join(lines)}" for path, lines in self.drop_ins)
        whole = [path for path, _ in self.drop_ins if path.endswith(".conf")]
        lines = [f"take that out of {path}" for path, _ in self.drop_ins if path not in whole]
        self.without = "; ".join([*lines, *[f"rm {' '.join(whole)}"] * bool(whole), self._again])

    @property
    def _again(self) -> str:
        return f"systemctl daemon-reload; systemctl restart {self.name}"

    def _now(self, key: str, what: str, mend: str, *evidence: str) -> Cause:
        place = Place.UNIT if self.is_ours else Place.APP
        breaks = self.seen.flows(self.name) if self.is_ours else ()
        checks = self.seen.checks(self.name)
        return self.seen.cause(key, place, what, mend, *evidence, breaks=breaks, checks=checks)

    def _later(self, key: str, what: str, mend: str, *evidence: str) -> Cause:
        checks = ("test_units", "test_files", "test_exposure")
        return self.seen.cause(key, Place.NEXT, what, mend, *evidence, checks=checks, latent=True)

    def causes(self) -> Iterator[Cause]:
        """What is wrong with it."""
        name, load = self.name, self.state.get("LoadState", "loaded")
        if load == "masked":
            runtime = " --runtime" if self.state.get("FragmentPath", "").startswith("/run") else ""
            mend = f"systemctl unmask{runtime} {name} and deploy again"
            if self.is_running:
                what = f"{name} is masked: it runs, and will not start again"
                yield self._later("unit-masked", what, mend, self.shown)
            else:
                mend += f"; systemctl enable --now {name}"
                yield self._now("unit-masked", f"{name} is masked", mend, self.shown)
        elif load != "loaded":
            # `systemctl disable` takes away the link to a unit file that is elsewhere, too.
            what = f"{name} has no unit file that systemd can load: it will not start again"
            key, cause = (
                ("unit-disabled", self._later) if self.is_running else ("unit-stopped", self._now)
            )
            yield cause(key, what, "deploy again", self.shown)
        elif not self.is_running:
            yield from self._down()
            if self.state.get("UnitFileState") not in ON:
                yield self._disabled()
        else:
            yield from self._up()
            if self.is_ours:
                if self.state.get("UnitFileState") not in ON:
                    yield self._disabled()
                yield from self._kept_short()

    def _down(self) -> Iterator[Cause]:
        name, inspection = self.name, self.seen.inspection
        result, is_starting = self.state.get("Result", ""), self._is("activating")
        if name == EGRESS and (self.seen.facts.held or inspection.egress.get("draining")):
            return  # said with what holds it
        if self._is_refused:
            return  # said with the certificate that keeps it from running
        if shows := _flaps(inspection, name, self.state):
            yield self._flapping(shows)
        elif self.drop_ins:
            what = f"a drop-in keeps {name} from running"
            yield self._now("foreign-drop-in", what, self.without, self.told, self.shown)
        elif edited := self.seen.edited(name):
            yield edit(self.seen, edited, name, self.shown)
        elif blocked := [r for r in inspection.reads if r.unit == name and r.answer != "yes"]:
            yield from unreadable(self.seen, blocked, latent=False)
        elif is_starting or result not in ("success", ""):
            key, what = "unit-stopped", f"{name} failed"
            if is_starting:
                key, what = "unit-flapping", f"{name} does not start"
            mend = f"journalctl -u {name}, for why; systemctl restart {name}"
            restarts = f"{self.state.get('NRestarts')} restarts by itself"
            yield self._now(key, what, mend, self.shown, restarts)
        else:
            mend = f"systemctl start {name}"
            yield self._now("unit-stopped", f"{name} is stopped", mend, self.shown)

    @property
    def _is_refused(self) -> bool:
        bad = self.seen.refused.keys() - self.seen.ageing
        return not bad.isdisjoint(self.seen.kinds(self.name))

    def _is(self, active: str) -> bool:
        return self.state.get("ActiveState") == active

    def _up(self) -> Iterator[Cause]:
        """Whether it does anything, though it runs."""
        name, inspection = self.name, self.seen.inspection
        stopped = [p for p in self.processes if p.state in "Tt"]
        if name in inspection.frozen or self.state.get("FreezerState", "").startswith("fr"):
            what = f"{name} is frozen: its ports are open and nothing answers"
            shown = "its control group is frozen (cgroup.events)"
            yield self._now("unit-hung", what, f"systemctl thaw {name}", shown)
        elif stopped:
            what = f"{name} is suspended: its ports are open and nothing answers"
            mend = f"kill -CONT {' '.join(str(p.pid) for p in stopped)}"
            of = len(self.processes)
            shows = [f"process {p.pid} is in state {p.state} of {of}" for p in stopped]
            yield self._now("unit-hung", what, mend, *shows)
        elif shows := _flaps(inspection, name, self.state):
            yield self._flapping(shows)

    def _flapping(self, shows: Sequence[str]) -> Cause:
        what = f"{self.name} is restarted again and again, and every call with it"
        mend = f"what restarts it: journalctl -u {self.name} -n 50; systemctl list-timers; crontabs"
        return self._now("unit-flapping", what, mend, *shows)

    def _disabled(self) -> Cause:
        return self.seen.cause(
            "unit-disabled",
            Place.NEXT,
            f"{self.name} does not start at boot",
            f"systemctl enable {self.name}",
            f"systemctl is-enabled: {self.state.get('UnitFileState') or 'no'}",
            checks=("test_units", "test_files"),
            latent=True,
        )

    def _kept_short(self) -> Iterator[Cause]:
        """Limits of its own and of what is around it, drop-ins, an old process."""
        limits = _throttled(self.seen.inspection, self.name, self.state, self.processes)
        short = [(key, text) for key, text in limits if not self._is_meant(text)]
        for key in sorted({key for key, _ in short}):
            shows = [text for each, text in short if each == key]
            slices = [text.rpartition(" of ")[2] for text in shows if ".slice" in text]
            # Of a unit of ours `revert` would take callready's own drop-in away.
            mend = "".join(f"systemctl revert {each}; " for each in slices[:1])
            mend += f"{self._again}, or deploy again"
            if self.foreign:
                mend = f"rm {' '.join(self.foreign)}; {self._again}"
            what = f"{self.name} is kept short of {_SHORT_OF[key]}"
            yield self._now(key, what, mend, *shows, *self.foreign)
        if self.drop_ins:
            lines = [line for _, lines in self.drop_ins for line in lines]
            is_about_service = any(map(_OF_SERVICE.match, lines))
            suffer = ("test_behind", "test_measured") if is_about_service else ()
            yield self.seen.cause(
                "foreign-drop-in",
                Place.UNIT,
                f"{self.name} does not run as callready wants it: {self.told}",
                self.without,
                self.told,
                breaks=self.seen.flows(self.name) if is_about_service else (),
                checks=("test_exposure", "test_units", "test_journal", *suffer),
                latent=not is_about_service,
            )
        elif not short:
            yield from self._stale()

    def _is_meant(self, limit: str) -> bool:
        """Whether our own unit file sets it: what is not about calls comes after them."""
        file = self.seen.node.release.files.get(f"/etc/systemd/system/{self.name}")
        lines = file.content.decode().splitlines() if file else []
        keys = {line.partition("=")[0] for line in lines} & _FILE_OF.keys()
        return any(limit.startswith(key) or _FILE_OF[key] in limit for key in keys)

    def _stale(self) -> Iterator[Cause]:
        """A process that has not what its files say."""
        seen, name = self.seen, self.name
        wanted, found = seen.node.release.services.get(name), seen.facts.units.get(name)
        if not wanted or not found or seen.is_undeployed:
            return
        is_unread, mend = False, f"{self._again} (a restart ends calls)"
        is_edited = bool(seen.edited(name))  # that is said of the file
        if found.fingerprint != wanted.fingerprint and not is_edited:
            why = "its process was started with another configuration"
        elif found.given != wanted.given and not is_edited:
            why = "its process was started with an edited file, which is right again"
        elif found.binary.endswith("(deleted)"):
            why = "its binary was replaced since it started"
        elif name in seen.facts.outdated and not self._is_refused:
            why = "it has a certificate of the fleet from before"
        elif name in seen.inspection.replaced:
            why = "something else is at its binary's path since it started"
            mend = f"findmnt {found.binary}, and umount it; dpkg --verify; then {self._again}"
        elif found.needs_reload and not seen.changed("file"):
            why, is_unread = "systemd has not read its unit file since that changed", True
        else:
            return
        yield seen.cause(
            "stale-process",
            Place.UNIT,
            f"{name} does not run what the host has: {why}",
            mend,
            f"process {found.pid}, {found.binary}",
            breaks=() if found.needs_reload else seen.flows(name),
            checks=seen.checks(name),
            latent=is_unread,
        )


def _telling(
    inspection: Inspection, paths: Sequence[str], is_ours: bool
) -> Iterator[tuple[str, list[str]]]:
    """The drop-ins that matter, and the lines that do."""
    for path in paths:
        lines, section = list[str](), ""
        for line in map(str.strip, inspection.drop_ins.get(path, ())):
            if line.startswith("["):
                section = line
            key, equals, value = line.partition("=")
            if not equals or line.startswith(("#", ";")) or section == "[Install]":
                continue
            key, value = key.strip(), value.strip()
            # The app's variables are its owner's.
            if key == "Environment" and (not is_ours or _HARMLESS_VARIABLE.match(value)):
                continue
            if _HARMLESS.match(key) and not (key == "Restart" and value != "always"):
                continue
            # A value may be a secret, or long.
            if key == "Environment":
                line = f"{key}={' '.join(re.findall(_NAME, value))}"
            is_hidden = "Credential" in key or len(line) > 120
            lines.append(f"{key}=…" if is_hidden else line)
        if lines and "lxc" not in path:
            yield path, lines


BEFORE, AFTER = 90, 15  # seconds around a confirmation in which a start is the deploy's


def _flaps(inspection: Inspection, unit: str, state: dict[str, str]) -> list[str]:
    """How it showed that a unit starts again and again, now: it is not enough that it did once."""
    restarts = int(state.get("NRestarts") or 0)
    # A deploy restarts units, and is in the history when it is confirmed.
    starts = [
        at
        for at in inspection.starts.get(unit, ())
        if not any(done - BEFORE < at < done + AFTER for done in inspection.deploys)
    ]
    gaps = [b - a for a, b in pairwise(starts)][-3:]
    age: float = inspection.clock - max(starts, default=0)
    # By itself when it crashes; else something restarts it, and as regularly as a timer does.
    is_regular = len(gaps) == 3 and max(gaps) <= 1.1 * min(gaps) + 2
    if not gaps or age > 1.5 * max(gaps) + 2 or not (restarts >= 2 or is_regular):
        return []
    up, crashed = f"up for {age:.0f} s", f"{restarts} restarts by itself"
    return [up, crashed, f"{len(starts)} starts in half an hour"]


def _seconds(text: str) -> float:
    """A time span as systemd prints it."""
    units = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
    return sum(float(n) * units.get(u, 0) for n, u in re.findall(r"([\d.]+)(us|ms|min|s|h)", text))


def _throttled(
    inspection: Inspection, unit: str, state: dict[str, str], processes: Sequence[Process]
) -> Iterator[tuple[str, str]]:
    """What limits a unit, and the key of the cause that this is."""
    # Its slices hold it too; where the control groups cannot be read, systemd knows all the same.
    around = ["system.slice", "system-turnserver.slice"][: 2 if "@" in unit else 1]
    for name in ("", *around):
        of, where = (inspection.unit(name), f" of {name}") if name else (state, "")
        quota = of.get("CPUQuotaPerSecUSec", "infinity")
        if quota != "infinity" and _seconds(quota) < 1:
            yield "unit-throttled", f"CPUQuota={100 * _seconds(quota):.0f}%{where}"
        for key, least in _LEAST.items():
            if of.get(key, "").isdigit() and int(of[key]) < least:
                yield "unit-throttled", f"{key}={of[key]}{where}"
    for name, file, value in inspection.limits:
        first, _, second = value.partition(" ")
        kind = file.rpartition("/")[2]
        least = int(second) if kind == "cpu.max" else _LEAST_OF.get(kind, 0)
        if name == unit and first.isdigit() and int(first) < least:
            yield "unit-throttled", f"{file} is {value}"
    for p in processes:
        if p.nice > 0 or p.policy == 5:
            shown = f"process {p.pid} has nice {p.nice}, scheduling policy {p.policy}"
            yield "unit-throttled", shown
        if 0 < p.cpus < inspection.cpus:
            shown = f"process {p.pid} may use {p.cpus} of {inspection.cpus} processors"
            yield "unit-throttled", shown
        if p.files_max and (p.files_max < 4096 or p.files > 0.8 * p.files_max):
            shown = f"process {p.pid} has {p.files} files open and may have {p.files_max}"
            yield "unit-limits", shown
            break
    most = state.get("LimitNOFILE", "")
    if most.isdigit() and int(most) < 65536:
        yield "unit-limits", f"LimitNOFILE={most}"


def _boot(seen: Seen) -> Iterator[Cause]:
    """What else starts, or does not, at the next boot."""
    facts, inspection, release = seen.facts, seen.inspection, seen.node.release
    for unit, of in (
        (FIREWALL, "the packet filter"),
        ("callready-boot.service", "what ends a deploy that was cut"),
    ):
        state, is_filter = inspection.unit(unit), unit == FIREWALL
        if not state or not facts.folder or (is_filter and RULES not in release.files):
            continue
        load, enabled, active = (
            state.get(key) for key in ("LoadState", "UnitFileState", "ActiveState")
        )
        # Without a table the filter itself is not loaded, which is said there.
        failed = is_filter and seen.has_table and active != "active"
        if load == "masked" or enabled != "enabled" or failed:
            how = "failed or stopped" if enabled == "enabled" else enabled or "gone"
            how = "masked" if load == "masked" else how
            yield seen.cause(
                "filter-off-at-boot" if is_filter else "unit-disabled",
                Place.NEXT,
                f"{of} is not loaded at boot: {unit} is {how}",
                f"systemctl unmask {unit}; systemctl enable {unit}; deploy again",
                f"{load}, {enabled or 'no unit file'}, {active}",
                checks=("test_firewall", "test_files", "test_release"),
                latent=True,
            )
    if inspection.target not in ("multi-user.target", "graphical.target", ""):
        yield seen.cause(
            "boot-target",
            Place.NEXT,
            f"the host boots into {inspection.target}, in which no service starts",
            "systemctl set-default multi-user.target",
            f"systemctl get-default: {inspection.target}",
            latent=True,
        )
    for unit in release.masks:
        state = inspection.unit(unit)
        if state.get("LoadState") == "loaded":
            runs = state.get("ActiveState") == "active"
            yield seen.cause(
                "unit-unmasked",
                Place.UNIT if runs else Place.NEXT,
                f"Debian's own {unit} {'runs' if runs else 'may start'} beside callready's, "
                "as an open relay",
                f"systemctl mask --now {unit}",
                f"{state.get('LoadState')}, {state.get('ActiveState')}",
                checks=("test_packages", "test_listeners"),
                latent=not runs,
            )
