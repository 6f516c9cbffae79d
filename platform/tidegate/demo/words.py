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
