"""The bench: what the product does in a second, beside what this machine could do at best.

Real parts only: nodes are processes as `cluster up` starts them, tasks go through the client, effects are counted
in a file that is outside of the system. Every figure is a median over rounds, or a percentile over single
events, and the bare limits of disk, pipe and SQLite come from the same run: without them a figure says more
about the machine than about the product.
"""
