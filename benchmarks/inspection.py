"""Has vLLM look at models' classes in this process, which takes far less time than its own way."""


def inspect_models_here() -> None:
    """Spares vLLM the process in which it looks at each model's class when it first needs it.

    Such a process keeps a server from initialising CUDA, and imports vLLM anew: six seconds each.
    """
    from vllm.model_executor.models import registry

    vars(registry)["_run_in_subprocess"]  # fails loudly if vLLM moves it
    setattr(registry, "_run_in_subprocess", lambda inspect: inspect())  # noqa: B010
