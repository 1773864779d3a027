"""The search over one layer (``layer``): explore short contexts, draw curves, validate.

``evaluator`` scores thresholds against dense attention with the served selector, and ``scorer``
counts what that costs. ``bracket`` finds each head's tau for several tolerances at once, on the
scale of ``depth``. What it measured is a ``curve``, off which every tolerance is read. ``explore``
does so roughly on short contexts, and ``validation`` has held-out text confirm the result.
``results`` holds what one stage hands to the next.
"""
