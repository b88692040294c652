"""Return to the release before, as safely as a deploy: pyinfra inventories/prod rollback.py"""

from pyinfra import host, inventory

from callready import operations
from tasks import declare

run = operations.run(inventory, declare, "rollback")

if deployment := run.deployments.get(host.name):
    operations.switch(name="Return to the release before", deployment=deployment)
