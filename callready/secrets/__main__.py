"""Complete the secrets of an inventory: python -m callready.secrets inventories/ENV"""

from __future__ import annotations

import os
import secrets
import sys

from callready.secrets import sops
from callready.secrets.store import Store, references, sharing
from callready.settings.fields import secret_fields
from callready.settings.inventory import inventory_data
from callready.settings.problem import SettingsError


def complete(inventory: str, recipients: str = "") -> tuple[list[str], str]:
    """Generate every secret that the inventory refers to and the store does not have; with
    `recipients` (public keys), make a `.sops.yaml` first, which has the store encrypted.

    Secrets that belong to something else (sudo, SSH, Redis, DNS, free keys, and whatever is not
    known) cannot be generated and are returned as names to be filled in by hand. Nothing that
    exists is overwritten. Also returns how the store is encrypted. Raises SettingsError.
    """
    store = Store(inventory)
    entries = store.read()
    wanted: set[str] = set()
    ours: set[str] = set()
    theirs: set[str] = set()
    for data in inventory_data(inventory).values():
        made = {
            at
            for field in secret_fields(data)
            if not field.origin.by_hand
            for at, _ in references(field.value, field.path)
        }
        for at, name in references(data):
            wanted.add(name)
            if at in made:
                ours.add(name)
            elif not at.startswith("_"):  # a variable of the inventory's file says nothing
                theirs.add(name)
    theirs |= wanted - ours
    if wrong := [f"{inventory}: {message}" for message in sharing(wanted)]:
        raise SettingsError("\n".join(wrong))
    if recipients:
        print(f"wrote {sops.create_config(store.path, recipients)}")
    missing = sorted(name for name in wanted if not store.lookup(entries, name))
    for name in missing:
        if name not in theirs:
            entries[name] = secrets.token_urlsafe(32)
            print(f"generated {name}")
    return [name for name in missing if name in theirs], store.write(entries)


def main() -> int:
    """The `make secrets` command."""
    if len(sys.argv) != 2:
        print("usage: python -m callready.secrets inventories/ENV", file=sys.stderr)
        return 2
    inventory = sys.argv[1]
    try:
        by_hand, encrypted = complete(inventory, os.environ.get("RECIPIENTS", ""))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    path = f"{inventory}.secrets.yaml"
    how = f"with: sops {path}" if encrypted else "by hand"
    for name in by_hand:
        print(f"{path}: add {name} {how}, it belongs to something that exists")
    if by_hand:
        print("not complete yet")
    else:
        print(f"{path} is complete" + (f", {encrypted}" if encrypted else ""))
    return 1 if by_hand else 0


if __name__ == "__main__":
    sys.exit(main())
