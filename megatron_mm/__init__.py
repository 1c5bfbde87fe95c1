"""megatron_mm: pre-training of MM1-style multimodal LLMs on Megatron-Core.

Importing the package imports neither torch nor Megatron-Core: each room is imported by who needs it.
"""

__version__ = "0.1.0"
