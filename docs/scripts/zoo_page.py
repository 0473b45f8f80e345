"""Write docs/zoo.md, the page about published models, from the table in ``mvision.weights.zoo``.

    python docs/scripts/zoo_page.py

``tests/test_zoo.py`` checks that the page is that of the table.
"""

from __future__ import annotations

from pathlib import Path

from mvision.weights import zoo
from mvision.weights.zoo import FAMILIES, MODELS, ZooModel

PAGE = Path(__file__).resolve().parents[1] / "zoo.md"

INTRODUCTION = """\
# Published models

This page is written by `python docs/scripts/zoo_page.py` from the table that `mvision models` prints.

Every command that takes weights takes these names:

```bash
mvision train --data my_data --init dfine-s        # fine-tune: the architecture comes with the weights
mvision predict photo.jpg --weights dfine-s
mvision val --data coco --weights dfine-s
mvision export --weights dfine-s --format openvino
mvision models dfine-s                             # all about one model
```

```python
model = mvision.load("dfine-s")
```

A file or folder of that name in the working folder is taken before the published model, and that is said.

**Where the files go.** Models on the Hugging Face Hub are downloaded once, by the Hub's client, into its cache
(`HF_HOME`, or `~/.cache/huggingface`). What is downloaded, at which commit, and how much is said before; an interrupted
download is resumed; the checksum is compared after. Proxies and `HF_ENDPOINT` (a mirror) are honoured. A model with a
pinned revision needs no network once it is in the cache; without one, the newest commit is asked for each time.

Models on GitHub and those of PaddleDetection are one file each, which is downloaded into the folder below.

**Without network, and for models on Google Drive**, put the files by hand where the short name finds them, below
`MVISION_CACHE` (or `~/.cache/mvision`): the folder `weights/NAME/` with `config.json`, `preprocessor_config.json` and
`model.safetensors`, or the authors' file as `weights/NAME.pth` (Mask-RT-DETR's as `weights/NAME.pdparams`). Any other
place works by its path. An https address of a file is downloaded into the same folder, and kept.

**Licences** are those that the authors declare for code and weights. The images that a model was trained on are another
question: COCO's, Objects365's and CrowdPose's have terms of their own, and whether these reach the weights is for a
lawyer to say. The same holds for weights that were distilled from others: a DINOv3 model was the teacher of RT-DETRv4's
training, and the backbones of ECDet, ECSeg and ECPose were distilled from DINOv3 models. D-FINE, DEIM, DETRPose
and Mask-RT-DETR have none of that.

**AP** is the publishers' own, of boxes, masks or keypoints, on COCO val2017; of models trained on Objects365 alone, on
the first 5,000 images of its validation split; of those trained on CrowdPose, on its test images.
`python docs/scripts/zoo_check.py --coco DIR` measures it. Parameters (in millions) and GFLOPs (of one image of
640 x 640, a multiply-add counts as two) are counted by mvision, of the model as it predicts (`mvision info`, fused);
those with ~ are the publishers' figures.
"""


def page() -> str:
    """The text of docs/zoo.md."""
    parts = [INTRODUCTION]
    for name, family in FAMILIES.items():
        models = [model for model in MODELS.values() if model.family == name]
        parts.append(
            f"## {family.title}\n\n[Paper]({family.paper}), [code and table of the authors]({family.page}). "
            f"Code {family.code_licence}, weights {family.weights_licence}{'; ' * bool(family.note)}{family.note}.\n"
        )
        parts.append("\n".join([*_HEAD, *map(_row, models)]) + "\n")
    return "\n".join(parts)


_HEAD = (
    "| name | task | trained on | AP | params | GFLOPs | `--model` | weights | revision | SHA-256 |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def _row(model: ZooModel) -> str:
    about, size = "" if model.size.counted else "~", model.size
    digits = 1 if size.counted else 0
    weights = f"[{model.hub}](https://huggingface.co/{model.hub})" if model.hub else f"[{model.place}]({model.url})"
    cells = (
        f"`{model.name}`",
        model.task,
        model.data,
        f"{model.ap:.1f}",
        f"{about}{size.parameters:.{digits}f}",
        f"{about}{size.gflops:.{digits}f}",
        "-" if model.config is None else f"`{model.config}`",
        weights,
        "-" if model.hub is None else f"`{model.revision[:12]}`" if model.revision else "newest",
        f"`{model.sha256[:12]}`" if model.sha256 else "-",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(zoo.MODELS)} models")
