"""Break the lab's service in every way that we know, and judge what the verification says:
python -m tests.sabotage [--only NAME...] [--quick]

To try some again, with the file of an earlier run:
--only NAME... --add FILE --results FILE --write"""

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter

from tests.sabotage.catalogue import AGREED, CATALOGUE, PAIRS
from tests.sabotage.judging import Result, Results, page, tried
from tests.sabotage.sabotage import Service
from tests.support.breakage import remove_filters
from tests.support.fleet import LAB_INVENTORY, REPOSITORY

PAGE = REPOSITORY / "docs/sabotage.md"
GROUP = 3  # sabotages between two looks whether all is undone


def main() -> int:
    """The exit status is 0 if everything was caught, named and undone."""
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is broken is undone on the way
    at = Service.of(options.inventory)
    remove_filters(*at.hosts)
    results = Results(days=(f"{datetime.now(UTC):%Y-%m-%d}",))
    earlier = Results()
    if options.add:
        earlier = TypeAdapter(Results).validate_json(options.add.read_bytes())
    undone(results, at, options.clients)
    wanted = [(name,) for name in CATALOGUE if at.has(name)]
    wanted = [] if options.pairs else wanted
    pairs = [pair for pair in PAIRS if all(map(at.has, pair))]
    todo: list[tuple[str, ...]] = [*wanted, *pairs]
    if options.only:
        todo = [(name,) for name in options.only]
    for number, names in enumerate(todo, 1):
        began = time.monotonic()
        concerned = " or ".join(CATALOGUE[name].checks for name in names)
        some = ("-k", concerned) if options.quick else ()
        ask = options.clients and len(names) == 1 and names[0] in AGREED
        result = tried(names, at, *some, ask=ask)
        results.tried.append(result)
        show(number, len(todo), result, time.monotonic() - began)
        if (number % GROUP == 0 and not options.quick) or number == len(todo) or result.error:
            undone(results, at)
        keep(results.after(earlier), options.results)
    while len(results.clean) < options.clean:
        undone(results, at)
        keep(results.after(earlier), options.results)
    if options.write:
        PAGE.write_text(page(results.after(earlier)))
    right = all(each.is_right for each in results.tried) and not any(results.clean)
    print(f"{sum(each.is_right for each in results.tried)} of {len(results.tried)} right")
    return 0 if right else 1


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.sabotage", description=__doc__)
    parser.add_argument("--inventory", default=LAB_INVENTORY, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=CATALOGUE, metavar="NAME", help="these")
    parser.add_argument("--pairs", action="store_true", help="only the pairs")
    parser.add_argument("--quick", action="store_true", help="only the checks concerned")
    parser.add_argument("--clients", action="store_true", help="ask other clients about some too")
    parser.add_argument("--clean", type=int, default=0, help="verify so often with nothing broken")
    parser.add_argument("--results", type=Path, help="a file for what was found, as JSON")
    parser.add_argument("--write", action="store_true", help="write docs/sabotage.md")
    parser.add_argument("--add", type=Path, help="the results of an earlier run too, a file")
    return parser.parse_args()


def show(number: int, of: int, result: Result, seconds: float) -> None:
    """A line about a sabotage."""
    mark = "ok  " if result.is_right else "BAD "
    said = ", ".join(result.said) or result.error or "nothing"
    print(f"{mark}{number}/{of} {' + '.join(result.names)} ({seconds:.0f} s): {said}", flush=True)


def undone(results: Results, at: Service, ask: bool = False) -> None:
    """Look whether all is green, with `ask` by other clients too, and have it be so."""
    if not results.look(at, ask):
        print(f"BAD  not clean: {', '.join(results.clean[-1])}", flush=True)
        at.deploy()


def keep(results: Results, file: Path | None) -> None:
    """Write what was found so far."""
    if file:
        file.write_text(json.dumps(asdict(results), indent=1))


if __name__ == "__main__":
    sys.exit(main())
