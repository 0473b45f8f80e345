"""Poses of the articulated figure: joint angles of a 3-D skeleton, seen by a parallel camera.

Because left and right, front and back come from one skeleton turned in space, keypoints, faces and hidden limbs agree.
Camera axes: x to the right of the image, y down, z towards the viewer. Lengths in body heights, angles in degrees.
"""

from dataclasses import dataclass

import numpy as np

KEYPOINTS = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
SIDES = ("left", "right")
# How often each kind of pose is drawn.
ACTIONS = {
    "stand": 0.2,
    "walk": 0.2,
    "wave": 0.12,
    "cheer": 0.08,
    "akimbo": 0.08,
    "reach": 0.08,
    "star": 0.06,
    "kick": 0.06,
    "sit": 0.06,
    "squat": 0.06,
}


@dataclass
class Limb:
    """Directions of two bones: away from the body's middle (`spread`) and to the front (`swing`); 0, 0 hangs down."""

    spread: float
    swing: float
    lower_spread: float
    lower_swing: float


@dataclass
class Build:
    """Proportions of one figure: head size and width factors (1 is an adult of average build)."""

    head: float
    width: float
    shoulder: float
    leg: float


@dataclass
class Skeleton:
    """joints: the 17 keypoints plus 'head', 'left_hand', 'left_toe', ... as (3,) in camera axes, hips at the origin.

    forward, side: (3,) unit vectors of the head: where the face looks, and the person's own left. tilt: head roll.
    """

    joints: dict[str, np.ndarray]
    forward: np.ndarray
    side: np.ndarray
    tilt: float
    build: Build


def sample_skeleton(rng: np.random.Generator) -> Skeleton:
    """A random figure in a random pose, seen from a random side."""
    child = rng.random() < 0.25
    build = Build(
        head=rng.uniform(1.25, 1.5) if child else rng.uniform(0.95, 1.15),
        width=rng.uniform(0.85, 1.3),
        shoulder=rng.uniform(0.88, 1.12),
        leg=rng.uniform(0.78, 0.9) if child else rng.uniform(0.92, 1.06),
    )
    action = str(rng.choice(list(ACTIONS), p=list(ACTIONS.values())))
    arms, legs, lean = _angles(rng, action)
    # Mostly towards the viewer, one in five from behind.
    yaw = float(rng.choice([rng.normal(0, 35), rng.normal(180, 30), rng.uniform(-180, 180)], p=[0.55, 0.2, 0.25]))
    camera = _rotation_x(rng.uniform(0, 14)) @ _rotation_y(yaw)
    trunk = _rotation_x(lean) @ _rotation_z(rng.normal(0, 5))
    twist = trunk @ _rotation_y(rng.normal(0, 12))

    local = {}
    up = trunk @ np.array([0.0, -1.0, 0.0])
    chest = 0.285 * up
    for side, sign, arm, leg in zip(SIDES, (1, -1), arms, legs):
        local[f"{side}_hip"] = np.array([sign * 0.062 * build.width, 0, 0])
        local[f"{side}_knee"] = local[f"{side}_hip"] + 0.245 * build.leg * _bone(sign, leg.spread, leg.swing)
        shank = _bone(sign, leg.lower_spread, leg.lower_swing)
        local[f"{side}_ankle"] = local[f"{side}_knee"] + 0.235 * build.leg * shank
        # The foot stands at a right angle to the shank, turned out a little.
        toe = np.array([sign * 0.25, -shank[2] * 0.8 + 0.15, max(shank[1], 0.2)])
        local[f"{side}_toe"] = local[f"{side}_ankle"] + 0.085 * toe / np.linalg.norm(toe) + 0.02 * shank
        local[f"{side}_shoulder"] = chest + twist @ np.array([sign * 0.108 * build.shoulder, 0, 0])
        upper = twist @ _bone(sign, arm.spread, arm.swing)
        lower = twist @ _bone(sign, arm.lower_spread, arm.lower_swing)
        local[f"{side}_elbow"] = local[f"{side}_shoulder"] + 0.16 * upper
        local[f"{side}_wrist"] = local[f"{side}_elbow"] + 0.145 * lower
        local[f"{side}_hand"] = local[f"{side}_wrist"] + 0.035 * lower
    local["head"] = chest + (0.075 + 0.08 * build.head) * up + np.array([0, 0, 0.01])
    joints = {name: camera @ point for name, point in local.items()}

    turn = camera @ _rotation_y(np.clip(rng.normal(0, 25), -60, 60))
    forward, side_axis = turn @ np.array([0.0, 0.0, 1.0]), turn @ np.array([1.0, 0.0, 0.0])
    roll = _rotation_z(tilt := float(np.clip(rng.normal(0, 8), -20, 20)))
    skeleton = Skeleton(joints, roll @ forward, roll @ side_axis, tilt, build)
    _add_face(skeleton, roll @ np.array([0.0, -1.0, 0.0]))
    return skeleton


