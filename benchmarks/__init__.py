"""Measurements that another person can repeat. They are run from a checkout's root.

Modules and packages that name a command in their docstring are started with ``python -m``. Those
that end in ``_gpu`` need an NVIDIA GPU. The others are shared: ``command`` (arguments, tables),
``timing``, ``engine`` (a vLLM engine in a process of its own), ``profiles`` and ``lists`` (made-up
profiles and selections) and ``domains`` (kinds of text). ``results`` holds what was measured.
"""
