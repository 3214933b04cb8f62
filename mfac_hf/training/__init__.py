"""What the training scripts share: arguments, runs and their results."""
