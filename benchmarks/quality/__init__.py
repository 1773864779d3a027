"""Tuned profiles beside every sparse baseline at equal sparsity, on several kinds of text.

    python -m benchmarks.quality --texts python NAME=CALIBRATION,MEASURED ...
        --profile NAME=profile.json ... --output results.csv

Thresholds are tuned on a text's calibration part and measured on its other part, where one number
a method, its knob, brings all of them to the same sparsity; the last setting measures the first
text with what the second one calibrated. Of several candidates of one name (profiles of one text,
SpargeAttn's tuner at several tolerances) the one that has to be moved least counts. SpargeAttn's
tuner searches the thresholds of the served selector, as in ``tuner_arms``; with its defaults its
own selector runs. The sparsity that is reported is the one measured. Methods that come with a
setting of their own are measured with that as well. Facts to be retrieved are hidden in the first
text.
"""
