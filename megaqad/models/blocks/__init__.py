"""What layers are made of, one file per kind of block.

A block is a frozen record of its own sizes. It names its weights, builds its Megatron module, refuses divisions that
it cannot have, and knows what a token costs. ``models/families`` puts blocks together; nothing else names a tensor.
"""
