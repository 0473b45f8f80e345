"""The schema of the YAML files: every key with its type, range and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from mvision.backbone.config import BackboneConfig
from mvision.config.explain import explain
from mvision.config.tiles import TileConfig
from mvision.config.training import DecidedTrain, TrainConfig
from mvision.errors import UserError
from mvision.heads import head_class, serving_task
from mvision.settings import MAX_LAYERS, MAX_WIDTH, Settings, without_retired
from mvision.structures import Category

MAX_CLASSES = 100_000
MAX_SIDE = 16_384  # pixels
MOST_FOLDS = 1000


class NeckConfig(Settings):
    """Settings of the neck; they are explained at ``mvision.neck.HybridEncoder``."""

    embed_dim: int = Field(256, gt=0, le=MAX_WIDTH)
    attention_levels: Literal["coarsest", "all"] | list[int] = "coarsest"
    share_attention: bool = True
    num_heads: int = Field(8, gt=0, le=MAX_WIDTH)
    num_layers: int = Field(1, ge=1, le=MAX_LAYERS)
    ffn_dim: int = Field(1024, gt=0, le=8 * MAX_WIDTH)
    dropout: float = Field(0.0, ge=0, lt=1)
    position: Literal["sincos", "fraction", "learned"] = "sincos"
    attention: Literal["global", "window", "auto"] = "global"
    window_size: int = Field(20, gt=0, le=1024)
    window_threshold: int = Field(1600, gt=0)
    attention_act: Literal["gelu", "relu", "silu"] = "gelu"
    projections: bool | Literal["last"] = True
    lateral_act: bool = True
    fusion: Literal["concat", "sum"] = "concat"
    fusion_block: Literal["csp", "elan"] = "csp"
    elan_conv: bool = True
    elan_split: bool = False
    depth: int = Field(3, ge=0, le=MAX_LAYERS)
    expansion: float = Field(1.0, gt=0, le=16)
    downsample: Literal["conv", "separable"] = "conv"
    rep_identity: bool = False


class ModelConfig(Settings):
    """Everything that a model is built from; it is stored in the weights file.

    Attributes:
        heads: task -> settings of its head, whose schema is the head's ``Config``.
        categories: the classes that labels index into; a training run takes them from the data set.
        image_size: (height, width) of the model's input in pixels, multiples of 32. One number stands for both.
        pixel_range: the values that become 0 and 255 in pictures of more than 8 bits (16-bit, 32-bit, floating point).
            A training run measures it on its data where none is given; None: there are only pictures of 8 bits.
        thresholds: task -> class -> the score from which results are kept, so that the F1 on the validation images is
            the largest. They are written into the best weights at the end of a training.
    """

    backbone: BackboneConfig = BackboneConfig()
    neck: NeckConfig = NeckConfig()
    heads: dict[str, SerializeAsAny[Settings]] = {}
    categories: list[Category] = Field([], max_length=MAX_CLASSES)
    image_size: tuple[int, int] = (640, 640)
    pixel_range: tuple[float, float] | None = None
    thresholds: dict[str, dict[str, Annotated[float, Field(ge=0, le=1)]]] = {}

    @field_validator("pixel_range")
    @classmethod
    def _rising(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("the first value has to be below the second")
        return value

    @field_validator("heads", mode="before")
    @classmethod
    def _typed_heads(cls, value: Any) -> Any:
        """Validate the section of each task with the schema of its head."""
        if not isinstance(value, dict):
            return value
        typed = {}
        for task, settings in value.items():
            given = {} if settings is None else settings
            if isinstance(given, dict):
                # A retired key can choose the kind, so those of the default kind are replaced first.
                given = without_retired(head_class(task).Config, f"model.heads.{task}", given)
            schema = head_class(task, given).Config
            try:
                typed[task] = given if isinstance(given, schema) else schema.model_validate(given)
            except ValidationError as error:
                raise UserError(explain(error, schema, f"model.heads.{task}")) from error
        return typed

    @model_validator(mode="after")
    def _settings_of_included_tasks(self) -> ModelConfig:
        """A task without a head of its own gets the settings of the head that serves it; others are an error."""
        for task in self.heads:
            serving = serving_task(task, self.heads)
            if serving == task:
                continue
            own, other = self.heads[task], self.heads[serving]
            shared = {name: getattr(other, name) for name in type(own).model_fields}
            for name, value in shared.items():
                if name in own.model_fields_set and getattr(own, name) != value:
                    raise UserError(
                        f"model.heads.{task}.{name} is {getattr(own, name)} and model.heads.{serving}.{name} is "
                        f"{value}, but the head of {serving} serves both tasks; set {serving}'s alone"
                    )
            self.heads[task] = type(own).model_validate(shared)
        return self

    @model_validator(mode="after")
    def _width_of_shared_queries(self) -> ModelConfig:
        """Poses that continue with the queries of another head have their width where none is given."""
        own = [task for task in self.heads if serving_task(task, self.heads) == task]
        widths = [head_class(task, self.heads[task]).query_dim(self.heads[task]) for task in own]
        width = next((width for width in widths if width is not None), None)
        for settings in self.heads.values():
            shared = getattr(settings, "queries", "own") == "shared"
            if shared and width is not None and "embed_dim" not in settings.model_fields_set:
                settings.embed_dim = width  # type: ignore[attr-defined]
        return self

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("image_size")
    @classmethod
    def _multiple_of_32(cls, value: tuple[int, int]) -> tuple[int, int]:
        if any(side < 32 or side % 32 for side in value):
            raise ValueError("height and width have to be multiples of 32")
        if max(value) > MAX_SIDE:
            raise ValueError(f"height and width can be {MAX_SIDE} at most")
        return value


class TransformConfig(Settings):
    """One transform of albumentations.

    Attributes:
        name: its class, such as ``GaussianBlur``.
        args: the arguments of the class; ``p`` is the probability.
    """

    name: str
    args: dict[str, Any] = {}


class AugmentConfig(Settings):
    """Training augmentation: probabilities in 0..1 unless said otherwise.

    Attributes:
        photometric: brightness, contrast, saturation, hue.
        photometric_strength: how far, by RT-DETR's strengths; more where the light will be another than in training.
        zoom_out: place the image on a larger canvas.
        crop: random crop that keeps objects (SSD's sampling of minimum overlaps).
        flip: left-right.
        vertical_flip: up-down; for images without a natural "up" such as microscopy.
        mosaic: four images in one.
        mosaic_form: ``filled``: parts of the four, each enlarged until it fills its tile, on average with as many
            objects as two images; ``whole``: all of the four, which are turned, shifted and scaled together, with as
            many objects as three images (DEIM's dense one-to-one matching).
        mixup: blend of two images, with the objects of both.
        copy_paste: objects of another image are pasted, at random places and sizes, and flipped as often as images
            are. They are cut out along their masks, where the labels have some (also where no task needs masks), else
            with a little of what surrounds their boxes. What they hide is hidden for the labels too.
        rotate: the largest angle in degrees, 0..180, by which every image is turned, either way; ``whole`` mosaics
            are turned by up to 10 degrees at least.
        scale: the largest relative change of every image's size, below 1, outside of mosaics, which change sizes
            themselves: 0.3 is 0.7 to 1.3 times as large. The image lies anywhere on its picture, or the picture
            anywhere on the image.
        mixing_start, mixing_stop: the shares of the run's epochs, 0..1, between which there are mosaics, mixups and
            pasted objects (and never in ``last_epochs``). DEIM has them from its fifth epoch to the middle of the run.
        multi_scale: batches at random sizes within this fraction of ``image_size`` (0 switches it off).
        last_epochs: share of the run's epochs, 0..1, at its end that are trained without mosaic, mixup, pasted objects
            and zoom-out, and at ``image_size``.
        extra: further transforms of albumentations, in this order, after all of the above::

                extra:
                  - name: GaussianBlur
                    args: {blur_limit: [3, 7], p: 0.3}
                  - name: Rotate
                    args: {limit: 15, p: 0.5}

            Those that move pixels move boxes, masks and keypoints with them; where one mirrors an object, its left and
            right keypoints change places. Allowed are transforms of colour images to colour images that need nothing
            but the image and its labels. A transform that moves pixels costs time for every mask.
    """

    photometric: float = Field(0.5, ge=0, le=1)
    photometric_strength: float = Field(1.0, gt=0, le=10)
    zoom_out: float = Field(0.3, ge=0, le=1)
    crop: float = Field(0.5, ge=0, le=1)
    flip: float = Field(0.5, ge=0, le=1)
    vertical_flip: float = Field(0.0, ge=0, le=1)
    mosaic: float = Field(0.0, ge=0, le=1)
    mosaic_form: Literal["filled", "whole"] = "filled"
    mixup: float = Field(0.0, ge=0, le=1)
    copy_paste: float = Field(0.0, ge=0, le=1)
    rotate: float = Field(0.0, ge=0, le=180)
    scale: float = Field(0.0, ge=0, lt=1)
    mixing_start: float = Field(0.0, ge=0, le=1)
    mixing_stop: float = Field(1.0, ge=0, le=1)
    multi_scale: float = Field(0.0, ge=0, lt=1)
    last_epochs: float = Field(0.1, ge=0, le=1)
    extra: list[TransformConfig] = []

    @model_validator(mode="after")
    def _mixing_in_order(self) -> AugmentConfig:
        if self.mixing_start > self.mixing_stop:
            raise ValueError(f"mixing_start {self.mixing_start:g} is after mixing_stop {self.mixing_stop:g}")
        return self

    def count_last(self, epochs: int) -> int:
        """How many of a run's epochs are ``last_epochs``."""
        return round(epochs * self.last_epochs)

    def mixing(self, epochs: int) -> range:
        """The epochs of a run, counted from 0, with mosaics, mixups and pasted objects (if they have a probability)."""
        stop = min(round(epochs * self.mixing_stop), epochs - self.count_last(epochs))
        return range(min(round(epochs * self.mixing_start), stop), stop)


class MoreDataConfig(Settings):
    """A further data set to learn from.

    Attributes:
        root: its folder.
        train, val: its splits.
        tasks: what its labels are used for; empty: every task of the model for which it has labels.
        weight: how often an epoch shows each of its images; may be below 1.
        val_fraction: where the data set has no split ``val``: the share of its training images that are held out for
            validation, drawn with the run's seed. They are not trained on.
        ignore_iscrowd: read regions marked ``iscrowd`` as single objects: CVAT marks every mask of its brush so.
    """

    root: str
    train: str = "train"
    val: str = "val"
    tasks: list[str] = []
    weight: float = Field(1.0, gt=0, le=10_000)
    val_fraction: float = Field(0.0, ge=0, lt=1)
    ignore_iscrowd: bool = False


class DataConfig(Settings):
    """Where the data lies and how it is loaded.

    Attributes:
        root: the folder; None is the built-in data set.
        train, val: the splits to train and to evaluate on; any annotation file of the folder, by its stem.
        tasks, weight, val_fraction, ignore_iscrowd: as in ``MoreDataConfig``.
        more: further data sets. Classes are one where they have one name. What a data set has no class for, or no
            labels, is not taken for absent in its images; a task is evaluated on every data set that is used for it.
        fraction: share of the training images to use, drawn with the run's seed: how much do more labels help?
        fold: ``[2, 5]``: the images of both splits together (of ``train`` where there is no other) are divided into
            five parts, drawn with the run's seed, and the second one is the validation set. Each part has about its
            share of every class. ``mvision train --folds 5`` trains five times, each time with another part.
        repeat_threshold: images with rare classes are shown several times in an epoch, see
            ``mvision.data.loading.repeats``: those of a class that is in a smaller share of the images than this one
            (0..1). 0 shows all images equally often. LVIS is trained with 0.001, data sets of few classes need more.
        tile: divide large pictures into tiles, see ``TileConfig``; None: pictures are stretched to the model's input.
        augment: what happens to training images.
        workers: loading processes; None picks by the number of cores.
    """

    root: str | None = None
    train: str = "train"
    val: str = "val"
    tasks: list[str] = []
    weight: float = Field(1.0, gt=0, le=10_000)
    val_fraction: float = Field(0.0, ge=0, lt=1)
    ignore_iscrowd: bool = False
    more: list[MoreDataConfig] = []
    fraction: float = Field(1.0, gt=0, le=1)
    fold: tuple[int, int] | None = None
    repeat_threshold: float = Field(0.0, ge=0, le=1)
    tile: TileConfig | None = None
    augment: AugmentConfig = AugmentConfig()
    workers: int | None = Field(None, ge=0, le=1024)

    @field_validator("fold")
    @classmethod
    def _is_one_of_several(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not (2 <= value[1] <= MOST_FOLDS and 1 <= value[0] <= value[1]):
            raise ValueError(f"give a number and how many folds there are, 2 to {MOST_FOLDS}, such as [1, 5]")
        return value

    @model_validator(mode="after")
    def _no_other_share_than_a_fold(self) -> DataConfig:
        if self.fold is not None:
            shares = {"fraction": self.fraction < 1, "val_fraction": self.val_fraction > 0}
            shares["more.val_fraction"] = any(more.val_fraction > 0 for more in self.more)
            for name in (name for name, is_given in shares.items() if is_given):
                raise UserError(f"data.fold: folds decide which images are trained on; leave data.{name} out")
        return self

    @model_validator(mode="after")
    def _no_repeats_of_tiles(self) -> DataConfig:
        if self.repeat_threshold and self.tile is not None:
            raise UserError("data.repeat_threshold counts whole images, not tiles: leave it or data.tile out")
        return self


class Config(Settings):
    """The whole configuration."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def to_yaml(self) -> str:
        """As the text of a config file, with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class RunConfig(Config):
    """The configuration of a run that has begun."""

    train: DecidedTrain
