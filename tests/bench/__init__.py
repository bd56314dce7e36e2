"""The side-by-side benchmark: this project's daemon and a containerd, on one machine, in one run.

`python -m tests.bench` (or `make bench`) runs it. Never a pass or fail of the test suite: it
prints medians, spreads and ratios, and says on what machine they were made.
"""
