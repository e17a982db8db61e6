"""Where a run runs: device, ranks, process groups, seeds, logs.

``cpu.py`` is the only file that knows how Megatron-Core is made to work without a GPU, ``parallel.py`` lays the
ranks out, ``launch.py`` starts them on this machine. Code above this package is the same on gloo and on NCCL.
"""
