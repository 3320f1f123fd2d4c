"""What in the documents is made from the code; ``python -m tests.support.docs`` writes it into them."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

from node.config import SETTINGS, NodeConfig

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
TABLE = re.compile(r"(<!-- settings:.*?-->\n)(.*?)(\n<!-- end of settings -->)", re.S)


def settings_table() -> str:
    lines = ["| setting | default | bounds | meaning |", "|---|---|---|---|"]
    defaults = {each.name: each.default for each in fields(NodeConfig)}
    for name, setting in SETTINGS.items():
        bounds = ""
        if setting.low is not None:
            bounds = f"from {setting.low}" + (f" to {setting.high}" if setting.high is not None else "")
        about = setting.doc.replace("|", "\\|") + (" (of the whole cluster)" if setting.shared else "")
        lines.append(f"| `{name}` | {_default(defaults.get(name, MISSING))} | {bounds} | {about} |")
    return "\n".join(lines)


def _default(value: object) -> str:
    if value is MISSING or value == "" or isinstance(value, Path):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def written(text: str) -> str:
    """docs/operations.md with the table as it is now."""
    return TABLE.sub(lambda found: found[1] + settings_table() + found[3], text)


if __name__ == "__main__":
    OPERATIONS.write_text(written(OPERATIONS.read_text("utf-8")), "utf-8")
