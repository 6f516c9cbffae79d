"""The words that tasks are made of: real nouns for lists, made-up words for letter tasks."""

from random import Random

_NOUNS = """
apple bread chair cloud river stone table paper house garden window bottle candle basket ladder
hammer needle pencil button mirror carpet bridge castle island desert forest valley meadow ocean
harbor anchor sailor captain teacher doctor farmer painter singer baker driver pilot tiger horse
rabbit turtle eagle falcon salmon spider monkey panda camel zebra lemon melon cherry orange banana
carrot onion pepper potato tomato butter cheese honey sugar coffee winter summer autumn spring
silver copper golden purple yellow orchid violet jacket shirt glove boot scarf violin guitar piano
drum flute engine wheel rocket signal magnet battery cable screen camera radio clock
"""
NOUNS = tuple(_NOUNS.split())
_CITIES = """
Paris London Berlin Rome Madrid Tokyo Oslo Vienna Prague Lisbon Dublin Athens Warsaw Helsinki Moscow
Boston Chicago Seattle Denver Dallas Austin Toronto Sydney Delhi Mumbai Cairo Lima Zurich Geneva
Munich Hamburg Milan Naples Venice Lyon Nice Porto Seoul Beijing Bangkok Singapore Dubai Istanbul
Amsterdam Brussels Copenhagen Stockholm Budapest Barcelona Nairobi Miami Houston Phoenix Kyoto Osaka
"""
CITIES = (*_CITIES.split(), "New York", "San Francisco", "Los Angeles", "Hong Kong", "Cape Town")
_PEOPLE = """
Anna Ben Carla David Emma Felix Greta Hugo Ida Jonas Karl Lena Mia Noah Olga Paul Rosa Sam Tom Uma
Victor Wendy Alice Bob Carol Eve Frank Grace Henry Jane John Mary Peter Sarah Alan Ada Linus
"""
PEOPLE = tuple(_PEOPLE.split())
SYSTEM_PROMPTS = (
    "You are Tide, the demo model of Tidegate.",
    "You are a helpful assistant.",
    "Answer briefly and correctly.",
    "You answer questions about Tidegate.",
    "You are a careful assistant. Follow the request exactly.",
)

_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_VOWELS = "aeiou"
_ENDINGS = ("", "", "n", "r", "s", "l", "m", "t", "k")


def made_up_word(rng: Random, max_syllables: int = 3) -> str:
    """A pronounceable word of 2 to `max_syllables` syllables (4 to 3 * max_syllables letters)."""
    syllables = [
        rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + rng.choice(_ENDINGS)
        for _ in range(rng.randint(2, max_syllables))
    ]
    return "".join(syllables)


def joined(items: list[str]) -> str:
    """`a, b and c`: how people write a list inside a sentence."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
