"""Metrics, and the evaluation of a model on a loader's images."""

from mvision.evaluation.coco import BoxMetric, CocoMetric, KeypointMetric, MaskMetric
from mvision.evaluation.evaluate import Evaluated, Validation, evaluate, evaluate_all, make_metrics, tables
from mvision.evaluation.metric import Metric
from mvision.evaluation.semantic import SemanticMetric

__all__ = [
    "BoxMetric",
    "CocoMetric",
    "Evaluated",
    "KeypointMetric",
    "MaskMetric",
    "Metric",
    "SemanticMetric",
    "Validation",
    "evaluate",
    "evaluate_all",
    "make_metrics",
    "tables",
]