def _add_face(skeleton: Skeleton, up: np.ndarray) -> None:
    head, size = skeleton.joints["head"], skeleton.build.head
    forward, side = skeleton.forward, skeleton.side
    skeleton.joints["nose"] = head + size * (0.08 * forward - 0.012 * up)
    for name, sign in zip(SIDES, (1, -1)):
        skeleton.joints[f"{name}_eye"] = head + size * (0.064 * forward + sign * 0.031 * side + 0.016 * up)
        skeleton.joints[f"{name}_ear"] = head + size * (sign * 0.074 * side - 0.005 * up - 0.006 * forward)


def _angles(rng: np.random.Generator, action: str) -> tuple[list[Limb], list[Limb], float]:
    """Arms and legs (left, right) and the trunk's forward lean."""
    arms = [_hanging_arm(rng), _hanging_arm(rng)]
    legs = [_leg(rng.uniform(2, 8), rng.normal(0, 4), rng.uniform(0, 8)) for _ in SIDES]
    lean = rng.normal(0, 4)
    ahead = int(rng.integers(2))
    if action == "walk":
        stride = rng.uniform(15, 45)
        legs[ahead] = _leg(3, stride, rng.uniform(5, 30))
        legs[1 - ahead] = _leg(3, -0.7 * stride, rng.uniform(8, 60))
        for side, swing in ((ahead, -stride), (1 - ahead, stride)):
            arms[side] = _arm(rng.uniform(5, 18), swing * rng.uniform(0.6, 1.2), elbow=rng.uniform(15, 90))
        lean = -rng.uniform(0, 12)
    elif action == "wave":
        arms[ahead] = _raised_arm(rng)
    elif action == "cheer":
        arms = [_raised_arm(rng), _raised_arm(rng)]
        legs = [_leg(rng.uniform(4, 16), rng.normal(0, 6), rng.uniform(0, 15)) for _ in SIDES]
    elif action == "akimbo":
        arms[ahead] = Limb(rng.uniform(38, 55), -12, rng.uniform(-62, -42), 12)
        if rng.random() < 0.7:
            arms[1 - ahead] = Limb(rng.uniform(38, 55), -12, rng.uniform(-62, -42), 12)
    elif action == "reach":
        for side in range(2) if rng.random() < 0.5 else (ahead,):
            arms[side] = _arm(rng.uniform(5, 35), rng.uniform(50, 130), elbow=rng.uniform(0, 50))
    elif action == "star":
        arms = [Limb(a := rng.uniform(65, 115), 0, a + rng.uniform(-20, 35), rng.uniform(0, 15)) for _ in SIDES]
        legs = [_leg(rng.uniform(16, 38), rng.normal(0, 5), 0) for _ in SIDES]
    elif action == "kick":
        legs[ahead] = _leg(rng.uniform(5, 25), rng.uniform(35, 85), rng.uniform(0, 40))
        arms = [Limb(a := rng.uniform(30, 95), rng.normal(0, 20), a, rng.uniform(0, 40)) for _ in SIDES]
        lean = rng.uniform(-5, 12)
    elif action == "sit":
        legs = [_leg(rng.uniform(5, 16), rng.uniform(70, 92), rng.uniform(65, 100)) for _ in SIDES]
        arms = [_arm(rng.uniform(8, 20), rng.uniform(15, 45), elbow=rng.uniform(15, 50)) for _ in SIDES]
    elif action == "squat":
        legs = [_leg(rng.uniform(10, 30), rng.uniform(55, 100), rng.uniform(90, 135)) for _ in SIDES]
        arms = [_arm(rng.uniform(5, 25), rng.uniform(20, 90), elbow=rng.uniform(0, 60)) for _ in SIDES]
        lean = -rng.uniform(5, 30)
    return arms, legs, lean


def _arm(spread: float, swing: float, elbow: float) -> Limb:
    """An arm bent at the elbow to the front."""
    return Limb(spread, swing, spread * 0.5, swing + elbow)


def _hanging_arm(rng: np.random.Generator) -> Limb:
    return _arm(rng.uniform(6, 24), rng.normal(0, 10), elbow=rng.uniform(4, 40))


def _raised_arm(rng: np.random.Generator) -> Limb:
    spread = rng.uniform(95, 165)
    return Limb(spread, rng.uniform(0, 20), spread + rng.uniform(-10, 70), rng.uniform(0, 20))


def _leg(spread: float, swing: float, knee: float) -> Limb:
    """A leg bent at the knee to the back."""
    return Limb(spread, swing, spread * 0.4, swing - knee)


def _bone(sign: int, spread: float, swing: float) -> np.ndarray:
    a, b = np.radians(spread), np.radians(swing)
    return np.array([sign * np.sin(a), np.cos(a) * np.cos(b), np.cos(a) * np.sin(b)])


def _rotation_x(degrees: float) -> np.ndarray:
    """Tips what is near the viewer down: a camera that looks from above; a trunk that leans back."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1, 0, 0], [0, c, s], [0, -s, c]])


def _rotation_y(degrees: float) -> np.ndarray:
    """Turns the front (z) towards the right of the image (x)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _rotation_z(degrees: float) -> np.ndarray:
    """Clockwise in the image."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
