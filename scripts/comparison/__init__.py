"""What `compare_optimizers.py` consists of: the form of studies, their runs, and tables of results."""
