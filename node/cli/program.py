"""The commands put together, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from node.cli import benches, certs, clusters, demos, queues, schedules, suspects, tasks, watching
from node.cli.output import BAD_USAGE, DONE, FAILED, INTERRUPTED, CliError, note, print_json
from node.cluster import ClusterError
from node.config import ConfigError

# The root of what a wrong command line raises; under which module name it stands differs by typer's version.
USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]


PLUGINS = "oncekeeper.commands"
"""The entry point group of commands that other packages bring: a typer.Typer is a group, a function a command."""


def build(asked: str = "") -> typer.Typer:
    """``asked`` is the command that was typed: what it does not need is not even looked for."""
    program = typer.Typer(
        name="oncekeeper",
        help="Tasks that take effect exactly once.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["--help", "-h"]},
        pretty_exceptions_enable=False,
    )
    program.command("demo")(demos.demo)
    program.command("bench")(benches.bench)
    program.add_typer(clusters.cluster_app, name="cluster")
    program.command("node")(clusters.node)
    program.add_typer(clusters.config_app, name="config")
    program.add_typer(certs.certs_app, name="certs")
    program.command("nodes")(watching.nodes)
    program.command("status")(watching.status)
    program.command("wait")(watching.wait)
    program.command("submit")(tasks.submit)
    program.add_typer(tasks.task_app, name="task")
    program.command("why")(tasks.why)
    program.add_typer(suspects.suspect_app, name="suspect")
    program.add_typer(queues.queue_app, name="queue")
    program.add_typer(schedules.schedule_app, name="schedule")
    ours = {each.name for each in program.registered_commands} | {
        each.name for each in program.registered_groups
    }
    if asked not in ours:
        _plug_in(program)
    return program


def _plug_in(program: typer.Typer) -> None:
    from importlib.metadata import entry_points

    for each in sorted(entry_points(group=PLUGINS), key=lambda one: one.name):
        command = each.load()
        if isinstance(command, typer.Typer):
            program.add_typer(command, name=each.name)
        else:
            program.command(each.name)(command)


def run(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        code = build(arguments[0] if arguments else "")(arguments, standalone_mode=False)
        sys.stdout.flush()
    except CliError as error:
        return _fail(as_json, str(error), error.code, error.details)
    except ConfigError as error:
        return _fail(as_json, str(error), BAD_USAGE, {"field": error.field} if error.field else {})
    except ClusterError as error:
        return _fail(as_json, str(error), FAILED)
    except USAGE_ERROR as error:
        return _fail(as_json, _usage_text(error, as_json), BAD_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(as_json, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output (head, less) has seen enough. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if not _is_products(error):
            raise  # a defect of ours: the traceback is what helps
        return _fail(as_json, str(error), FAILED)
    if code == INTERRUPTED:
        return _fail(as_json, "interrupted", INTERRUPTED)
    return code if isinstance(code, int) else DONE


def _is_products(error: Exception) -> bool:
    # Looked up and not imported: importing the product takes as long as all that `status` does.
    errors = sys.modules.get("oncekeeper.errors")
    return errors is not None and isinstance(error, errors.OncekeeperError)


def _usage_text(error: Any, as_json: bool) -> str:
    text = str(error.format_message())
    context = getattr(error, "ctx", None)
    return text if as_json or context is None else f"{text}\nTry: {context.command_path} --help"


def _fail(as_json: bool, message: str, code: int, details: dict[str, object] | None = None) -> int:
    if as_json:
        print_json({"error": message, **{key: value for key, value in (details or {}).items() if value}})
    else:
        note(f"error: {message}")
    return code
