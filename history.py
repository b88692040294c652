"""Who deployed what when: pyinfra inventories/prod history.py"""

from pyinfra import host, inventory

from callready import operations

operations.history(inventory, host)
