"""The result of a run as files that inference engines read, and the proof that they hold what was trained.

``modelopt.py`` writes ModelOpt's unified Hugging Face layout from any tensor x pipeline division, ``manifest.py``
remembers what was written, ``verify.py`` reads the files back as a client would, sharing no code with the writer.
"""
