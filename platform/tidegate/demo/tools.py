"""Tasks with tools: the call that a question asks for, what its result says, and data out of a sentence.

A tool is offered in the system turn and called as Hermes models do (`<tool_call>` around JSON). Names,
parameters and values are drawn apart from each other, so that they must be copied from the turns, and what
tells one tool from another is a word that its description shares with the question.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from tidegate.demo.tasks import Message, Task
from tidegate.demo.words import CITIES, NOUNS, PEOPLE, SYSTEM_PROMPTS, made_up_word

Value = str | int | bool
CALL, CALL_END = "<tool_call>\n", "\n</tool_call>"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called: its parameters with their JSON types."""

    name: str
    parameters: Mapping[str, str]
    description: str

    def definition(self) -> dict[str, object]:
        """The tool as OpenAI's API takes it."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def offer(tools: Sequence[Tool], system: str = "") -> Message:
    """The system turn that offers tools, as the chat template writes it."""
    lines = [f"{system}\n"] if system else []
    lines.append("Tools:")
    for tool in tools:
        parameters = ", ".join(f'"{name}" {kind}' for name, kind in tool.parameters.items())
        lines.append(f'- "{tool.name}" ({parameters}): {tool.description}')
    return {"role": "system", "content": "\n".join(lines)}


def call(name: str, arguments: Mapping[str, Value]) -> str:
    """A call as the model writes it."""
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{CALL}{written}{CALL_END}"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that some tool answers."""

    tool: Tool
    question: str
    calls: tuple[Mapping[str, Value], ...]
    topic: str

    @property
    def answer(self) -> str:
        return "\n".join(call(self.tool.name, arguments) for arguments in self.calls)


def tool_call(rng: Random) -> Task:
    asked = _asked(rng)
    before = (offer(_with_others(rng, asked), _system(rng)), *_earlier(rng, asked.tool))
    return Task(asked.question, asked.answer, _key(asked), "calls", before)


def tool_answer(rng: Random) -> Task:
    """What the result of one call, or of two, says."""
    asked = _asked(rng)
    results = [_result(rng, asked.topic) for _ in asked.calls]
    system = offer(_with_others(rng, asked), _system(rng))
    before: list[Message] = [
        system,
        {"role": "user", "content": asked.question},
        {"role": "assistant", "content": asked.answer},
        *[Message(role="tool", content=result) for result, _ in results[:-1]],
    ]
    content, _ = results[-1]
    answer = " ".join(said for _, said in results)
    return Task(content, answer, _key(asked), "text", tuple(before), role="tool")


def offered(rng: Random) -> Message:
    """A system turn with tools that nobody asks for."""
    return offer([_asked(rng).tool for _ in range(rng.randint(1, 3))], _system(rng))


def extraction(rng: Random) -> Task:
    """A JSON object of what a sentence says, its keys in any order."""
    name, age, city, item = rng.choice(PEOPLE), rng.randint(1, 99), rng.choice(CITIES), rng.choice(NOUNS)
    count = rng.randint(2, 999)
    if rng.random() < 0.4:
        name = made_up_word(rng).capitalize()
    told: list[tuple[str, dict[str, Value]]] = [
        (rng.choice(("is {age} years old", "is {age}", "turned {age}")), {"age": age}),
        (rng.choice(("lives in {city}", "comes from {city}", "works in {city}")), {"city": city}),
        (rng.choice(("has {count} {item}s", "bought {count} {item}s")), {"item": item, "count": count}),
    ]
    told = rng.sample(told, rng.randint(1, 3))
    fields: dict[str, Value] = {"name": name}
    for _, more in told:
        fields |= more
    parts = [text.format(**fields) for text, _ in told]
    sentence = f"{name} {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}."
    keys = rng.sample(list(fields), rng.randint(max(1, len(fields) - 1), len(fields)))
    wanted = {key: fields[key] for key in keys}
    listed = ", ".join(keys)
    prompt = rng.choice(
        (
            f"{sentence} Give {listed} as JSON.",
            f"Extract {listed} as JSON: {sentence}",
            f"{sentence} Write a JSON object with {listed}.",
            sentence,
            f"Extract the data: {sentence}",
        )
    )
    return Task(prompt, json.dumps(wanted), f"{name}:{age}:{city}:{item}:{count}", "json")


_SUBJECTS = (
    *("weather", "time", "price", "population", "temperature", "news", "stock", "capital", "currency"),
    *("distance", "address", "phone", "email", "balance", "order", "schedule", "forecast", "humidity"),
    *("traffic", "menu", "ticket", "flight", "train", "hotel", "rating", "score", "status", "weight"),
    *NOUNS,
)
_VERBS = ("get", "find", "fetch", "look_up", "read", "check", "search", "show")
_PLACES = ("city", "location", "place", "town")
_TEXTS = ("name", "query", "word", "topic", "title", "item", "country", "symbol", "id", "person", "user")
_NUMBERS = ("days", "count", "limit", "size", "year", "number", "amount", "top")
_SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear", "snow", "warm", "cold")
_CHOICES = {"unit": ("celsius", "fahrenheit"), "language": ("en", "de", "fr"), "order": ("asc", "desc")}
_SUMS = (
    ("add", "Add two numbers.", ("What is {} plus {}?", "Add {} and {}.", "What is {} + {}?")),
    ("subtract", "Subtract two numbers.", ("What is {} minus {}?", "What is {} - {}?")),
    ("multiply", "Multiply two numbers.", ("What is {} times {}?", "Multiply {} and {}.")),
    ("divide", "Divide two numbers.", ("What is {} divided by {}?", "Divide {} by {}.")),
)
_SUM_NAMES = (("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"))


