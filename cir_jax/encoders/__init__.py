"""Architectures: parameters and forward passes, without losses, data or file formats."""
