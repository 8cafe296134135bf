"""Tasks: what models are trained and judged on."""

from bench.data import (  # noqa: F401  (importing a task's module registers it)
    addition,
    hub,
    kjv,
    memorisation,
    modular_chain,
    mqar,
    p_hop,
    recall,
    selective_copy,
    state_tracking,
    text_files,
)
from bench.data.task import Metric, Task, TaskData, get_task, register_task, task_class, task_names

__all__ = ["Metric", "Task", "TaskData", "get_task", "register_task", "task_class", "task_names"]
