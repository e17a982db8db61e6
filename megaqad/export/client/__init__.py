"""An exported checkpoint as its readers see it; nothing here knows how it was written.

What must be in the files comes from transformers' own model of the config, not from the project's tables, and the
numbers go through ``export.dequantizer``. Read in this order:

    files.py                JSON files and tables of contents, read without trust
    layouts.py              the words for how a tensor lies on disk
    modelopt.py             what the configuration files of ModelOpt's layout say
    compressed_tensors.py   the same of compressed-tensors'
    parameters.py           which stored tensors transformers' model is made of, experts included
    checkpoint.py           the export, opened, and its tensors looked at one by one
    rules.py                what engines take for granted, each rule once
    model.py                the export as transformers runs it, whole or one layer at a time
    libraries.py            the same files through other people's code
"""
