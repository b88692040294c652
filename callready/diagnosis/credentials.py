"""What lets callers and operators in, and nobody else: the clock, secrets, the app's environment,
certificates and their renewal, SSH."""

from __future__ import annotations

from collections.abc import Iterator

from callready.diagnosis.inspection import workers
from callready.diagnosis.model import Cause, Place
from callready.diagnosis.seen import OF_CALLS, OF_MONITOR, OF_SIGNALLING, OF_TURN, Seen
from callready.release.declaration import ROOT
from callready.release.plan import row_hash
from callready.settings.pools import unit as turn_unit

NEAR_END = 14  # days that a certificate has left when its renewal is late
# Tables of coturn's: of secrets, and of what does no harm to its callers.
_SECRETS = ("turn_secret", "turnusers_lt", "oauth_key")
_HARMLESS = (*_SECRETS, "admin_user", "allowed_peer_ip")
_PASSWORDS = ("passwordauthentication", "kbdinteractiveauthentication", "permitemptypasswords")


def causes(seen: Seen) -> Iterator[Cause]:
    """Whoever is kept out, and whoever gets in."""
    yield from _clock(seen)
    yield from _databases(seen)
    yield from _environments(seen)
    yield from _certificates(seen)
    yield from _fleet_certificates(seen)
    yield from _renewal(seen)
    yield from _ssh(seen)


def _clock(seen: Seen) -> Iterator[Cause]:
    skew = seen.facts.skew
    if abs(skew) <= seen.node.settings.host.max_clock_skew:
        return
    clocks = seen.inspection.clocks.items()
    of_monitor = OF_MONITOR if seen.node.settings.watches else ()
    kept = [f"{unit} {state}" for unit, state in clocks if state != "inactive"]
    yield seen.cause(
        "clock-off",
        Place.CLOCK,
        f"the host's clock is {skew:+.0f} s off: credentials and tokens have expired or are not "
        "valid yet",
        "timedatectl set-ntp true; systemctl restart systemd-timesyncd",
        f"{skew:+.1f} s from this machine's",
        *(kept or ["nothing keeps its time"]),
        breaks=seen.flows(),
        checks=("test_system", "test_renewal", *OF_SIGNALLING, *OF_TURN, *OF_CALLS, *of_monitor),
    )


def _databases(seen: Seen) -> Iterator[Cause]:
    for path, rows in seen.node.release.databases.items():
        of = f"coturn's database of pool {_pool(path)}"
        wanted, have = {row_hash(row) for row in rows}, seen.facts.rows.get(path, set())
        missing, extra = wanted - have, have - wanted
        if missing:
            yield seen.cause(
                "secret-differs",
                Place.CREDENTIAL,
                f"{of} has not the inventory's secret: its callers get 401",
                "deploy again",
                f"{path}: {len(missing)} of {len(wanted)} rows missing, {len(extra)} others there",
                breaks=seen.flows(turn_unit(_pool(path))),
                checks=("test_secrets", *OF_TURN, *OF_CALLS),
            )
        elif extra:
            yield seen.cause(
                "secret-foreign",
                Place.CREDENTIAL,
                f"{of} has {len(extra)} secrets or users that are not the inventory's: who knows "
                "them relays through this host",
                f"deploy again, which removes them; who wrote them ({path})",
                f"{path}: rows {', '.join(sorted(extra))}",
                checks=("test_secrets",),
            )
    for path, table, row in seen.inspection.foreign_rows:
        pool, is_harmless = _pool(path), table in _HARMLESS
        yield seen.cause(
            "secret-foreign" if table in _SECRETS else "turn-database",
            Place.CREDENTIAL if is_harmless else Place.CONFIGURATION,
            f"coturn's database of pool {pool} has a row that nobody put there by the inventory: "
            f"{table} {row}",
            f"sqlite3 {path} 'select * from {table}', and delete it",
            f"{path}: {table} {row}",
            breaks=() if is_harmless else seen.flows(turn_unit(pool)),
            checks=("test_secrets", *(() if is_harmless else OF_TURN)),
        )


def _pool(database: str) -> str:
    return database.rpartition("/")[2].removesuffix(".db")


def _environments(seen: Seen) -> Iterator[Cause]:
    for path, wanted in seen.node.release.environments.items():
        found = seen.facts.environments.get(path)
        if not found or found.sha256 != wanted.sha256:
            what = "has not LiveKit's and coturn's keys: the tokens it mints are refused"
            yield seen.cause(
                "env-differs",
                Place.APP,
                f"the app's {path} {what if found else 'is missing: it mints no tokens'}",
                "deploy again; who edited it",
                checks=("test_environment", "test_call_from_the_app", "test_tokens", "test_health"),
            )
        elif (found.mode, found.owner) != (0o600, wanted.owner):
            yield seen.cause(
                "env-readable",
                Place.APP,
                f"others may read the API secret, or the app may not: {path} is "
                f"{found.mode:04o} of {found.owner}",
                f"chmod 600 {path}; chown {wanted.owner} {path}",
                f"mode {found.mode:04o}, owner {found.owner}",
                checks=("test_environment",),
                latent=True,
            )
    for item in workers(seen.node):
        count = seen.inspection.children.get(item.unit, item.count)
        hangs = any(p.state in "Tt" for p in seen.inspection.processes if p.unit == item.unit)
        is_active = seen.inspection.unit(item.unit).get("ActiveState") == "active"
        if count != item.count and is_active and not hangs:
            yield seen.cause(
                "workers-missing",
                Place.APP,
                f"{item.unit} has {count} workers instead of {item.count}",
                f"journalctl -u {item.unit}; systemctl restart {item.unit}",
                f"{count} children of its main process",
                checks=("test_workers",),
            )


