"""The model card: metadata for the Hub, and a page that says what a model finds, how well, and how it was trained."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import mvision
from mvision.config import Config
from mvision.errors import UserError, did_you_mean
from mvision.evaluation.tables import figure_text, markdown_table, markdown_text
from mvision.heads import head_class
from mvision.model import Model
from mvision.weights.card_use import use_of
from mvision.weights.run_facts import RunFacts

_NO_LICENCE = "Where the metadata of this page names no licence, ask the author before you use these weights."
MOST_ROWS = 100  # classes that a table lists; more are counted
_MARK = re.compile(r"\n*<!-- written by mvision, sha256 ([0-9a-f]{64}) -->\s*$")

TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ summary }}

{{ facts }}
{% if results %}
## Results

{{ results }}
{% endif %}{% if example %}
![{{ example.title }}]({{ example.drawn }})

{{ example.title }}.
{% endif %}{% if predictions %}
![Validation images with ground truth (left) and predictions (right)](predictions.jpg)

Validation images with ground truth (left) and predictions (right).
{% endif %}
## How to use it

{{ use }}

## Classes

{{ classes }}
{% if training %}
## Training

{{ training }}
{% endif %}{% if curves %}
![Losses and AP over the epochs](results.png)
{% endif %}
## Licence

{{ licence }}
"""


@dataclass(frozen=True)
class CardOptions:
    """What the card says that no file knows.

    Attributes:
        license: an identifier of the Hub, such as ``apache-2.0``; None: what the repository's card says already.
        license_name, license_link: of a licence that the Hub has no identifier for, with ``license="other"``.
        datasets: names of data sets on the Hub, ``user/name``, that the model was trained on.
        language, tags: further metadata of the card.
        example: a picture that the card shows with what the model finds in it, and that its code predicts on.
        pictures: whether the pictures of the run, which show validation images, belong to it.
        repo_id: the repository that the code loads; None: the folder of the card.
        revision: the branch that the code loads; None: ``main``.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    example: str | Path | None = None
    pictures: bool = True
    repo_id: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> CardOptions:
        """From keyword arguments; raises UserError for an unknown one."""
        known = [part.name for part in fields(cls)]
        for name in given:
            if name not in known:
                raise UserError(f"model card: there is no {name!r}; {did_you_mean(name, known)}")
        return cls(**given)


@dataclass(frozen=True)
class Example:
    """Files in the repository: the picture, and what was found in it; ``title`` says how much that is."""

    file: str
    drawn: str
    title: str


def make_card(model: Model, run: RunFacts, options: CardOptions, example: Example | None = None) -> ModelCard:
    """The card of a model; its last line tells whether anybody has changed it since."""
    title = (options.repo_id or run_title(model)).rpartition("/")[2]
    use = use_of(model, options.repo_id, options.revision, example.file if example else None)
    card = ModelCard.from_template(
        _metadata(model, run, options, title),
        template_str=TEMPLATE,
        title=title,
        summary=_summary(model),
        facts="\n".join(_facts(model, run)),
        results="\n".join(_results(model, run)),
        example=example,
        predictions=options.pictures and any(path.name == "predictions.jpg" for path in run.pictures),
        curves=any(path.name == "results.png" for path in run.pictures),
        use=use,
        classes="\n".join(_classes(model)),
        training="\n".join(_training(run.config)) if run.config else "",
        licence=_licence(run, options),
    )
    text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip()
    card.text = f"{text}\n\n<!-- written by mvision, sha256 {_digest(text)} -->\n"
    return card


def read_card(text: str, where: str) -> ModelCard:
    """The card of a repository.

    Args:
        where: the beginning of the error.

    Raises:
        UserError: its metadata cannot be read.
    """
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except Exception as error:  # of PyYAML, and ValueError
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: the metadata in its README.md cannot be read ({reason}); mend it there") from error


def with_old(options: CardOptions, old: ModelCard | None) -> CardOptions:
    """The options, with the licence and the data sets that the repository's card names where they name none."""
    if old is None:
        return options
    data = old.data
    if not options.license and isinstance(data.license, str):
        options = replace(options, license=data.license, license_name=data.license_name, license_link=data.license_link)
    if not options.datasets and data.datasets:
        options = replace(options, datasets=[data.datasets] if isinstance(data.datasets, str) else data.datasets)
    return options


