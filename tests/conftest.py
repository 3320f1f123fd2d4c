"""Where the Makefile runs a suite on several processes: which tests stay together, and which go first."""

import pytest

SHARED = ("class", "module", "package")


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return  # one process: everything as it stands in its file
    for item in items:
        if shares_a_fixture(item):
            # A cluster that the tests of a file share is made once, and they follow each other on it.
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: not (item.get_closest_marker("slow") and not shares_a_fixture(item)))


def shares_a_fixture(item: pytest.Item) -> bool:
    assert isinstance(item, pytest.Function)
    return any(each[-1].scope in SHARED for each in item._fixtureinfo.name2fixturedefs.values() if each)
