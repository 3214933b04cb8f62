"""Operators `torch.ops.mfac.*`, each with a PyTorch implementation, and the build of the native kernels."""
