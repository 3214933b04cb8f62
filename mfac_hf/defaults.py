"""Default settings that the library, the scripts and the command line share; importing them costs no torch."""

__all__ = ["MFAC_DAMPING", "MFAC_LEARNING_RATE", "MFAC_NUM_GRADS", "TOUCHED_EMBEDDING_ROWS"]

# Of `mfac_hf.MFAC`: those of the published runs.
MFAC_LEARNING_RATE = 1e-4
MFAC_NUM_GRADS = 1024
MFAC_DAMPING = 1e-6

# Of `mfac_hf.memory_estimate`: rows of an embedding table that one batch looks up.
TOUCHED_EMBEDDING_ROWS = 512
