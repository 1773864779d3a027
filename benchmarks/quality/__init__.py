"""Compares tuned profiles with sparse baselines at equal sparsity, on several kinds of text.

    python -m benchmarks.quality --texts python NAME=CALIBRATION,MEASURED ...
        --profile NAME=profile.json ... --output results.csv

Thresholds are tuned on the calibration part of a text and measured on its other part. There, each
method's one number, its knob, is set so that all methods reach the same sparsity. The last setting
measures on the first text what was calibrated on the second. A name can stand for several
candidates: profiles of one text, or SpargeAttn's tuner at several tolerances. The candidate whose
knob has to be moved least counts. SpargeAttn's tuner searches thresholds for the served selector,
as in ``tuner_arms``; with its default thresholds, SpargeAttn runs its own selector. Methods with a
knob of their own are measured with it, too. The reported sparsity is the measured one. Facts for
retrieval are hidden in the first text.
"""
