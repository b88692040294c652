"""The whole deployment: pyinfra inventories/prod deploy.py"""

from pyinfra import host, inventory

from callready import operations
from tasks import declare
from tasks.android import android

# Settings, secrets, files and one survey of every host: all errors at once, nothing changed yet.
run = operations.run(inventory, declare)

if deployment := run.deployments.get(host.name):
    operations.install(name="Install programs", deployment=deployment)
    operations.switch(name="Switch and confirm", deployment=deployment)
    operations.prune(name="Remove what nothing uses any more", deployment=deployment)

if "android" in host.groups:
    android(run, host)
