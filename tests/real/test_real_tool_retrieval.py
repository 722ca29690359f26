"""Tool retrieval with the real embedder on a catalogue of 200 tools: the one that is needed is among ten, and the
prompt is a fifth of what it was or less."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from thrifty import Account, Plan
from thrifty.call import text_of
from thrifty.engines.scripted import ScriptedEngine
from thrifty.methods.context.tool_retrieval import ToolRetrieval, tool_name

THINGS = {  # what a tool calls it: what a user says
    "invoice": "bill for a customer",
    "employee": "member of staff",
    "vehicle": "car of the fleet",
    "flight": "plane ticket",
    "recipe": "cooking instructions for a dish",
    "calendar_event": "meeting in my diary",
    "email": "message in my mailbox",
    "photo": "picture I took",
    "song": "piece of music",
    "medicine": "drug from the pharmacy",
    "contract": "signed legal agreement",
    "database_table": "SQL table",
    "virtual_machine": "cloud server",
    "firewall_rule": "rule that blocks network traffic",
    "parcel": "package in the post",
    "hotel_room": "place to stay overnight",
    "plant": "flower in the garden",
    "book": "novel from the library",
    "football_match": "soccer game",
    "weather_station": "sensor that measures temperature and rain",
}
ACTIONS = {
    "create": ("Creates a new {}.", "Please make a new {}."),
    "delete": ("Deletes a {} for good.", "Get rid of that {}."),
    "list": ("Lists every {} there is.", "Show me all there is of this kind: {}."),
    "search": ("Searches for a {} by words.", "I am looking for a certain {}."),
    "update": ("Changes the fields of a {}.", "Something is wrong in the {}, please correct it."),
    "export": ("Exports a {} to a file.", "Save the {} as a document on my disk."),
    "share": ("Shares a {} with another person.", "Let my colleague see the {}."),
    "archive": ("Moves a {} into the archive.", "Put the {} away, I may need it in some years."),
    "schedule": ("Sets a date for a {}.", "Plan the {} for next Tuesday."),
    "count": ("Counts how many of a {} there are.", "How often do we have this: {}?"),
}
FIELDS = ("identifier", "owner", "reason", "language", "format", "priority")


def catalogue() -> list[dict[str, Any]]:
    fields = {f: {"type": "string", "description": f"The {f} that the request is to have, as text."} for f in FIELDS}
    schema = {"type": "object", "properties": fields, "required": list(FIELDS[:2])}
    tools = []
    for thing in THINGS:
        for action, (told, _) in ACTIONS.items():
            description = told.format(thing.replace("_", " "))
            function = {"name": f"{action}_{thing}", "description": description, "parameters": schema}
            tools.append({"type": "function", "function": function})
    return tools


@pytest.mark.real
async def test_the_needed_tool_is_among_ten_of_two_hundred(minilm: Any) -> None:
    tools, engine = catalogue(), ScriptedEngine("fine")
    pipeline = Plan("t", (ToolRetrieval(k=10),)).build({"answer": engine, "embedder": minilm})
    found = asked = 0
    for i, (thing, said) in enumerate(THINGS.items()):
        for action, (_, question) in list(ACTIONS.items())[i % 2 :: 2]:
            call = pipeline.call(question.format(said), Account("t"))
            answer = await pipeline(replace(call, tools=tuple(tools)))
            made, receipt = engine.calls[-1], answer.receipts[0]
            found += f"{action}_{thing}" in [tool_name(t) for t in made.tools]
            asked += 1
            sent = len(json.dumps(made.tools)) + sum(len(text_of(m)) for m in made.messages)
            assert sent < 0.2 * len(json.dumps(tools)) and receipt.after < 0.2 * receipt.before
    assert asked == 100 and found / asked > 0.9, f"{found} of {asked}"
