"""The search over the layers' tolerances, for a goal that the user set for the whole model.

``goal`` says what is wanted, ``levels`` divides a budget among layers, and ``budget`` measures,
divides and measures again until the goal is reached.
"""