def merged(card: ModelCard, old: ModelCard | None) -> tuple[ModelCard, bool]:
    """A new card for a repository that has one, ``old``: what people wrote into that one stays.

    Its metadata stays where the new card has none, and tags are joined. Its text stays if it is not, to the letter,
    one that mvision wrote.

    Returns:
        The card, and whether the text of the other one was kept.
    """
    if old is None:
        return card, False
    new, is_own = card.data, is_own_text(old.text)
    told_anew = {"model-index", "tags"} | ({"base_model"} if is_own else set())
    for key, value in old.data.to_dict().items():
        if key not in told_anew and new.get(key) is None:
            new[key] = value
    new.tags = list(dict.fromkeys([*(new.tags or []), *(old.data.tags or [])]))
    if is_own or not old.text.strip():
        return card, False
    card.text = old.text
    return card, True


def is_own_text(text: str) -> bool:
    """Whether mvision wrote the text of a card, and nobody has changed it since."""
    mark = _MARK.search(text.replace("\r\n", "\n"))
    return mark is not None and _digest(text.replace("\r\n", "\n")[: mark.start()]) == mark[1]


def run_title(model: Model) -> str:
    """A name for a model that has none."""
    return f"{'+'.join(model.tasks)} {model.config.backbone.name}"


def pipeline_tags(model: Model) -> list[str]:
    """The Hub's names for what the model does, in the order of its tasks."""
    tags = [_pipeline_tag(model, task) for task in model.tasks]
    return list(dict.fromkeys(tags))


def _pipeline_tag(model: Model, task: str) -> str:
    head = head_class(task, model.config.heads[task])
    if head.kind == "poses":
        return "keypoint-detection"
    return "image-segmentation" if head.kind == "regions" or "masks" in head.needs else "object-detection"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


def _metadata(model: Model, run: RunFacts, options: CardOptions, title: str) -> ModelCardData:
    tags = pipeline_tags(model)
    name = ", ".join(_data_names(run.config)) or "validation data"
    results = [
        EvalResult(
            task_type=_pipeline_tag(model, task),
            task_name=task,
            dataset_type=options.datasets[0] if options.datasets else re.sub(r"[^\w.-]+", "-", name),
            dataset_name=name,
            dataset_split=run.config.data.val if run.config else None,
            metric_type=figure.rpartition("/")[2],
            metric_name=figure,
            metric_value=round(value, 5),
        )
        for task, figures in run.metrics.items()
        for figure, value in figures.items()
        if value >= 0 and not _class_of(figure, figures)
    ]
    return ModelCardData(
        library_name="mvision",
        pipeline_tag=tags[0],
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        language=list(options.language) or None,
        base_model=run.base_model,
        datasets=list(options.datasets) or None,
        tags=list(dict.fromkeys(["mvision", *tags, *model.tasks, "model_hub_mixin", *options.tags])),
        eval_results=results or None,
        model_name=title if results else None,
    )


def _summary(model: Model) -> str:
    tasks = " and ".join(filter(None, (", ".join(model.tasks[:-1]), model.tasks[-1])))
    number = len(model.categories)
    classes = f"{number} classes" if number > 1 else f"the class {markdown_text(model.categories[0].name)}"
    return f"A model of mvision for {tasks}, with {classes}."


def _facts(model: Model, run: RunFacts) -> Iterator[str]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    height, width = model.config.image_size
    rows = [
        ["Backbone", f"{markdown_text(model.config.backbone.name)}"],
        ["Parameters", f"{parameters / 1e6:,.1f} million"],
        ["Input", f"{height} x {width} pixels (height x width); pictures of any size are resized"],
        ["Started from", markdown_text(_start(run))],
    ]
    if names := _data_names(run.config):
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


