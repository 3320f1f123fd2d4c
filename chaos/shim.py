"""Clock and disk faults in one node: a small library (native/shim.c) put before the C library's functions.

Compiled when it is first needed, into the folder of the run; told what to do by a file that the processes map, so a
fault strikes and heals in a running node.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "native" / "shim.c"
PAGE = 4096


def no_compiler() -> str:
    """Why it cannot be had here; empty if it can."""
    return "" if _compiler() else "there is no C compiler (cc) for the library that bends clocks and disks"


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class Shim:
    def __init__(self, folder: Path, name: str) -> None:
        self._library = folder / "shim.so"
        self._told = folder / f"shim-{name}"
        if not self._library.exists():
            compiler = _compiler()
            if compiler is None:
                raise RuntimeError(no_compiler())
            command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(self._library), str(SOURCE), "-ldl"]
            subprocess.run(command, check=True, capture_output=True)
        self._told.write_bytes(bytes(PAGE))

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "CHAOS_SHIM": str(self._told)}

    def tell(self, *, wall_ns: int = 0, sync_ms: int = 0, sync_errno: int = 0) -> None:
        """From now on; without arguments everything is as it is."""
        with self._told.open("r+b") as file:
            file.write(struct.pack("<3q", wall_ns, sync_ms, sync_errno))
