"""The vocabulary of the generated inference set (nli.py). Every noun takes -s in the plural, every verb -ed in the past."""

from __future__ import annotations

PEOPLE = (
    "doctor", "teacher", "farmer", "lawyer", "nurse", "painter", "baker", "pilot", "singer", "student", "soldier", "waiter",
    "driver", "dancer", "writer", "judge", "sailor", "tailor", "barber", "guard", "clerk", "actor", "engineer", "plumber",
    "gardener", "carpenter", "butcher", "mechanic", "reporter", "scientist", "cashier", "tourist", "hunter", "monk",
)  # fmt: skip

ADJECTIVES = ("young", "old", "tall", "friendly", "tired", "cheerful", "quiet", "clever", "careful", "polite")

PLACES = (
    "in the park", "at the market", "on the beach", "in the kitchen", "near the river", "in the library", "at the station",
    "in the garden", "on the bridge", "in the museum", "at the harbor", "in the hotel", "behind the church", "in the village",
    "at the airport", "near the lake", "in the forest", "on the hill", "at the stadium", "in the theater",
)  # fmt: skip

#: Things that one can do together, so that doing one says nothing of another.
ACTIVITIES = (
    "wearing a coat", "holding an umbrella", "eating an apple", "drinking tea", "reading a letter", "singing a song",
    "carrying a bag", "smiling", "waiting for a friend", "looking at the sky", "pushing a cart", "taking pictures",
    "listening to music", "writing a note", "counting coins", "waving a flag", "telling a story", "feeding the birds",
    "wearing glasses", "holding a book", "humming a tune", "leaning on a wall", "wearing gloves", "checking a map",
    "eating bread", "wearing a hat", "drinking water", "holding a candle", "laughing", "chewing gum",
)  # fmt: skip

#: What one person may do to another, in either direction.
DEEDS = (
    ("thank", "thanked"), ("help", "helped"), ("call", "called"), ("follow", "followed"), ("push", "pushed"),
    ("invite", "invited"), ("visit", "visited"), ("warn", "warned"), ("greet", "greeted"), ("hug", "hugged"),
    ("praise", "praised"), ("blame", "blamed"), ("scold", "scolded"), ("tease", "teased"), ("trick", "tricked"),
    ("rescue", "rescued"), ("kiss", "kissed"), ("trust", "trusted"), ("welcome", "welcomed"), ("watch", "watched"),
    ("ignore", "ignored"), ("question", "questioned"), ("admire", "admired"), ("support", "supported"), ("chase", "chased"),
)  # fmt: skip

#: What one may do to a thing of any kind.
HANDLINGS = (
    ("paint", "painted"), ("want", "wanted"), ("remove", "removed"), ("photograph", "photographed"), ("touch", "touched"),
    ("mention", "mentioned"), ("notice", "noticed"), ("describe", "described"), ("discover", "discovered"), ("receive", "received"),
)  # fmt: skip

#: Kinds of things and what belongs to them.
KINDS = {
    "dog": ("poodle", "terrier", "beagle", "bulldog"),
    "bird": ("sparrow", "eagle", "parrot", "pigeon", "swan"),
    "insect": ("beetle", "ant", "bee", "cricket", "moth"),
    "flower": ("rose", "tulip", "orchid", "daffodil", "violet"),
    "tree": ("oak", "maple", "willow", "pine", "elm"),
    "fruit": ("pear", "banana", "lemon", "melon", "apple"),
    "vegetable": ("carrot", "onion", "turnip", "pumpkin", "cucumber"),
    "vehicle": ("car", "truck", "van", "tractor", "scooter"),
    "tool": ("hammer", "wrench", "shovel", "chisel", "drill"),
    "instrument": ("guitar", "violin", "trumpet", "piano", "drum"),
    "garment": ("shirt", "jacket", "skirt", "sweater", "coat"),
    "weapon": ("sword", "rifle", "dagger", "spear", "cannon"),
    "boat": ("canoe", "ferry", "kayak", "raft", "yacht"),
    "building": ("barn", "castle", "cottage", "temple", "tower"),
}

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

#: Ways to begin a premise that change nothing in what follows from it.
OPENINGS = ("", "", "", "", "", "Today ", "Luckily ", "Clearly ")
