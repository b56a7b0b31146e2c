"""Fused models on disk: their structure as data, and files that hold it beside the weights."""
