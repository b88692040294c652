"""What the hosts have logged: pyinfra inventories/prod logs.py --limit monitor"""

from pyinfra import host, inventory

from callready import operations

operations.logs(inventory, host)
