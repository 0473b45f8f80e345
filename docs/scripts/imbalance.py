"""Rare classes: their AP without help, with class weights, and with repeat factors, on the built-in data set.

    python docs/scripts/imbalance.py FOLDER                    # two seeds, about five minutes a training
    python docs/scripts/imbalance.py FOLDER --recipes none repeat --seeds 0

The training images are those without a kite, mug or fish, and a few with one: 6 images with a kite, 12 with a mug and
24 with a fish. Validation images are all of the built-in data set, so that there are enough rare objects to measure.
Every training has the same number of steps. FOLDER keeps the data, the runs and ``figures.json``; trainings that are
done are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mvision
from mvision.builtin import ensure_builtin
from mvision.commands.train import run_config, train
from mvision.evaluation.tables import markdown_table

RARE = {"kite": 6, "mug": 12, "fish": 24}  # images to keep of each class
RECIPES: dict[str, list[str]] = {
    "none": [],
    "balanced": ["train.class_weights=balanced"],
    "repeat": ["data.repeat_threshold=0.3"],
    "both": ["train.class_weights=balanced", "data.repeat_threshold=0.3"],
}


def make_data(folder: Path) -> dict[str, int]:
    """A COCO folder with the reduced training set; returns how many training images have which class."""
    source = ensure_builtin()
    train_set, val = (json.loads((source / f"annotations/{name}.json").read_text()) for name in ("train", "val"))
    names = {category["id"]: category["name"] for category in train_set["categories"]}
    classes: dict[int, set[str]] = {image["id"]: set() for image in train_set["images"]}
    for annotation in train_set["annotations"]:
        classes[annotation["image_id"]].add(names[annotation["category_id"]])
    kept = {image for image, found in classes.items() if not found & RARE.keys()}
    for name, count in RARE.items():
        # Those with this rare class alone, so that the number of the others does not change.
        kept |= set(sorted(image for image, found in classes.items() if found & RARE.keys() == {name})[:count])
    train_set["images"] = [image for image in train_set["images"] if image["id"] in kept]
    train_set["annotations"] = [entry for entry in train_set["annotations"] if entry["image_id"] in kept]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for name, content in (("train", train_set), ("val", val)):
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))
    if not (folder / "images").exists():
        (folder / "images").symlink_to(source / "images")
    return {name: sum(name in classes[image] for image in kept) for name in names.values()}


def measure(recipe: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train one model; its figures on the validation images."""
    assignments = [*RECIPES[recipe], f"train.seed={seed}", f"train.least_steps={options.steps}"]
    assignments += [] if options.image_size is None else [f"model.image_size={options.image_size}"]
    assignments += ["train.patience=0", "train.val_interval=1000000"]  # the last epoch's figures count
    config = run_config(
        tasks=[options.task], model=options.model, options={"data.root": str(folder / "data")}, assignments=assignments
    )
    run = train(config, output=folder / "runs" / f"{options.task}-{recipe}-{seed}")
    return json.loads((run / "metrics.json").read_text())[options.task]


def table(figures: dict[str, Any], task: str) -> list[str]:
    """Mean over the seeds of the AP of all, of the rare and of the other classes, and of every rare class."""
    rows = []
    for recipe in RECIPES:
        runs = [values for key, values in sorted(figures.items()) if key.rsplit("-", 1)[0] == f"{task}-{recipe}"]
        if not runs:
            continue
        names = [name.removeprefix("AP/") for name in runs[0] if name.startswith("AP/")]
        groups = [names, list(RARE), [name for name in names if name not in RARE], *([name] for name in RARE)]
        cells = []
        for group in groups:
            values = [statistics.fmean(run[f"AP/{name}"] for name in group) for run in runs]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        rows.append([recipe, str(len(runs)), *cells])
    return markdown_table(["recipe", "seeds", "AP", "AP rare", "AP others", *RARE], rows)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--task", default="detection")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--image-size", type=int, help="a multiple of 32; the model's own unless given")
    options = parser.parse_args()
    counts = make_data(options.folder / "data")
    print(f"mvision {mvision.__version__}; training images with each class: {counts}")
    file = options.folder / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    for seed in options.seeds:
        for recipe in options.recipes:
            key = f"{options.task}-{recipe}-{seed}"
            if key not in figures:
                figures[key] = measure(recipe, seed, options.folder, options)
                file.write_text(json.dumps(figures, indent=1))
            print("\n".join(table(figures, options.task)), flush=True)


if __name__ == "__main__":
    main()
