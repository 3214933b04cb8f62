"""Gradual pruning inside a Hugging Face Trainer."""
