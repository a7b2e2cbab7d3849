"""Recorded runs, compared as text and as a page."""
