"""Test suites for those who extend nas."""
