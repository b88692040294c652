"""deploy.py as it is, for the fault tests: it writes down its steps, stands still at the point that
FAULTS_HOLD names, and renders templates with FAULTS_PATCH, all without a hook in the product.

FAULTS_HOLD is a step on the host ("write_rows#1": before its second, or last, `write_rows`;
`/run/held` is there while it waits) or one of CONTROLLER (FAULTS_FOLDER/held). Whoever removes the
mark lets it go on.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

from callready.release import declaration as release
from callready.rollout import rollout
from callready.rollout import ssh as reach

FOLDER, HOLD = Path(os.environ["FAULTS_FOLDER"]), os.environ.get("FAULTS_HOLD", "")
PATCH: dict[str, tuple[str, str]] = json.loads(os.environ.get("FAULTS_PATCH", "{}"))
WAIT = ": > /run/held; for n in $(seq 900); do [ ! -e /run/held ] || sleep 0.1; done"
# What the controller does about a host, in this order, but for running its steps.
CONTROLLER = {
    "look": (reach, "families"),
    "connect": (rollout, "_refused"),
    "gate": (rollout.Rollout, "_probe"),
}


def before(module: object, name: str, action: Callable[..., None]) -> None:
    """Have `action` run before every call of a function, with its arguments."""
    function = getattr(module, name)

    @wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        action(*arguments)
        return function(*arguments, **options)

    setattr(module, name, wrapper)


def stand_still(*arguments: Any) -> None:
    """On the controller, once, and not for a gate that only looks ahead."""
    mark = FOLDER / "held"
    if (FOLDER / "was-held").exists() or len(arguments) > 3:
        return
    (FOLDER / "was-held").touch()
    mark.touch()
    for _ in range(900):
        if not mark.exists():
            return
        time.sleep(0.1)


def phases(plan: release.Plan) -> list[list[str]]:
    """A plan's steps as they are sent to the host."""
    return [p for p in (plan.base, plan.prepare + plan.switch, plan.keep, plan.prune) if p]


def note_steps(self: Any, _hosts: Any, deployments: dict[str, Any], *_: Any) -> None:
    """What the deploy will do on its host, for the tests to enumerate; where it stands still."""
    for name, deployment in deployments.items():
        steps = phases(deployment.plan)
        (FOLDER / f"steps-{name}.json").write_text(json.dumps(steps))
        held, _, which = HOLD.partition("#")
        names = [step.split()[0] for phase in steps for step in phase]
        places = [n for n, step in enumerate(names) if step == held]
        if places:
            deployment.node.release.__dict__["hold"] = places[: int(which) + 1][-1]


def patched_bundle(bundle: Callable[..., str]) -> Callable[..., str]:
    def wrapper(self: release.Release, steps: Iterable[str]) -> str:
        steps = list(steps)
        first = self.__dict__.setdefault("steps_sent", 0)
        self.__dict__["steps_sent"] += len(steps)
        if 0 <= (place := self.__dict__.get("hold", -1) - first) < len(steps):
            steps.insert(place, WAIT)
        return bundle(self, steps)

    return wrapper


def patched_render(render: Callable[..., bytes]) -> Callable[..., bytes]:
    def wrapper(template: str, **context: Any) -> bytes:
        body = render(template, **context)
        if template in PATCH:
            old, new = (part.encode() for part in PATCH[template])
            assert old in body, f"{template} has no {old!r}"
            body = body.replace(old, new)
        return body

    return wrapper


if not hasattr(rollout, "is_held"):  # pyinfra runs this file once a host
    rollout.is_held = True  # type: ignore[attr-defined]
    before(rollout.Rollout, "__init__", note_steps)
    release.Release.bundle = patched_bundle(release.Release.bundle)  # type: ignore[method-assign]
    release.render = patched_render(release.render)
    if HOLD in CONTROLLER:
        before(*CONTROLLER[HOLD], stand_still)

exec(compile(Path("deploy.py").read_text(), "deploy.py", "exec"))
