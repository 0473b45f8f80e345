"""Objects365's 365 classes with their official ids, 1..365, as weights that were trained on it have them.

Source: Shao et al., "Objects365: A Large-scale, High-quality Dataset for Object Detection", ICCV 2019, and the
categories of its annotation files (version 2), slips of spelling corrected.
"""

from __future__ import annotations

from collections.abc import Sequence

from mvision.structures.category import Category
from mvision.structures.coco_names import canonical

# In the order of the ids from 1 on.
_NAMES = """
person, sneakers, chair, other shoes, hat, car, lamp, glasses, bottle, desk, cup, street lights, cabinet/shelf,
handbag/satchel, bracelet, plate, picture/frame, helmet, book, gloves, storage box, boat, leather shoes, flower,
bench, potted plant, bowl/basin, flag, pillow, boots, vase, microphone, necklace, ring, suv, wine glass, belt,
monitor/tv, backpack, umbrella, traffic light, speaker, watch, tie, trash bin can, slippers, bicycle, stool,
barrel/bucket, van, couch, sandals, basket, drum, pen/pencil, bus, wild bird, high heels, motorcycle, guitar, carpet,
cell phone, bread, camera, canned, truck, traffic cone, cymbal, lifesaver, towel, stuffed toy, candle, sailboat,
laptop, awning, bed, faucet, tent, horse, mirror, power outlet, sink, apple, air conditioner, knife, hockey stick,
paddle, pickup truck, fork, traffic sign, balloon, tripod, dog, spoon, clock, pot, cow, cake, dining table, sheep,
hanger, blackboard/whiteboard, napkin, other fish, orange/tangerine, toiletry, keyboard, tomato, lantern, machinery
vehicle, fan, green vegetables, banana, baseball glove, airplane, mouse, train, pumpkin, soccer, skiboard, luggage,
nightstand, tea pot, telephone, trolley, head phone, sports car, stop sign, dessert, scooter, stroller, crane, remote,
refrigerator, oven, lemon, duck, baseball bat, surveillance camera, cat, jug, broccoli, piano, pizza, elephant,
skateboard, surfboard, gun, skating and skiing shoes, gas stove, donut, bow tie, carrot, toilet, kite, strawberry,
other balls, shovel, pepper, computer box, toilet paper, cleaning products, chopsticks, microwave, pigeon, baseball,
cutting/chopping board, coffee table, side table, scissors, marker, pie, ladder, snowboard, cookies, radiator, fire
hydrant, basketball, zebra, grape, giraffe, potato, sausage, tricycle, violin, egg, fire extinguisher, candy, fire
truck, billiards, converter, bathtub, wheelchair, golf club, briefcase, cucumber, cigar/cigarette, paint brush, pear,
heavy truck, hamburger, extractor, extension cord, tong, tennis racket, folder, american football, earphone, mask,
kettle, tennis, ship, swing, coffee machine, slide, carriage, onion, green beans, projector, frisbee, washing
machine/drying machine, chicken, printer, watermelon, saxophone, tissue, toothbrush, ice cream, hot air balloon,
cello, french fries, scale, trophy, cabbage, hot dog, blender, peach, rice, wallet/purse, volleyball, deer, goose,
tape, tablet, cosmetics, trumpet, pineapple, golf ball, ambulance, parking meter, mango, key, hurdle, fishing rod,
medal, flute, brush, penguin, megaphone, corn, lettuce, garlic, swan, helicopter, green onion, sandwich, nuts, speed
limit sign, induction cooker, broom, trombone, plum, rickshaw, goldfish, kiwi fruit, router/modem, poker card,
toaster, shrimp, sushi, cheese, notepaper, cherry, pliers, cd, pasta, hammer, cue, avocado, hami melon, flask,
mushroom, screwdriver, soap, recorder, bear, eggplant, board eraser, coconut, tape measure/ruler, pig, showerhead,
globe, chips, steak, crosswalk sign, stapler, camel, formula 1, pomegranate, dishwasher, crab, hoverboard, meatball,
rice cooker, tuba, calculator, papaya, antelope, parrot, seal, butterfly, dumbbell, donkey, lion, urinal, dolphin,
electric drill, hair dryer, egg tart, jellyfish, treadmill, lighter, grapefruit, game board, mop, radish, baozi,
target, french, spring rolls, monkey, rabbit, pencil case, yak, red cabbage, binoculars, asparagus, barbell, scallop,
noodles, comb, dumpling, oyster, table tennis paddle, cosmetics brush/eyeliner pencil, chainsaw, eraser, lobster,
durian, okra, lipstick, cosmetics mirror, curling, table tennis
"""
UNUSED = Category(id=0, name="unused")
"""The class of row 0 of classifiers with one row per id: no object of Objects365 has the id 0."""
OBJECTS365 = [
    Category(id=number, name=name.strip())
    for number, name in enumerate(_NAMES.replace("\n", " ").strip().split(","), start=1)
]


def objects365_categories(names: Sequence[str]) -> list[Category] | None:
    """``UNUSED`` and ``OBJECTS365``, if these are the names of a classifier with one row per id, 366; else None.

    They are where most are the names of these classes, where none has a name ("LABEL_3"), and where the names begin
    with class 1: 365 names for 366 rows are shifted by one.
    """
    official = [UNUSED, *OBJECTS365]
    if len(names) != len(official):
        return None
    words = [canonical(name) for name in names]
    same = max(
        sum(word == canonical(category.name) for word, category in zip(words, row_by_row))
        for row_by_row in (official, OBJECTS365)
    )
    unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return official if unnamed or same > 0.7 * len(official) else None
