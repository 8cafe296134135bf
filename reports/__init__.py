"""Plots, tables and the page of a study, from stored results alone: no model is run and none is imported."""

from reports.page import write
from reports.read import read
from reports.table import summary, summary_table

__all__ = ["read", "summary", "summary_table", "write"]
