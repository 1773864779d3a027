"""The search for a profile's levels: how the error is divided among layers.

``model_runs`` runs the whole model. ``analytic`` predicts what a division costs and gains, and
``division`` finds the best one for a budget. ``front_search`` looks for better ones, with ``bayes``
(Ax), and ``front`` compares them. ``goal`` says what a user wants, and ``goal_search`` finds the
division that reaches it; ``acceptance`` has it confirmed. ``levels`` makes the levels of all that.
"""
