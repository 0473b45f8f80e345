"""The text of a model card: sentences and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator

import mvision
from mvision.config import Config
from mvision.evaluation.tables import figure_text, markdown_table, markdown_text
from mvision.model import Model
from mvision.weights.run_facts import RunFacts

MOST_ROWS = 100  # classes that a table lists; more are counted
_NO_LICENCE = "Where the metadata of this page names no licence, ask the author before you use these weights."


def summary(model: Model) -> str:
    """A sentence: what the model does."""
    tasks = " and ".join(filter(None, (", ".join(model.tasks[:-1]), model.tasks[-1])))
    number = len(model.categories)
    classes = f"{number} classes" if number > 1 else f"the class {markdown_text(model.categories[0].name)}"
    return f"A model of mvision for {tasks}, with {classes}."


def facts(model: Model, run: RunFacts) -> Iterator[str]:
    """A table: size, input, data, and what the training started from."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    height, width = model.config.image_size
    rows = [
        ["Backbone", f"{markdown_text(model.config.backbone.name)}"],
        ["Parameters", f"{parameters / 1e6:,.1f} million"],
        ["Input", f"{height} x {width} pixels (height x width); pictures of any size are resized"],
        ["Started from", markdown_text(_start(run))],
    ]
    if names := data_names(run.config):
        rows.append(["Trained on", markdown_text(_with_numbers(names, run.images))])
    if run.epoch is not None:
        rows.append(["Epoch", str(run.epoch)])
    rows.append(["mvision", mvision.__version__])
    return iter(markdown_table(["", ""], rows))


def _start(run: RunFacts) -> str:
    if run.started_from:
        return run.started_from
    backbone = run.config.model.backbone if run.config else None
    if backbone is not None and backbone.starts_trained:
        return (
            f"{backbone.weights or 'the pretrained weights'} of the backbone {backbone.name}; the rest from random ones"
        )
    return "random weights, or weights of the author's own"


def data_names(config: Config | None) -> list[str]:
    """Of the data sets of a run; empty where its config is unknown."""
    if config is None:
        return []
    roots = [config.data.root, *(more.root for more in config.data.more)]
    return [root or "mvision's built-in, generated data set" for root in roots]


def _with_numbers(names: list[str], images: list[list[int]]) -> str:
    if len(names) != len(images):
        return "; ".join(names)
    return "; ".join(f"{name} ({train} images, {val} for validation)" for name, (train, val) in zip(names, images))


def results(run: RunFacts) -> Iterator[str]:
    """A table of every task's figures, and one of its classes."""
    if not run.metrics:
        return
    yield f"On {_validation(run.config)} of the data above; - stands for figures that it has no objects for."
    for task, figures in run.metrics.items():
        whole = {name: value for name, value in figures.items() if not class_of(name, figures)}
        if not whole:
            continue
        yield from ("", f"**{task}**", "")
        shown = [(markdown_text(name), figure_text(value)) for name, value in whole.items()]
        yield from markdown_table(["figure", "value"], shown)
        yield from _by_class(figures)


def _validation(config: Config | None) -> str:
    if config is None:
        return "the validation split"
    if config.data.fold is not None:
        return f"fold {config.data.fold[0]} of {config.data.fold[1]}, which was not trained on,"
    if config.data.val_fraction:
        return f"the share {config.data.val_fraction:g} of its training images that was held out, or its own split,"
    return f"the split {markdown_text(config.data.val)}"


def _by_class(figures: dict[str, float]) -> Iterator[str]:
    rows: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        if found := class_of(name, figures):
            rows.setdefault(found[1], {})[found[0]] = value
    if not rows:
        return
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    shown = [
        [markdown_text(name), *(figure_text(row[column]) if column in row else "-" for column in columns)]
        for name, row in rows.items()
    ]
    yield ""
    yield from markdown_table(["class", *map(markdown_text, columns)], shown[:MOST_ROWS])
    if len(shown) > MOST_ROWS:
        yield from ("", f"{len(shown) - MOST_ROWS} more classes are in metrics.json.")


def class_of(name: str, figures: dict[str, float]) -> tuple[str, str] | None:
    """Figure and class of a class's figure, such as ``AP/cat``; None for a figure of all classes, such as ``bbox/AP``.

    Names of classes can have slashes in them.
    """
    parts = name.split("/")
    figure = next(("/".join(parts[:end]) for end in range(1, len(parts)) if "/".join(parts[:end]) in figures), None)
    return None if figure is None else (figure, name.removeprefix(f"{figure}/"))


def classes(model: Model) -> Iterator[str]:
    """A table: the labels, and the keypoints of their classes."""
    rows = [
        [str(label), markdown_text(category.name), markdown_text(", ".join(category.keypoints)) or "-"]
        for label, category in enumerate(model.categories)
    ]
    has_points = any(category.keypoints for category in model.categories)
    header = ["label", "name", "keypoints"] if has_points else ["label", "name"]
    yield from markdown_table(header, [row[: len(header)] for row in rows[:MOST_ROWS]])
    if len(rows) > MOST_ROWS:
        yield from ("", f"{len(rows) - MOST_ROWS} more are in config.json.")


def training(config: Config) -> Iterator[str]:
    """A table: the settings that people ask for first."""
    train, augment = config.train, config.data.augment
    used = [f"{name} {value}" for name, value in augment.model_dump(mode="json").items() if value and name != "extra"]
    rows: list[tuple[str, object]] = [
        ("epochs", train.epochs),
        ("images in a step", f"{train.batch_size} x {train.accumulate}" if train.accumulate > 1 else train.batch_size),
        ("optimizer", f"{train.optimizer}, learning rate {train.lr}, backbone {train.backbone_lr or train.lr}"),
        ("schedule", f"{train.schedule}, {train.warmup_steps} steps of warm-up"),
        ("weight decay", train.weight_decay),
        ("moving average", train.ema_decay),
        ("precision", train.precision),
        ("seed", train.seed),
        ("augmentation", ", ".join(used) or "none"),
    ]
    yield from markdown_table(["setting", "value"], [[str(row[0]), markdown_text(str(row[1]))] for row in rows])
    yield from ("", "All settings are in [config.yaml](config.yaml).")


def licence(run: RunFacts, name: str | None, link: str | None) -> str:
    """Under which licence the weights are, and those that they come from."""
    shown = markdown_text(name or "")
    own = f"These weights: {f'[{shown}]({link})' if link else shown}." if name else _NO_LICENCE
    if not run.started_from:
        return own
    return f"{own} They come from {markdown_text(run.started_from)}, whose licence holds as well."
