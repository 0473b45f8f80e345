"""The part of a model card that says how the model is used: code that runs as it is."""

from __future__ import annotations

from mvision.heads import head_class
from mvision.model import Model

_LOOP = {
    "objects": (
        "for name, score, box in zip(found.class_names, found.scores, found.boxes):\n"
        "    print(name, round(float(score), 2), box.round().tolist())  # x1, y1, x2, y2 in pixels of the picture"
    ),
    "regions": (
        "for name, region in zip(found.{regions}class_names, found.{regions}masks):\n"
        "    print(name, int(region.sum()))  # region: (H, W) bool"
    ),
}


def use_of(model: Model, repo_id: str | None, revision: str | None, example: str | None) -> str:
    """Code for Python and for the command line.

    Args:
        repo_id: the repository; None: the folder that the card lies in.
        revision: a branch other than ``main``.
        example: a picture in the repository.
    """
    name = f"{repo_id}@{revision}" if repo_id and revision else repo_id or "."
    lines = ["```python", "import mvision"]
    if example and repo_id:
        at = f', revision="{revision}"' if revision else ""
        lines += ["from huggingface_hub import hf_hub_download"]
        picture = f'hf_hub_download("{repo_id}", "{example}"{at})  # or a picture of your own: "street.jpg"'
    elif example:
        picture = f'"{example}"  # or a picture of your own'
    else:
        lines += ["from PIL import Image"]
        picture = 'Image.new("RGB", (640, 480))  # in its place a picture of your own: "street.jpg"'
    lines += ["", f'model = mvision.load("{name}")', f"picture = {picture}", "found = model.predict([picture])[0]"]
    lines += [*_what_was_found(model), "```", ""]
    return "\n".join([*lines, *_commands(model, name)])


def _what_was_found(model: Model) -> list[str]:
    heads = [head_class(task, model.config.heads[task]) for task in model.tasks]
    kinds = {head.kind for head in heads}
    lines = []
    if kinds & {"objects", "poses"}:
        lines += [_LOOP["objects"]]
    if any(head.kind == "objects" and "masks" in head.needs for head in heads):
        lines += ["print(found.masks.areas)  # pixels; found.masks[0]: (H, W) bool, found.masks.polygons(): contours"]
    if "poses" in kinds:
        lines += ["print(found.keypoints.shape)  # (objects, points, 3): x, y in pixels, score"]
    if "regions" in kinds:
        lines += [_LOOP["regions"].format(regions="regions." if kinds - {"regions"} else "")]
    return lines


def _commands(model: Model, name: str) -> list[str]:
    lines = ["```bash", f"mvision predict photos/ --weights {name} --output found/"]
    if not model.fused:
        tasks = " ".join(f"--task {task}" for task in model.tasks)
        lines += [f"mvision train {tasks} --data my_data --init {name}  # goes on from these weights"]
    return [*lines, "```", "", "mvision is installed from its checkout with `pip install -e .`."]
