"""Plots, tables and the page of a study, from stored results alone: no model is run and none is imported.

Nothing is imported here: the processes that render figures start the sooner.
"""