def _data_names(config: Config | None) -> list[str]:
    if config is None:
        return []
    roots = [config.data.root, *(more.root for more in config.data.more)]
    return [root or "mvision's built-in, generated data set" for root in roots]


def _with_numbers(names: list[str], images: list[list[int]]) -> str:
    if len(names) != len(images):
        return "; ".join(names)
    return "; ".join(f"{name} ({train} images, {val} for validation)" for name, (train, val) in zip(names, images))


def _results(model: Model, run: RunFacts) -> Iterator[str]:
    """A table of every task's figures, and one of its classes."""
    if not run.metrics:
        return
    where = f"the split {markdown_text(run.config.data.val)}" if run.config else "the validation split"
    yield f"On {where} of the data above; - stands for figures that it has no objects for."
    for task, figures in run.metrics.items():
        whole = {name: value for name, value in figures.items() if not _class_of(name, figures)}
        if not whole:
            continue
        yield from ("", f"**{task}**", "")
        shown = [(markdown_text(name), figure_text(value)) for name, value in whole.items()]
        yield from markdown_table(["figure", "value"], shown)
        yield from _results_by_class(model, figures)


def _results_by_class(model: Model, figures: dict[str, float]) -> Iterator[str]:
    rows: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        if found := _class_of(name, figures):
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


def _class_of(name: str, figures: dict[str, float]) -> tuple[str, str] | None:
    """Figure and class of a class's figure, such as ``AP/cat``; None for a figure of all classes, such as ``bbox/AP``.

    Names of classes can have slashes in them.
    """
    parts = name.split("/")
    figure = next(("/".join(parts[:end]) for end in range(1, len(parts)) if "/".join(parts[:end]) in figures), None)
    return None if figure is None else (figure, name.removeprefix(f"{figure}/"))


def _classes(model: Model) -> Iterator[str]:
    rows = [
        [str(label), markdown_text(category.name), markdown_text(", ".join(category.keypoints)) or "-"]
        for label, category in enumerate(model.categories)
    ]
    has_points = any(category.keypoints for category in model.categories)
    header = ["label", "name", "keypoints"] if has_points else ["label", "name"]
    yield from markdown_table(header, [row[: len(header)] for row in rows[:MOST_ROWS]])
    if len(rows) > MOST_ROWS:
        yield from ("", f"{len(rows) - MOST_ROWS} more are in config.json.")


def _training(config: Config) -> Iterator[str]:
    train, augment = config.train, config.data.augment
    used = {name: value for name, value in augment.model_dump(mode="json").items() if value}
    rows = [
        ["epochs", train.epochs],
        ["images in a step", f"{train.batch_size} x {train.accumulate}" if train.accumulate > 1 else train.batch_size],
        ["optimizer", f"{train.optimizer}, learning rate {train.lr}, backbone {train.backbone_lr or train.lr}"],
        ["schedule", f"{train.schedule}, {train.warmup_steps} steps of warm-up"],
        ["weight decay", train.weight_decay],
        ["moving average", train.ema_decay],
        ["precision", train.precision],
        ["seed", train.seed],
        ["augmentation", ", ".join(f"{name} {value}" for name, value in used.items() if name != "extra") or "none"],
    ]
    yield from markdown_table(["setting", "value"], [[name, markdown_text(str(value))] for name, value in rows])
    yield from ("", "All settings are in [config.yaml](config.yaml).")


def _licence(run: RunFacts, options: CardOptions) -> str:
    name = options.license_name or options.license
    shown = (
        f"[{markdown_text(name)}]({options.license_link})"
        if name and options.license_link
        else markdown_text(name or "")
    )
    own = f"These weights: {shown}." if name else _NO_LICENCE
    if not run.started_from:
        return own
    return f"{own} They come from {markdown_text(run.started_from)}, whose licence holds as well."
