"""vLLM as the tuner's and the evaluation's engine, in a process of its own.

A request goes one way: ``client`` (this process) to ``process`` (the socket) to ``host`` (vLLM's
process) to ``vllm_afbs.backends.driven`` (vLLM's workers).
"""
