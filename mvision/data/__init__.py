"""Data: annotation files and images in, batches out.

Public:
    find_layout(root) -> Layout                 recognise a folder; ``layout.split("train", fields) -> Split``
    CocoSplit(split, fields)                    read and check: ``categories``, ``records``, ``problems``, ``coco_dict``
    same_categories(train, val)                 two splits have classes in common, by name, or UserError
    read_data_sources(config, tasks, ...)       the data sets of a run, each a ``DataSource``
    read_validation(config, split, tasks)       the same for an evaluation
    build_train_loader(split, config, ...)      Loader: ``for batch in loader.epoch(n)``, ``len(loader)``, ``close()``
    build_eval_loader(split, config, ...)       Loader: ``for batch in loader``
    Batch                                       images (B, 3, H, W) uint8, targets, skipped
    Dataset, SampleKey                          single samples; ``dataset.truth(i)`` for drawing
    tools.check.check(config) -> Report         for ``mvision data check``: ``text()``, ``usable``; or of a layout
    contact_sheet(layout, split, ...)           for ``mvision data show``; ``write_image(path, sheet)``
    tools.convert.convert(layout, destination)  for ``mvision data convert``
    read_image(path), resize_image(image, size) files to RGB; the one resize of training, evaluation and prediction
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY = {
    "contact_sheet": "mvision.data.tools.show",
    "write_image": "mvision.data.tools.show",
    "Batch": "mvision.data.loading.batch",
    "BadImage": "mvision.structures.images",
    "CocoSplit": "mvision.data.formats.coco",
    "Dataset": "mvision.data.loading.dataset",
    "Layout": "mvision.data.formats.layouts",
    "Loader": "mvision.data.loading.loader",
    "SampleKey": "mvision.data.loading.dataset",
    "Split": "mvision.data.formats.split",
    "build_eval_loader": "mvision.data.loading.loader",
    "build_train_loader": "mvision.data.loading.loader",
    "find_layout": "mvision.data.formats.layouts",
    "read_image": "mvision.structures.images",
    "read_data_sources": "mvision.data.loading.sources",
    "read_validation": "mvision.data.loading.sources",
    "resize_image": "mvision.structures.images",
    "same_categories": "mvision.data.formats.coco",
}
__all__ = [*_LAZY]

if TYPE_CHECKING:
    from mvision.data.formats.coco import CocoSplit, same_categories
    from mvision.data.formats.layouts import Layout, find_layout
    from mvision.data.formats.split import Split
    from mvision.data.loading.batch import Batch
    from mvision.data.loading.dataset import Dataset, SampleKey
    from mvision.data.loading.loader import Loader, build_eval_loader, build_train_loader
    from mvision.data.loading.sources import read_data_sources, read_validation
    from mvision.structures.images import BadImage, read_image, resize_image


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing albumentations and cv2 takes seconds, and `mvision predict` needs neither.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mvision.data' has no attribute {name!r}")
