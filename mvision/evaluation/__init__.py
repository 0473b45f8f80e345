"""Metrics, and the evaluation of a model on a loader's images."""

from mvision.evaluation.coco import BoxMetric as BoxMetric
from mvision.evaluation.coco import CocoMetric as CocoMetric
from mvision.evaluation.coco import KeypointMetric as KeypointMetric
from mvision.evaluation.coco import MaskMetric as MaskMetric
from mvision.evaluation.evaluate import Evaluated as Evaluated
from mvision.evaluation.evaluate import Validation as Validation
from mvision.evaluation.evaluate import evaluate as evaluate
from mvision.evaluation.evaluate import evaluate_all as evaluate_all
from mvision.evaluation.evaluate import make_metrics as make_metrics
from mvision.evaluation.evaluate import tables as tables
from mvision.evaluation.metric import Metric as Metric
from mvision.evaluation.semantic import SemanticMetric as SemanticMetric
