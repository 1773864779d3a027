"""What sparsity costs a model in quality, and how selections compare at equal sparsity.

``python -m vllm_afbs.evaluate`` asks a model the same questions dense and sparse (``suite``), in
this process (``in_process``) or through a server (``server``), and reports the difference with
confidence intervals (``comparison``, ``report``). ``baselines`` holds other ways to choose blocks,
and ``matching`` brings them to one sparsity.
"""
