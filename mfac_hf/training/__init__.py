"""What the scripts share: flags, runs and results."""
