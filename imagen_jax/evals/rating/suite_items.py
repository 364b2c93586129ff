"""The prompts of a study, from a prompt suite."""

import re

from imagen_jax.evals.rating.design import Item
from imagen_jax.evals.suites import COCO, Suite

PEOPLE, NO_PEOPLE = "people", "no people"
# Imagen's section 3 reports COCO also without the captions that name people, by a list of words
# that is not published. This one is ours.
PEOPLE_WORDS = frozenset(
    "adult adults audience baby babies batter batters biker bikers boy boys bride catcher chef"
    " child children couple crowd cyclist dad daughter driver family father female females fireman"
    " friends gentleman girl girls groom group guy guys he her him his hitter husband individual"
    " individuals infant kid kids ladies lady male males man men mother mom officer passenger"
    " passengers pedestrian pedestrians people person persons pitcher player players policeman"
    " rider riders she skateboarder skateboarders skater skaters skier skiers snowboarder"
    " snowboarders someone son spectators student students surfer surfers teenager teenagers their"
    " they toddler toddlers tourist tourists umpire wife woman women worker workers".split()
)


def items_of(suite: Suite) -> list[Item]:
    """The prompts with their categories; for COCO these are "people" and "no people"."""
    category = lambda prompt: coco_category(prompt.text) if suite.name == COCO else prompt.category
    return [Item(prompt.id, prompt.text, category(prompt)) for prompt in suite.prompts]


def coco_category(caption: str) -> str:
    """The category of a caption: PEOPLE if it has one of PEOPLE_WORDS."""
    words = set(re.findall(r"[a-z]+", caption.lower()))
    return PEOPLE if words & PEOPLE_WORDS else NO_PEOPLE
