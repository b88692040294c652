"""The whole deployment: pyinfra inventories/prod deploy.py"""

from pyinfra import host, inventory

from callready import operations
from tasks import declare
from tasks.android import android

# Settings, secrets, files and one survey of every host: all errors at once, nothing changed yet.
here = operations.deployments(inventory, declare)

if host.name in here:
    operations.release(name="Bring the host to its release", deployment=here[host.name])

if "android" in host.groups and operations.verb(inventory) == "deploy":
    android(operations.load_fleet(inventory), host)
