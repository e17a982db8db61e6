"""Hugging Face checkpoints <-> Megatron-Core shards.

``description.py`` reads config.json, ``families.py`` is the table that says which tensors a family has and how they
map and shard, ``rows.py`` is that table for one model, and everything else reads these: ``checks.py`` refuses bad
input, ``build.py`` makes the model, ``hf_reader.py`` fills it, ``hf_writer.py`` takes it apart again.
"""
