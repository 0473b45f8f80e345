"""Repeat factors: images with rare classes are shown more often in an epoch.

Source: Gupta, Dollar and Girshick, "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR 2019, appendix B.
With f(c) the share of the images that have the class c and a threshold t, a class has the factor
r(c) = max(1, sqrt(t / f(c))), and an image has that of its rarest class. How often an epoch shows an image is the
factor rounded up or down at random, in the mean over epochs the factor itself. Usually every image is rounded for
itself; here all epochs have the same number of images, because the schedule of a run is made of steps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from mvision.data.loading.draws import number_drawn
from mvision.data.loading.sources import DataSource


@dataclass(frozen=True)
class Repeats:
    """How often an epoch shows the images of a run.

    Attributes:
        factors: for each data set (N,), how often an epoch shows each of its images; its weight is included.
        of_classes: name -> (share of the images that have the class, its factor), the rarest first; of classes that are
            repeated.
        images: how many images an epoch would show without them.
    """

    factors: list[np.ndarray]
    of_classes: dict[str, tuple[float, float]]
    images: int

    @property
    def shown(self) -> int:
        """How many images an epoch shows."""
        return sum(map(number_drawn, self.factors))


def repeat_factors(sources: Sequence[DataSource], threshold: float, classes: Collection[str]) -> Repeats:
    """The factors of all images of a run, see the docstring of the module.

    The share of images with a class is that among the images of all data sets, each as often as its weight says.
    Crowd regions are no objects.

    Args:
        threshold: t, above 0 and up to 1.
        classes: names of those that count; others are not learned.
    """
    categories = sources[0].train.categories
    has_class = [images_with_classes(source) for source in sources]
    weights = [source.weight for source in sources]
    images = sum(weight * len(has) for weight, has in zip(weights, has_class))
    share = sum(weight * has.sum(0) for weight, has in zip(weights, has_class)) / images
    of_class = np.sqrt(np.divide(threshold, share, where=share > 0, out=np.ones_like(share))).clip(min=1)
    of_class[[category.name not in classes for category in categories]] = 1
    factors = [weight * np.where(has, of_class, 1).max(1, initial=1) for weight, has in zip(weights, has_class)]
    rare = sorted(np.flatnonzero(of_class > 1), key=lambda index: share[index])
    shown = {categories[index].name: (float(share[index]), float(of_class[index])) for index in rare}
    return Repeats(factors, shown, sum(max(1, round(len(has) * weight)) for weight, has in zip(weights, has_class)))


def images_with_classes(source: DataSource) -> np.ndarray:
    """(images, classes) bool: which training images of a data set have an object of which class."""
    split = source.train
    has = np.zeros((len(split), len(split.categories)), dtype=bool)
    image = np.repeat(np.arange(len(split)), np.diff(split.start))
    counted = ~split.labels.crowd
    has[image[counted], split.labels.labels[counted]] = True
    return has
