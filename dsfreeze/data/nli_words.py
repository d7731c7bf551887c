"""The vocabulary of the generated inference set (nli.py). People take -s in the plural."""

from __future__ import annotations


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


def _verbs(text: str) -> tuple[tuple[str, str], ...]:
    """(infinitive, past); the past adds -ed, or stands behind a slash."""
    pairs = (verb.partition("/") for verb in text.split())
    return tuple((base, past or f"{base}ed") for base, _, past in pairs)


PEOPLE = _phrases("""
    doctor, teacher, farmer, lawyer, nurse, painter, baker, pilot, singer, student, soldier, waiter, driver, dancer,
    writer, judge, sailor, tailor, barber, guard, clerk, actor, engineer, plumber, gardener, carpenter, butcher,
    mechanic, reporter, scientist, cashier, tourist, hunter, monk
""")

ADJECTIVES = _phrases("young, old, tall, friendly, tired, cheerful, quiet, clever, careful, polite")

#: Things that one can do together, so that doing one says nothing of another.
ACTIVITIES = _phrases("""
    wearing a coat, holding an umbrella, eating an apple, drinking tea, reading a letter, singing a song,
    carrying a bag, smiling, waiting for a friend, looking at the sky, pushing a cart, taking pictures,
    listening to music, writing a note, counting coins, waving a flag, telling a story, feeding the birds,
    wearing glasses, holding a book, humming a tune, leaning on a wall, wearing gloves, checking a map,
    eating bread, wearing a hat, drinking water, holding a candle, laughing, chewing gum
""")

#: What one person may do to another, in either direction.
DEEDS = _verbs("""
    thank help call follow push invite/invited visit warn greet hug/hugged praise/praised blame/blamed scold
    tease/teased trick rescue/rescued kiss trust welcome/welcomed watch ignore/ignored question admire/admired support
    chase/chased
""")

#: What one may do to a thing of any kind.
HANDLINGS = _verbs("""
    paint want remove/removed photograph touch mention notice/noticed describe/described discover receive/received
""")

#: Kinds of things and what belongs to them.
KINDS = {
    "dog": _phrases("poodle, terrier, beagle, bulldog"),
    "bird": _phrases("sparrow, eagle, parrot, pigeon, swan"),
    "insect": _phrases("beetle, ant, bee, cricket, moth"),
    "flower": _phrases("rose, tulip, orchid, daffodil, violet"),
    "tree": _phrases("oak, maple, willow, pine, elm"),
    "fruit": _phrases("pear, banana, lemon, melon, apple"),
    "vegetable": _phrases("carrot, onion, turnip, pumpkin, cucumber"),
    "vehicle": _phrases("car, truck, van, tractor, scooter"),
    "tool": _phrases("hammer, wrench, shovel, chisel, drill"),
    "instrument": _phrases("guitar, violin, trumpet, piano, drum"),
    "garment": _phrases("shirt, jacket, skirt, sweater, coat"),
    "weapon": _phrases("sword, rifle, dagger, spear, cannon"),
    "boat": _phrases("canoe, ferry, kayak, raft, yacht"),
    "building": _phrases("barn, castle, cottage, temple, tower"),
}

NUMBERS = _phrases("two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")
FEW = _phrases("two, three, four")
MIDDLE = _phrases("five, six, seven")
MANY = _phrases("eight, nine, ten, eleven, twelve")
