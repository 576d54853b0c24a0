"""How good samples are: `evaluate` modules over features, one folder each, as they can be pushed as metric Spaces.

They know no images and no model: what they compare are features, numbers per image from any extractor. Needs the `eval`
extra.
"""

from pathlib import Path

import evaluate

METRICS = ("frechet_distance", "kernel_distance", "inception_score", "precision_recall")


def load_metric(name: str, seed: int = 0) -> evaluate.EvaluationModule:
    """
    One of the metrics of this folder, which keeps features in memory; no network is needed.

    Args:
        name (`str`): one of `METRICS`.
        seed (`int`, defaults to 0): of the subsets that some metrics draw.

    Raises:
        ValueError: if there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    return evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True, seed=seed)
