"""Forecasts of a run's cost, time and memory: arithmetic, and tables of the results."""
