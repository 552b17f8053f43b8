"""Knows process groups: tensor and pipeline parallelism, the DeepSpeed engine, the device."""
