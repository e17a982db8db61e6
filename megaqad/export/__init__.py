"""The result of a run as files that inference engines read, and the proof that they hold what was trained.

``checkpoint.py`` writes them from any tensor x pipeline division, in the layout of ``modelopt.py`` or
``compressed_tensors.py``; ``manifest.py`` remembers what was written; ``verify.py`` reads the files back as a client
would, sharing no code with the writer.
"""
