"""The engine: schedules, models, costs, tasks, training, cells and their store. It knows no particular variant."""

from bench import house

house.settle()
