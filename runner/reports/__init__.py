"""Comparison of runs, as figures and as an HTML page."""
