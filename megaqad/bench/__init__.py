"""Measurements that print one JSON object each: ``megaqad bench kl``, ``bench nvfp4``, ``bench step``."""
