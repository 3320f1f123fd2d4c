"""Every scenario, by its number in RELIABILITY and its name."""

from __future__ import annotations

from chaos.scenarios.cuts import CUTS
from chaos.scenarios.deaths import DEATHS
from chaos.scenarios.disks import DISKS
from chaos.scenarios.handlers import HANDLERS
from chaos.scenarios.run import Scenario

CATALOG: dict[str, Scenario] = {
    each.name: each for each in sorted((*CUTS, *DEATHS, *DISKS, *HANDLERS), key=lambda one: one.number)
}
SETS = ("all", "smoke")


def chosen(name: str) -> list[Scenario]:
    """One scenario, or a set of them; KeyError for a name that is neither."""
    if name == "all":
        return list(CATALOG.values())
    if name == "smoke":
        return [each for each in CATALOG.values() if each.smoke]
    return [CATALOG[name]]
