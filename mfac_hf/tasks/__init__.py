"""Tasks: data to features, and predictions to metrics."""
