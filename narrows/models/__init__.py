"""The small reference networks: written to be read, with their recipes and weights.

Each network is one sub-package; nothing heavy is imported until a model is loaded.
"""
