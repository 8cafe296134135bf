"""Tasks: what models are trained and judged on."""

from bench.data import hub, kjv, p_hop, text_files  # noqa: F401  (importing a task's module registers it)
from bench.data.task import Metric, Task, TaskData, get_task, register_task, task_class, task_names

__all__ = ["Metric", "Task", "TaskData", "get_task", "register_task", "task_class", "task_names"]
