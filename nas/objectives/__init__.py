"""Objectives: what a trial is judged by, one file each."""
