"""Figures of many faults in a row: how soon claims resume after a leader's end, and what zombies still do."""

from __future__ import annotations
