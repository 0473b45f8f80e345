"""``mvision data convert``: a data set of any layout, written as ``images/`` + ``annotations/{train,val}.json``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import Layout, find_layout, usual_splits
from mvision.errors import UserError


def convert(
    layout: Layout,
    destination: str | Path,
    splits: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Layout:
    """Copy images and write the usable annotations of each split.

    Images are copied to ``images/SPLIT/``, so that two splits may have files of the same name. Missing files are left
    out.

    Args:
        layout: from ``find_layout``.
        destination: a folder that does not exist yet, or is empty.
        splits: names; None: train, val and test where they exist, else all.
        progress: called with the number of images just copied.

    Returns:
        The new layout.

    Raises:
        UserError: the destination holds something, a split does not exist, or its annotations are broken.
    """
    target = Path(destination).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is there already and not empty; choose a new folder")
    chosen = [CocoSplit(layout.split(name, FIELDS), FIELDS) for name in (splits or usual_splits(layout))]
    (target / "annotations").mkdir(parents=True)
    for split in chosen:
        _convert_split(split, target, progress)
    return find_layout(target)


def _convert_split(split: CocoSplit, target: Path, progress: Callable[[int], object] | None) -> None:
    name = split.split.name
    tree = split.coco_dict
    kept = []
    for image in tree["images"]:
        source, file = split.folder / image["file_name"], f"{name}/{image['file_name']}"
        if source.is_file():
            (target / "images" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / "images" / file)
            kept.append({**image, "file_name": file})
        if progress is not None:
            progress(1)
    identities = {image["id"] for image in kept}
    annotations = [annotation for annotation in tree["annotations"] if annotation["image_id"] in identities]
    text = json.dumps(
        {"images": kept, "annotations": annotations, "categories": tree["categories"]}, ensure_ascii=False
    )
    (target / "annotations" / f"{name}.json").write_text(text, encoding="utf-8")
