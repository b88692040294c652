"""Command line of the lab: ``python -m lab --help``."""

import argparse
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lab import archive, ca, hosts, plan, recorder, wheels
from lab.lab import Lab
from lab.run import LabError, locked, say


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    # argparse would take every further "--" out of a command that is not ours to read
    own, dashes, words = _partition(arguments)
    parser = _parser()
    options = parser.parse_args(own)
    if dashes and "words" not in options:
        parser.error(f"{options.command} takes no command after --")
    if dashes:
        options.words = [*options.words, *words]
    if options.command == "client" and not options.words:
        parser.error("client needs a command: python -m lab client -- CMD ...")
    try:
        return _run(options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _partition(arguments: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    own = list(itertools.takewhile(lambda word: word != "--", arguments))
    return own, len(own) < len(arguments), list(arguments[len(own) + 1 :])


def _run(options: argparse.Namespace) -> int:
    lab = Lab()
    match options.command:
        case "up":
            names = options.hosts or (() if options.count else plan.DEFAULT_HOSTS)
            lab.up([*names, *plan.BENCH_HOSTS[: options.count]], options.suite)
            _print_status(lab)
        case "down" | "purge":
            getattr(lab, options.command)()
        case "boot" | "reboot" | "power-cut" | "reset" | "destroy" | "cut" | "mend":
            for name in options.hosts:
                getattr(lab, options.command.replace("-", "_"))(name)
        case "status":
            _print_status(lab)
        case "client":
            _become([*lab.client_prefix(), *options.words])
        case "ssh" | "root":
            _become(_ssh_command(lab, options))
        case "archive":
            with locked():
                say(f"published {archive.publish(options.version)}")
        case "wheels":
            with locked():
                say(f"published {wheels.publish()}")
        case "recorder":
            say(f"published {recorder.NAME}@{recorder.publish()}")
        case "cert":
            print(_issue(options))
    return 0


def _issue(options: argparse.Namespace) -> Path:
    host = plan.HOSTS.get(options.name.removesuffix(f".{plan.DOMAIN}"))
    name = host.fqdn if host else options.name
    addresses = options.ip or ((host.ipv4, host.ipv6) if host else ())
    if not ca.CA_CERTIFICATE.exists():
        raise LabError("the lab is down, so it has no authority: `python -m lab up` makes one")
    return ca.issue(name, addresses, options.days, options.to)


def _ssh_command(lab: Lab, options: argparse.Namespace) -> list[str]:
    if lab.state(options.host) == "absent":
        raise LabError(f"{options.host} was not made yet: `python -m lab up {options.host}`")
    words = options.words
    # One word is a shell command, several are a program with its arguments.
    command = words[0] if len(words) == 1 else shlex.join(words)
    if options.command == "root":
        command = f"sudo -n sh -c {shlex.quote(command)}" if words else "sudo -i"
    tty = ["-t"] if not words and sys.stdin.isatty() else []
    return ["ssh", "-F", str(hosts.SSH_CONFIG), *tty, options.host, *([command] if command else [])]


def _become(command: list[str]) -> None:
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        raise LabError(f"{command[0]}: no such program") from None


def _print_status(lab: Lab) -> None:
    rows = [("HOST", "SUITE", "STATE", "IPV4", "IPV6"), *lab.status()]
    if len(rows) == 1:
        print("no lab hosts")
        return
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    up = add("up", "boot hosts (sfu1 turn1 turn2 app1 unless told otherwise)")
    up.add_argument("hosts", nargs="*", metavar="HOST")
    up.add_argument(
        "--hosts",
        type=_count,
        default=0,
        dest="count",
        metavar="N",
        help=f"bench hosts h01..hNN, at most {len(plan.BENCH_HOSTS)}",
    )
    up.add_argument("--suite", choices=plan.SUITES, help="for hosts not made yet")
    add("down", "remove every trace of the lab but its cache")
    add("purge", f"like down, and remove {plan.CACHE} too")
    for name, text in (
        ("boot", "start hosts that are off"),
        ("reboot", "let hosts shut down in order and boot again"),
        ("power-cut", "SIGKILL hosts; `boot` brings them back"),
        ("reset", "bring hosts back to how they were delivered"),
        ("destroy", "throw hosts away"),
        ("cut", "cut hosts' network lines"),
        ("mend", "undo cut"),
    ):
        add(name, text).add_argument("hosts", nargs="+", metavar="HOST")
    add("status", "list the hosts")
    add("client", "run a program where the callers are").add_argument(
        "words", nargs="*", metavar="CMD"
    )
    for name, text in (("ssh", "a shell or command in a host"), ("root", "the same as root")):
        command = add(name, text)
        command.add_argument("host")
        command.add_argument("words", nargs="*", metavar="CMD")
    add("archive", "build and publish the LiveKit archive").add_argument(
        "--version", default=archive.VERSION
    )
    add("recorder", "build the stand-in for egress, and start the registry that has it")
    add("wheels", "download the packages of the synthetic caller")
    cert = add("cert", "sign a certificate with the lab's authority")
    cert.add_argument("name")
    cert.add_argument("--days", type=int, default=90, help="negative: expired that long ago")
    cert.add_argument("--ip", action="append", help="address it is valid for (may be repeated)")
    cert.add_argument("--to", type=Path, default=ca.CERTIFICATES, metavar="FOLDER")
    return parser


def _count(text: str) -> int:
    most = len(plan.BENCH_HOSTS)
    if not text.isdigit() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {most}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
