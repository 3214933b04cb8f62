"""The parts of the demonstration `scripts/demo.py`: its runs, and how their results are shown."""
