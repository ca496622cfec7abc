"""Executors: where trials run, one file each."""
