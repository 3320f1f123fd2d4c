"""Oncekeeper: tasks that take effect exactly once."""

from oncekeeper import checks
from oncekeeper.app import App, Task, load_app
from oncekeeper.client import Client
from oncekeeper.context import CurrentTask, current_task
from oncekeeper.errors import (
    AlreadyExecuted,
    ApplicationError,
    ClusterUnreachable,
    InvalidHandler,
    InvalidSchedule,
    InvalidTask,
    LogUnusable,
    NoCluster,
    OncekeeperError,
    Refused,
    ResultLost,
    ResultTimeout,
    SecondTransaction,
    SubmitFailed,
    TaskCancelled,
    TaskFailed,
    UnencodableResult,
    UnknownSubmit,
    UnknownTask,
)
from oncekeeper.handle import Handle, Handles
from oncekeeper.handlers import CheckStrategy
from oncekeeper.schedules import every

__all__ = [
    "AlreadyExecuted",
    "App",
    "ApplicationError",
    "CheckStrategy",
    "Client",
    "ClusterUnreachable",
    "CurrentTask",
    "Handle",
    "Handles",
    "InvalidHandler",
    "InvalidSchedule",
    "InvalidTask",
    "LogUnusable",
    "NoCluster",
    "OncekeeperError",
    "Refused",
    "ResultLost",
    "ResultTimeout",
    "SecondTransaction",
    "SubmitFailed",
    "Task",
    "TaskCancelled",
    "TaskFailed",
    "UnencodableResult",
    "UnknownSubmit",
    "UnknownTask",
    "checks",
    "current_task",
    "every",
    "load_app",
]
