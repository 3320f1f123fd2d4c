"""Faults on real nodes: what strikes (catalog.py), on what (nodes.py, links.py), and how a run goes (run.py)."""
