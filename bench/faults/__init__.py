"""The faults of tests/faults against plain pyinfra, and the tables of docs/faults.md."""
