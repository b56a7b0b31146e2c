"""Showing plans and comparisons: first as a table of words, then as text or in a terminal."""
