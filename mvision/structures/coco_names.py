"""COCO's 80 classes with their official ids (1..90, with gaps), and other spellings of them in published weights.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, and its 2017 annotation files.
"""

from __future__ import annotations

from collections.abc import Sequence

from mvision.structures.category import Category
from mvision.structures.oks import COCO_SIGMAS

# Comma-separated, in the order of the ids from 1 on; "-" are ids without annotations.
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, -, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, -, backpack, umbrella,
-, -, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
skateboard, surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, banana, apple,
sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, -, dining
table, -, -, toilet, -, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink,
refrigerator, -, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
COCO = [
    Category(id=number, name=name)
    for number, name in enumerate((part.strip() for part in _NAMES.replace("\n", " ").split(",")), start=1)
    if name != "-"
]

# Names of the same classes in Pascal VOC, which the published detectors use, and in Objects365.
_SYNONYMS = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
    "wild bird": "bird",
    "stuffed toy": "teddy bear",
    "luggage": "suitcase",
}


def coco_with_keypoints() -> list[Category]:
    """COCO's classes, a person with its 17 keypoints: what a model that is named without data is built for."""
    return [
        category.model_copy(update={"keypoints": list(COCO_SIGMAS)}) if category.name == "person" else category
        for category in COCO
    ]


def canonical(name: str) -> str:
    """A class name in lower case with single spaces, and COCO's word where there are several."""
    plain = " ".join(name.lower().replace("_", " ").split())
    return _SYNONYMS.get(plain, plain)


def coco_categories(names: Sequence[str]) -> list[Category] | None:
    """COCO's own categories in this order, if these are exactly its 80 classes (in any spelling); else None."""
    official = {category.name: category for category in COCO}
    words = [canonical(name) for name in names]
    return [official[word] for word in words] if sorted(words) == sorted(official) else None