def _certificates(seen: Seen) -> Iterator[Cause]:
    facts, inspection, place = seen.facts, seen.inspection, Place.CERTIFICATE
    changed = {what.split()[0] for what in seen.changed("certificate")}
    checks = ("test_certificate*", "test_tls_versions")
    for name, pair in seen.node.release.certificates.items():
        fits, end = inspection.pairs.get(name, (True, 0))
        serial, left = pair.serial or facts.serials.get(name, ""), (end - inspection.clock) / 86400
        units = dict.fromkeys(unit for _, unit in pair.endpoints)
        # TLS alone suffers; UDP has none.
        breaks = tuple(f for unit in units for f in seen.flows(unit) if f.proto == "tcp")
        if not fits:
            if any(r.answer != "yes" for r in inspection.reads if f"/tls/{name}/" in r.path):
                continue  # said with the file
            yield seen.cause(
                "certificate-differs",
                Place.NEXT,
                f"certificate and key of {name} do not belong together: the next start or "
                "reload has no TLS",
                "deploy again",
                pair.path("fullchain.pem"),
                checks=checks,
                latent=True,
            )
            continue
        if name in changed:
            what = f"the host's certificate of {name} is not the inventory's"
            shown = f"serial {facts.serials.get(name, 'none')}" + ", expired" * (end and left < 0)
            yield seen.cause(
                *("certificate-differs", place, what, "deploy again", shown),
                breaks=breaks,
                checks=checks,
            )
            continue
        if end and left < NEAR_END:
            ends = "has ended" if left < 0 else f"ends in {left:.0f} days"
            yield seen.cause(
                "certificate-near-end",
                place,
                f"the certificate of {name} {ends}",
                "renew it: certbot renew on the host, or the files that the inventory names; "
                "deploy again",
                f"{left:.1f} days left",
                breaks=breaks if left < 0 else (),
                checks=checks,
                latent=left >= 0,
            )
        for endpoint, unit in pair.endpoints:
            served = facts.served.get((endpoint, name), "")
            if served not in ("", serial) and inspection.unit(unit).get("ActiveState") == "active":
                yield seen.cause(
                    "certificate-differs",
                    place,
                    f"{unit} serves another certificate of {name} than the one on the host",
                    f"systemctl reload {unit}",
                    f"serial {served} on {endpoint}, {serial} in the file",
                    breaks=breaks,
                    checks=checks,
                )
                break


def _fleet_certificates(seen: Seen) -> Iterator[Cause]:
    for kind, why in seen.refused.items():
        units = [unit for unit in seen.node.release.services if kind in seen.kinds(unit)]
        is_later = kind in seen.ageing
        suffer = () if is_later else [check for unit in units for check in seen.checks(unit)]
        yield seen.cause(
            "fleet-certificate",
            Place.NEXT if is_later else Place.CERTIFICATE,
            f"the host's certificate of the fleet for {kind} is not good: {why}",
            "deploy again, which gives it another",
            f"{ROOT}/fleet/{kind}",
            breaks=() if is_later else tuple(f for unit in units for f in seen.flows(unit)),
            checks=("test_certificate_file", *suffer),
            latent=is_later,
        )


def _renewal(seen: Seen) -> Iterator[Cause]:
    for timer, service in seen.node.release.timers.items():
        state, last = seen.inspection.unit(timer), seen.inspection.unit(service)
        masked = [u for u, s in ((timer, state), (service, last)) if s.get("LoadState") == "masked"]
        load, enabled, active = (
            state.get(key) for key in ("LoadState", "UnitFileState", "ActiveState")
        )
        if masked or (enabled, active) != ("enabled", "active"):
            why = f"{masked[0]} is masked" if masked else f"{timer} does not run"
            yield seen.cause(
                "timer-off",
                Place.NEXT,
                f"certificates do not renew: {why}",
                f"systemctl unmask {timer} {service}; systemctl enable --now {timer}",
                f"{load}, {enabled}, {active}",
                checks=("test_renewal", "test_files"),
                latent=True,
            )
        elif last.get("ActiveState") == "failed":
            yield seen.cause(
                "renewal-failed",
                Place.NEXT,
                f"the renewal of certificates failed: {service}",
                f"journalctl -u {service}",
                f"result {last.get('Result')}",
                checks=("test_renewal",),
                latent=True,
            )


def _ssh(seen: Seen) -> Iterator[Cause]:
    on = {(user, key) for user, key, value in seen.inspection.ssh if value == "yes"}
    if by := [key for key in _PASSWORDS if any(k == key for _, k in on)]:
        root = ", of root too" if ("root", "permitrootlogin") in on else ""
        yield seen.cause(
            "ssh-password",
            Place.CONFIGURATION,
            f"SSH takes passwords{root}: strangers try them all day",
            "PasswordAuthentication no and KbdInteractiveAuthentication no in "
            "/etc/ssh/sshd_config.d; systemctl reload ssh",
            f"sshd -T: {' yes, '.join(by)} yes",
            *seen.inspection.ssh_files,
            latent=True,
        )
