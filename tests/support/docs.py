"""What in the documents is made from the code: the table of settings (``python -m tests.support.docs``)."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

from node.config import SETTINGS, NodeConfig


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


if __name__ == "__main__":
    print(settings_table())
