"""Objects followed through the frames of a video: detections get the number of their object.

The methods are those of the package ``trackers``. It is imported when the first tracker is made, here and nowhere else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np

from mvision.errors import UserError, did_you_mean
from mvision.inference.reading import DEFAULT_RATE
from mvision.inference.selection import DEFAULT_THRESHOLD, OTHERS, Selection, Threshold
from mvision.structures import Instances
from mvision.structures.tracks import NO_TRACK, Tracks

DEFAULT_TRACKER = "bytetrack"
WEAK = 0.1  # the lowest score with which a detection continues a track; that of the ByteTrack paper (section 4.1)
TRAIL = 30  # frames


@dataclass(frozen=True)
class _Method:
    """A class of the package ``trackers``, and what it is given.

    Attributes:
        name: of the class.
        thresholds: its arguments that are the score from which a detection starts a track, or is matched first.
        weak: it continues tracks with weaker detections too.
        picture: the order of the colour channels of the picture that it compares with the one before, to take the
            movement of the camera out; empty for a method without that.
        more: further arguments.
    """

    name: str
    thresholds: tuple[str, ...]
    weak: bool = False
    picture: str = ""
    more: Mapping[str, Any] | None = None


_BOTH = ("track_activation_threshold", "high_conf_det_threshold")
# A class has its tracker from the frame on in which it is first seen. That is not the video's first frame, in which
# these methods number every detection at once; elsewhere it takes them a second one.
_LATER = {"instant_first_frame_activation": False}
METHODS = {
    "bytetrack": _Method("ByteTrackTracker", _BOTH, weak=True),
    "botsort": _Method("BoTSORTTracker", _BOTH, weak=True, picture="bgr", more=_LATER),
    "cbiou": _Method("CBIoUTracker", _BOTH, weak=True, more=_LATER),
    "mcbyte": _Method("McByteTracker", _BOTH, weak=True, picture="rgb", more=_LATER),
    "ocsort": _Method("OCSORTTracker", ("high_conf_det_threshold",)),
    "sort": _Method("SORTTracker", ("track_activation_threshold",)),
}


def check_tracker(name: str) -> None:
    """Raise a ``UserError`` for an unknown tracker, or where the package ``trackers`` is missing."""
    if name not in METHODS:
        raise UserError(
            f"tracker '{name}': {did_you_mean(name, METHODS)} (a source stands in front of --track: "
            "mvision predict video.mp4 --track)"
        )
    if find_spec("trackers") is None:
        raise UserError("the package trackers is missing: pip install 'trackers>=2.6' (mvision's extra [tracking])")


class Tracker:
    """Follows the objects of one video, frame by frame, for a loop of one's own.

    Every class is tracked apart: a person never continues the track of a dog. Ids count from 1, over all classes, in
    the order in which the objects are confirmed: bytetrack, botsort, cbiou and mcbyte take two frames in succession for
    that, the others three. The same detections give the same ids.

    .. code-block:: python

        tracker = mvision.Tracker(rate=30)
        for picture in pictures:
            found = model.predict([picture], threshold=tracker.threshold_of_detections)[0]
            found = tracker.update(found, picture)

    Args:
        method: bytetrack, botsort, cbiou, mcbyte (without its masks), ocsort or sort.
        threshold: the score from which a detection starts a track, see ``predict_images``.
        rate: frames per second.

    Attributes:
        threshold_of_detections: for the prediction of every frame. ByteTrack and its like also need the weak detections
            of an object that is half hidden, down to ``WEAK``.
        counts: number of tracks by class name.

    Raises:
        UserError: an unknown method, a threshold outside 0..1, a rate that is not positive, or the package ``trackers``
            is missing.
    """

    def __init__(
        self, method: str = DEFAULT_TRACKER, threshold: Threshold = DEFAULT_THRESHOLD, rate: float = DEFAULT_RATE
    ) -> None:
        check_tracker(method)
        if not 0 < rate < float("inf"):
            raise UserError(f"rate {rate}: frames per second, a number above 0, are needed")
        self._method, self._rate = METHODS[method], rate
        self._selection = Selection(threshold)
        self.threshold_of_detections = detection_threshold(method, threshold)
        self.counts: dict[str, int] = {}
        self._size: tuple[int, int] | None = None
        self._of_class: dict[int, Any] = {}  # label -> tracker
        self._ids: dict[int, dict[int, int]] = {}  # label -> id of its tracker -> id in the video, of living tracks
        self._trails: dict[int, deque[np.ndarray]] = {}  # id in the video -> places
        self._last_id = 0
        self._movement: _Movement | None = None

    def update(self, found: Instances, picture: np.ndarray | None = None, seconds: float | None = None) -> Instances:
        """The instances of the next frame with their tracks.

        What reaches the threshold is there with or without a track, and weaker instances that continue a track.
        Masks, keypoints and scores stay as they are, and so do the boxes: they are those of the detections, not those
        that the tracker expects. A frame of another size than the one before starts all tracks anew.

        Args:
            found: sorted by falling score, as a model predicts them.
            picture: (H, W, 3) uint8 RGB; botsort and mcbyte need it.
            seconds: when the frame was taken, larger than before, where frames can be missing or come at a varying
                rate; None in every frame: all follow each other at the rate.
        """
        if self._method.picture and picture is None:
            raise UserError(f"{self._method.name} compares pictures: give update() the picture of the frame as well")
        if found.size != self._size:
            self._forget()
            self._size = found.size
        strong = found.scores >= self._selection.of_each(found).astype(np.float32)
        detections = replace(found, masks=None, keypoints=None, tracks=None).to_supervision()
        detections.data = {"row": np.arange(len(found))}
        ids = np.full(len(found), NO_TRACK, np.int64)
        given = {"frame": self._shown(picture)} if self._method.picture else {}
        for label in sorted({*self._of_class, *np.unique(found.labels[strong]).tolist()}):
            if label not in self._of_class:
                self._of_class[label] = self._new(float(self._selection.of_each(found)[found.labels == label][0]))
            tracked = self._of_class[label].update(detections[found.labels == label], timestamp=seconds, **given)
            if len(tracked):
                ids[tracked.data["row"]] = self._numbered(label, tracked.tracker_id, found.names[label])
            self._ids[label] = self._living(label)
        keep = strong | (ids != NO_TRACK)
        return replace(found.filter(keep), tracks=Tracks(ids[keep], self._places(ids[keep], found.boxes[keep])))

    def _new(self, threshold: float) -> Any:
        import trackers

        given = dict.fromkeys(self._method.thresholds, threshold) | dict(self._method.more or {})
        tracker = getattr(trackers, self._method.name)(frame_rate=self._rate, **given)
        if self._method.picture:
            self._movement = self._movement or _Movement(tracker.cmc)
            tracker.cmc = self._movement
        return tracker

    def _shown(self, picture: np.ndarray | None) -> np.ndarray:
        assert picture is not None
        return picture if self._method.picture == "rgb" else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)

    def _numbered(self, label: int, own: np.ndarray, name: str) -> list[int]:
        """The ids in the video for those of a class's tracker."""
        known = self._ids.setdefault(label, {})
        for track in own.tolist():
            if track != NO_TRACK and track not in known:
                self._last_id += 1
                known[track] = self._last_id
                self.counts[name] = self.counts.get(name, 0) + 1
        return [known.get(track, NO_TRACK) for track in own.tolist()]

    def _living(self, label: int) -> dict[int, int]:
        """The ids of a class whose tracks may go on; a camera that runs for weeks has millions of others."""
        living = {track.tracker_id for track in self._of_class[label].tracks}
        for track, number in self._ids.get(label, {}).items():
            if track not in living:
                self._trails.pop(number, None)
        return {track: number for track, number in self._ids.get(label, {}).items() if track in living}

    def _places(self, ids: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
        middles = boxes.reshape(-1, 2, 2).mean(axis=1).astype(np.float32)
        trails = []
        for number, middle in zip(ids.tolist(), middles):
            if number == NO_TRACK:
                trails.append(np.zeros((0, 2), np.float32))
                continue
            trail = self._trails.setdefault(number, deque(maxlen=TRAIL))
            trail.append(middle)
            trails.append(np.stack(trail))
        return trails

    def _forget(self) -> None:
        self._of_class.clear()
        self._ids.clear()
        self._trails.clear()
        self._movement = None


class _Movement:
    """The movement of the camera, which takes most of the time: once a frame, not once for every class."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self._frame = self._found = np.zeros(0)

    def estimate(self, frame: np.ndarray, boxes: np.ndarray | None = None) -> np.ndarray:
        """(2, 3): the affine map from the frame before to this one."""
        if frame is not self._frame:
            self._frame, self._found = frame, self._method.estimate(frame, boxes)
        return self._found


def detection_threshold(method: str, threshold: Threshold) -> Threshold:
    """The lowest score of a detection that a method can use, for the ``threshold`` from which tracks start."""
    if not METHODS[method].weak:
        return threshold
    if isinstance(threshold, Mapping):
        return {name: min(WEAK, value) for name, value in {OTHERS: DEFAULT_THRESHOLD, **threshold}.items()}
    return min(WEAK, threshold)
