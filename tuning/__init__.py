"""The tuner: from a model and texts to a profile.

In the order of a job:

1. ``engine`` says what is needed of a model, ``texts`` reads the calibration texts and ``windows``
   cuts them.
2. ``capture`` has the model run once and keeps each layer's Q, K and V.
3. ``search/`` draws the curves of one layer at a time: explore, draw, validate. ``workers`` does
   several layers side by side.
4. ``allocation/`` divides the error among layers, by what the whole model does and by the predicted
   time of attention (``cost``), and makes the profile's levels.
5. ``run`` does all of this for a job, ``journal`` keeps every finished step so that a stopped job
   can go on, and ``report`` and ``console`` show what was found.

Nothing here imports vLLM. Only ``allocation.bayes`` imports Ax, which takes seconds.
"""
