"""Measurements that take minutes: see tests/bench/__main__.py. Nothing here is collected by pytest."""
