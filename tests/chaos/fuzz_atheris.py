"""Coverage-guided fuzzing of every reader, with Atheris (libFuzzer for Python): ``make fuzz``.

``python tests/chaos/fuzz_atheris.py [SECONDS] [TARGET …]`` gives each target that many seconds (30), one process
each. A finding leaves the input in ``.fuzz/TARGET/crash-…`` and ends with 1; what was learnt stays in
``.fuzz/TARGET/corpus`` for the next run. Atheris is not needed for anything else: ``pip install atheris``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FINDINGS = ROOT / ".fuzz"
INPUT_BYTES_MAX = 4096
MEMORY_MB_MAX = 1024
ONE_INPUT_S_MAX = 5


def fuzz(name: str, seconds: int) -> None:
    """In this process; does not return."""
    import atheris

    # What is read is what is watched; the libraries below are C, or not ours.
    with atheris.instrument_imports(include=["raft", "dedup", "oncekeeper", "node"]):
        from tests.support.fuzz_targets import TARGETS

    home = FINDINGS / name
    corpus = home / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-rss_limit_mb={MEMORY_MB_MAX}",
        f"-timeout={ONE_INPUT_S_MAX}",
        f"-artifact_prefix={home}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name])
    atheris.Fuzz()


def main(arguments: list[str]) -> int:
    seconds = int(arguments[0]) if arguments and arguments[0].isdigit() else 30
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("Atheris is not installed: .venv/bin/python -m pip install atheris", file=sys.stderr)
        return 2
    from tests.support.fuzz_targets import TARGETS

    wanted = [each for each in arguments if not each.isdigit()] or list(TARGETS)
    if unknown := [name for name in wanted if name not in TARGETS]:
        print(f"{', '.join(unknown)}: no target; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    failed = []
    for name in wanted:
        tried = subprocess.run(
            [sys.executable, __file__, "--one", name, str(seconds)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        lines = tried.stderr.splitlines()
        runs = next((line.split()[-1] for line in lines if "number_of_executed_units" in line), "?")
        print(
            f"{name:20} {runs:>10} inputs in {seconds} s: {'FOUND' if tried.returncode else 'nothing found'}",
            flush=True,
        )
        if tried.returncode:
            failed.append(name)
            print("\n".join(line for line in tried.stdout.splitlines() + lines[-12:]), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
