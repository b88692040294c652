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

from callready.release import declaration
from callready.release.bundle import bundle
from callready.release.declaration import Release
from callready.release.plan import Plan, Step
from callready.release.render import render
from callready.rollout import rollout, ssh

FOLDER, HOLD = Path(os.environ["FAULTS_FOLDER"]), os.environ.get("FAULTS_HOLD", "")
PATCH: dict[str, tuple[str, str]] = json.loads(os.environ.get("FAULTS_PATCH", "{}"))
WAIT = ": > /run/held; for n in $(seq 900); do [ ! -e /run/held ] || sleep 0.1; done"
# What the controller does about a host, in this order, but for running its steps.
CONTROLLER = {
    "look": (ssh, "families"),
    "connect": (rollout.Rollout, "_unreachable"),
    "gate": (rollout.Rollout, "_ask"),
}


class Wait(Step):
    """Stands still on the host."""

    @property
    def line(self) -> str:
        return WAIT


def before(module: object, name: str, action: Callable[..., None]) -> None:
    """Have `action` run before every call of a function, with its arguments."""
    function = getattr(module, name)

    @wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        action(*arguments)
        return function(*arguments, **options)

    setattr(module, name, wrapper)


def stand_still(*arguments: Any) -> None:
    """On the controller, once, and not for a gate that only looks ahead (within 0 s)."""
    mark = FOLDER / "held"
    if (FOLDER / "was-held").exists() or arguments[-1] == 0:
        return
    (FOLDER / "was-held").touch()
    mark.touch()
    for _ in range(900):
        if not mark.exists():
            return
        time.sleep(0.1)


def phases(plan: Plan) -> list[list[Step]]:
    """A plan's steps as they are sent to the host."""
    return [s for s in (plan.installing, plan.switching, plan.confirming, plan.pruning) if s]


def note_steps(self: Any, _hosts: Any, deployments: dict[str, Any], *_: Any) -> None:
    """What the deploy will do on its host, for the tests to enumerate; where it stands still."""
    for name, deployment in deployments.items():
        steps = phases(deployment.plan)
        lines = [[step.line for step in phase] for phase in steps]
        (FOLDER / f"steps-{name}.json").write_text(json.dumps(lines))
        held, which = (HOLD.partition("#")[n] for n in (0, 2))
        names = [step.function for phase in steps for step in phase]
        places = [n for n, function in enumerate(names) if function == held]
        if places:
            deployment.node.release.__dict__["hold"] = places[: int(which) + 1][-1]


def patched_bundle(bundle: Callable[..., str]) -> Callable[..., str]:
    def wrapper(release: Release, steps: Iterable[Step]) -> str:
        made, state = list(steps), release.__dict__
        first = state.setdefault("steps_sent", 0)
        state["steps_sent"] += len(made)
        if 0 <= (place := state.get("hold", -1) - first) < len(made):
            made.insert(place, Wait("wait", ()))
        return bundle(release, made)

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
    vars(rollout)["bundle"] = patched_bundle(bundle)
    vars(declaration)["render"] = patched_render(render)
    if HOLD in CONTROLLER:
        before(*CONTROLLER[HOLD], stand_still)

name = os.environ.get("FAULTS_DEPLOY", "deploy.py")
exec(compile(Path(name).read_text(), name, "exec"))
