"""The search over one layer (``layer``), in three stages: explore, refine, validate.

``evaluator`` scores thresholds against dense attention with the served selector, and ``scorer``
counts what that costs. ``bracket`` finds each head's tau under a given theta. ``explore`` does so
roughly, for the thetas that ``bayes`` proposes. ``refine`` does so precisely, and ``validation``
has held-out text confirm the result. ``results`` holds what one stage hands to the next.
"""