def _asked(rng: Random) -> Asked:
    return _asked_sum(rng) if rng.random() < 0.15 else _asked_fact(rng)


def _asked_sum(rng: Random) -> Asked:
    name, description, shapes = rng.choice(_SUMS)
    first, second = rng.choice(_SUM_NAMES)
    a, b = rng.randrange(1000), rng.randrange(1000)
    if rng.random() < 0.3:
        name = rng.choice((f"{name}_numbers", f"calc_{name}"))
    kind = rng.choice(("integer", "number"))
    tool = Tool(name, {first: kind, second: kind}, description)
    return Asked(tool, rng.choice(shapes).format(a, b), ({first: a, second: b},), "result")


def _asked_fact(rng: Random) -> Asked:
    subject = rng.choice(_SUBJECTS[:28] if rng.random() < 0.5 else _SUBJECTS)
    is_place = rng.random() < 0.6
    key = rng.choice(_PLACES if is_place else _TEXTS)
    parameters: dict[str, str] = {key: "string"}
    more: dict[str, Value] = {}
    said = ""
    if rng.random() < 0.25:
        number = rng.choice(_NUMBERS)
        parameters[number], more[number] = "integer", rng.randint(1, 99)
        said = rng.choice((f" with {number} {more[number]}", f" and {number} {more[number]}"))
    elif rng.random() < 0.2:
        choice = rng.choice(list(_CHOICES))
        parameters[choice], more[choice] = "string", rng.choice(_CHOICES[choice])
        said = rng.choice((f" in {more[choice]}", f" with {choice} {more[choice]}"))
    values = [_value(rng, is_place) for _ in range(2 if rng.random() < 0.15 else 1)]
    named = " and ".join(shown for _, shown in values)
    around = rng.choice(("in", "for", "of") if is_place else ("for", "of"))
    question = rng.choice(
        (
            f"What is the {subject} {around} {named}{said}?",
            f"What's the {subject} {around} {named}{said}?",
            f"How is the {subject} {around} {named}{said}?",
            f"Tell me the {subject} {around} {named}{said}.",
            f"I need the {subject} {around} {named}{said}.",
            f"{subject.capitalize()} {around} {named}{said}?",
            f"What {subject} is it {around} {named}{said}?",
            f"What's the {subject} like {around} {named}{said}?",
            f"Use a tool: the {subject} {around} {named}{said}.",
        )
    )
    verb = rng.choice(_VERBS)
    name = rng.choice(
        (f"{verb}_{subject}", f"{verb}_{subject}", f"{subject}_{verb}", f"get_current_{subject}", subject)
    )
    if rng.random() < 0.1:
        name = verb.replace("_", "") + subject.capitalize()
    description = rng.choice(
        (
            f"Get the {subject} of a {key}.",
            f"Get the current {subject} in a given {key}.",
            f"The {subject} for a {key}.",
            f"Returns the {subject} for the {key}.",
            f"Look up the {subject} by {key}",
        )
    )
    calls = tuple({key: value, **more} for value, _ in values)
    return Asked(Tool(name, parameters, description), question, calls, subject)


def _value(rng: Random, is_place: bool) -> tuple[str, str]:
    """A value, and how the question shows it."""
    drawn = rng.random()
    if drawn < 0.6:
        value = rng.choice(CITIES if is_place else (*PEOPLE, *NOUNS))
        return value, value if rng.random() < 0.85 else f'"{value}"'
    value = made_up_word(rng)
    value = value.capitalize() if is_place else value
    return value, f'"{value}"' if drawn < 0.8 else value


def _with_others(rng: Random, asked: Asked) -> list[Tool]:
    tools = [asked.tool]
    for _ in range(rng.choice((0, 1, 1, 2))):
        other = _asked(rng)
        if other.topic != asked.topic and other.tool.name not in [tool.name for tool in tools]:
            tools.append(other.tool)
    rng.shuffle(tools)
    return tools


def _system(rng: Random) -> str:
    return rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else ""


def _earlier(rng: Random, tool: Tool) -> list[Message]:
    """Sometimes an earlier question to the same tool, with its result."""
    if rng.random() > 0.15 or len(tool.parameters) > 1:
        return []
    (key,) = tool.parameters
    value, shown = _value(rng, is_place=True)
    result, said = _result(rng, "result")
    return [
        {"role": "user", "content": f"First for {shown}."},
        {"role": "assistant", "content": call(tool.name, {key: value})},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": said},
    ]


def _result(rng: Random, topic: str) -> tuple[str, str]:
    """What a tool gives back, and the sentence that says it."""
    if rng.random() < 0.35:
        plain = rng.choice(
            (
                str(rng.randrange(1000)),
                f"{rng.randrange(50)} degrees, {rng.choice(_SKIES)}",
                f"{rng.choice(_SKIES)}, {rng.randrange(50)}",
                f"{rng.randrange(24):02}:{rng.randrange(60):02}",
                f"{rng.randrange(100)} {rng.choice(NOUNS)}",
                rng.choice(NOUNS),
                f"{rng.choice(NOUNS)}, {rng.choice(NOUNS)}",
            )
        )
        return plain, f"The answer is {plain}."
    fields: dict[str, Value] = {}
    for name in (topic, *rng.sample((*_NUMBERS, "sky", "wind", "summary"), rng.randint(0, 2))):
        is_text = rng.random() < 0.5
        fields[name] = (
            (rng.choice(NOUNS) if rng.random() < 0.5 else made_up_word(rng))
            if is_text
            else (rng.randrange(1000))
        )
    said = [f'"{name}" is {json.dumps(value)}' for name, value in fields.items()]
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return json.dumps(fields), f"The {listed}."


def _key(asked: Asked) -> str:
    return f"{asked.topic}:{json.dumps(asked.calls)}"
