"""posttrain: the open post-training pipeline for DeepSeek-Sparse-Attention models."""

__version__ = "0.1.0"
