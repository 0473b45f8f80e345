"""What the pictures of a data set are like beyond 8-bit RGB, from a sample: the values they use, frames, NaN.

A picture of 16 bits seldom uses all of them. Which values become 0 and 255 is measured once, on the training set, and
kept in the weights as ``model.pixel_range``, so that prediction and exported models see pictures as training did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvision.data.formats.coco import CocoSplit
from mvision.errors import printable
from mvision.structures.images import (
    FIRST_IS_USED,
    LOWEST_INSTEAD,
    BadImage,
    PictureHeader,
    PixelRange,
    picture_header,
    read_values,
)

# Endings of formats that can have more than 8 bits or more than one frame. Files of other endings are not opened.
SUFFIXES = (
    *(".png", ".apng", ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".pgm", ".pnm"),
    *(".gif", ".webp", ".avif", ".mpo"),
)
HEADERS = 200  # files of a split whose header is read
DECODED = 32  # files of a data set whose values are looked at
VALUES = 100_000  # of each of these
PERCENTILES = (0.1, 99.9)  # dead and hot pixels of a sensor are rarer than one in a thousand
TOPS = (1, 255, 1023, 4095, 16383, 65535)  # the highest values of floats in 0..1 and of 8, 10, 12, 14 and 16 bits
SHARE = 1 / 4  # of such a range that has to be used: at least 64 of the 256 shades
MARGIN = 0.05  # of the range, on either side: other pictures will be a little darker or brighter than the sample


def count_oddities(split: CocoSplit) -> None:
    """Add pictures with several frames, and with values that are no numbers, to the problems of a split.

    At most ``HEADERS`` files are opened, spread evenly over the split, and only those of formats that can be concerned.
    """
    headers = _headers(split)
    places = f" ({len(headers)} pictures were looked at)" if len(headers) == HEADERS else ""
    for file, header in headers:
        if header.several:
            split.problems.add(f"{FIRST_IS_USED}{places}", file)
    for file, _ in _spread([entry for entry in headers if entry[1].floating], DECODED):
        values = _values(split.folder / file)
        if values is not None and not np.isfinite(values).all():
            place = f"{file}: {int((~np.isfinite(values)).sum())} of {values.size}"
            split.problems.add(f"{LOWEST_INSTEAD}{places}", place)


@dataclass(frozen=True)
class UsedValues:
    """The values of one picture: the limits, and a sample of at most about ``VALUES`` of them."""

    lowest: float
    highest: float
    sample: np.ndarray


def used_values(picture: np.ndarray) -> UsedValues | None:
    """The values of a picture that are numbers; None where it has none."""
    values = picture[np.isfinite(picture)] if picture.dtype.kind == "f" else picture.reshape(-1)
    if not values.size:
        return None
    sample = values[:: max(values.size // VALUES, 1)].astype(np.float64)
    return UsedValues(float(values.min()), float(values.max()), sample)


def choose_pixel_range(
    given: PixelRange | None, splits: Sequence[CocoSplit], log: Callable[[str], None]
) -> PixelRange | None:
    """The values that become 0 and 255: those given, else those that the pictures of the splits use.

    Args:
        given: ``model.pixel_range`` of the config.
        splits: the training sets of a run.
        log: is called with a line that names the range, where there is one.

    Returns:
        None where no picture has more than 8 bits.
    """
    if given is not None:
        log(f"pixel values: {_text(given)} becomes 0..255 in pictures of more than 8 bits (model.pixel_range)")
        return given
    used = [_used(split) for split in splits]
    found = [picture for pictures in used for picture in pictures]
    if not found:
        return None
    chosen = range_of(found)
    log(
        f"pixel values: pictures of more than 8 bits use {_text(_limits(found))} ({len(found)} were looked at); "
        f"{_text(chosen)} becomes 0..255 (set another with -o model.pixel_range=[LOWEST,HIGHEST])"
    )
    ranges = {split.folder: range_of(pictures) for split, pictures in zip(splits, used) if pictures}
    if len(set(ranges.values())) > 1:
        each = ", ".join(f"{printable(str(folder))} {_text(own)}" for folder, own in ranges.items())
        log(f"warning: the data sets differ in pixel values, and one range is used for all: {each}")
    return chosen


def range_of(pictures: Sequence[UsedValues]) -> PixelRange:
    """The range of values to be shown, from those of some pictures.

    It is the range of a usual sensor (0..1023, 0..4095, ...) where the values fill at least a quarter of it: nothing is
    cut off then, and it does not depend on the sample. Otherwise, as with thermal cameras, whose values begin far
    above 0, and with dark pictures that have a few hot pixels, all but the lowest and highest thousandth of the values.
    """
    values = np.concatenate([picture.sample for picture in pictures])
    low, high = (float(value) for value in np.percentile(values, PERCENTILES))
    lowest, highest = _limits(pictures)
    top = next((top for top in TOPS if highest <= top), None)
    if top is not None and lowest >= 0 and (high - low >= SHARE * top or low == high):
        return 0.0, float(top)
    if low == high:
        return low, low + 1
    margin = MARGIN * (high - low)
    low = max(low - margin, 0.0) if lowest >= 0 else low - margin
    return _rounded(low, high + margin)


def _limits(pictures: Sequence[UsedValues]) -> PixelRange:
    return min(picture.lowest for picture in pictures), max(picture.highest for picture in pictures)


def _rounded(low: float, high: float) -> PixelRange:
    """Outwards to three digits of the distance, so that the config shows no digits without meaning."""
    step = 10.0 ** np.floor(np.log10(high - low) - 2)
    return float(np.floor(low / step) * step), float(np.ceil(high / step) * step)


def _headers(split: CocoSplit) -> list[tuple[str, PictureHeader]]:
    """File name and header of pictures that may be odd, spread evenly over the split; unreadable ones are left out."""
    files = [record.file for record in split.records if record.file.lower().endswith(SUFFIXES)]
    headers = []
    for file in _spread(files, HEADERS):
        try:
            headers.append((file, picture_header(split.folder / file)))
        except BadImage:
            continue  # named when it is read
    return headers


def _used(split: CocoSplit) -> list[UsedValues]:
    """The values of the pictures of more than 8 bits in a sample of a split."""
    used = []
    for file in _spread([file for file, header in _headers(split) if header.deep], DECODED):
        values = _values(split.folder / file)
        picture = None if values is None else used_values(values)
        used += [] if picture is None else [picture]
    return used


def _values(file: Path) -> np.ndarray | None:
    try:
        return read_values(file)
    except BadImage:
        return None  # named when it is read


def _spread(items: Sequence, count: int) -> list:
    """At most ``count`` of the items, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _text(pixel_range: PixelRange) -> str:
    return "..".join(f"{value:.0f}" if value == round(value) else f"{value:.6g}" for value in pixel_range)
