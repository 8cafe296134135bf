"""Studies: what their files say, and how files, presets and overrides become one."""

from bench.study.load import load_study, study_from, study_names
from bench.study.schema import Study, TaskEntry, Tune, VariantEntry

__all__ = ["Study", "TaskEntry", "Tune", "VariantEntry", "load_study", "study_from", "study_names"]
