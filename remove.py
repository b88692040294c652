"""Leave nothing of callready on a host: pyinfra inventories/prod remove.py --limit HOST"""

from pyinfra import host, inventory

from callready import operations
from tasks import declare

run = operations.run(inventory, declare, "remove")

if deployment := run.deployments.get(host.name):
    operations.switch(name="Remove callready", deployment=deployment)
