"""Measures what sparsity costs a model in quality, and compares selections at equal sparsity.

``python -m vllm_afbs.evaluate`` asks a model the same questions with dense and with sparse
attention (``suite``). The model runs in this process (``in_process``) or behind a server
(``server``). ``comparison`` and ``report`` give the differences with confidence intervals.
``baselines`` holds other published ways to choose blocks, and ``matching`` sets them all to the
same sparsity.
"""
