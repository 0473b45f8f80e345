"""The model card: metadata for the Hub, and a page that says what a model finds, how well, and how it was trained."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mvision.errors import UserError, did_you_mean
from mvision.heads import head_class
from mvision.model import Model
from mvision.weights import card_text
from mvision.weights.card_use import use_of
from mvision.weights.run_facts import RunFacts

_LICENCE = ("license", "license_name", "license_link")
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
        summary=card_text.summary(model),
        facts="\n".join(card_text.facts(model, run)),
        results="\n".join(card_text.results(run)),
        example=example,
        predictions=options.pictures and any(path.name == "predictions.jpg" for path in run.pictures),
        curves=any(path.name == "results.png" for path in run.pictures),
        use=use,
        classes="\n".join(card_text.classes(model)),
        training="\n".join(card_text.training(run.config)) if run.config else "",
        licence=card_text.licence(run, options.license_name or options.license, options.license_link),
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
    if not options.license:
        options = replace(options, **{name: old.data.get(name) for name in _LICENCE})
    datasets = old.data.get("datasets")
    if not options.datasets and datasets:
        options = replace(options, datasets=[datasets] if isinstance(datasets, str) else datasets)
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
    tags = old.data.get("tags") or []
    new["tags"] = list(dict.fromkeys([*new.get("tags"), *([tags] if isinstance(tags, str) else tags)]))
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
    name = ", ".join(card_text.data_names(run.config)) or "validation data"
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
        if value >= 0 and not card_text.class_of(figure, figures)
        if figure.rpartition("/")[2] != "threshold"  # a setting, nothing to compare models by
    ]
    return ModelCardData(
        library_name="mvision",
        pipeline_tag=tags[0],
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        language=list(options.language) or None,
        base_model=run.base_model if run.base_model != options.repo_id else None,
        datasets=list(options.datasets) or None,
        tags=list(dict.fromkeys(["mvision", *tags, *model.tasks, "model_hub_mixin", *options.tags])),
        eval_results=results or None,
        model_name=title if results else None,
    )
