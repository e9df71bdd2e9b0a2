"""The faults of the public reproduction, and three of a careless study, each as a small patch of the library.

Every mutant is a context manager; inside it the library has that fault. `tests/test_mutants.py` shows for each that a
check which the library passes fails on it.
"""
