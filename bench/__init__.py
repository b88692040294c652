"""Side-by-side measurements: callready, plain pyinfra, Ansible and bare ssh on the same hosts."""
