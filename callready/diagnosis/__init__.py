"""Why calls fail: what was seen of hosts and paths, narrowed down to its causes."""
