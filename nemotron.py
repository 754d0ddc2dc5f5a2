#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The nemotron.py authors
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Talk to Nemotron-4-340B-Instruct, or any OpenAI-compatible chat endpoint.

One file, standard library only.  A reply is complete, or it is an error.

    $ python3 nemotron.py 'Name two techniques to cook lamb.'
    >>> nemotron.chat("Name two techniques to cook lamb.").text

Nothing above the section "Client" does any I/O.
"""

from __future__ import annotations

import collections
import contextlib
import email.utils
import errno
import http.client
import itertools
import json
import math
import operator
import os
import random
import re
import reprlib
import socket
import sys
import threading
import time
import urllib.request

TYPE_CHECKING = False  # importing typing takes 2 ms, and only type checkers need it
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from typing import Any, TypedDict, TypeVar

    from typing_extensions import Unpack

    JSON = dict[str, Any]
    Messages = str | Sequence[JSON]
    T = TypeVar("T")

    class Params(TypedDict, total=False):
        model: str | None
        system: str | None
        extra: JSON | None
        temperature: float | None
        top_p: float | None
        min_p: float | None
        top_k: int | None
        max_tokens: int | None
        presence_penalty: float | None
        frequency_penalty: float | None
        repetition_penalty: float | None
        tool_choice: str | None
        user: str | None
        seed: int | None
        stop: str | list[str] | None
        n: int | None
        tools: list[JSON] | None
        response_format: JSON | None


__version__ = "2.0.0"
__all__ = ["MODEL", "BASE_URL", "chat", "stream", "batch", "build_request", "Client"]
__all__ += ["Completion", "Chunk", "Stream", "offline", "main", "NemotronError"]
__all__ += ["InvalidRequestError", "APIConnectionError", "APITimeoutError"]
__all__ += ["APIStatusError", "AuthenticationError", "RateLimitError", "ReplyError"]
__all__ += ["IncompleteReplyError"]

MODEL = "nvidia/Nemotron-4-340B-Instruct"
BASE_URL = "https://api.deepinfra.com/v1/openai"
MAX_BYTES = 64 << 20  # of a reply, or of one server-sent event
MAX_MESSAGE = 280  # characters of an error message
MAX_DELAY = 120.0  # seconds; a server that asks for a longer wait is not asked again
GRACE = 5.0  # seconds to go on reading after the end of a streamed reply

# ---------------------------------------------------------------------------- Errors

CONTROLS = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def escape_controls(text: str) -> str:
    r"""Show control characters and direction overrides as escapes like \x1b."""
    return CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """Return the text as one line, safe to print, of at most MAX_MESSAGE characters."""
    line = escape_controls(" ".join(text[: 4 * MAX_MESSAGE].split()))
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."


def describe(error: BaseException) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "the reply was cut short"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def show(value: object) -> str:
    """Return a short repr() of a value, or the name of its type if it has none."""
    try:
        return reprlib.repr(value)
    except Exception:  # such as an integer of over 4,300 digits
        return type(value).__name__


class NemotronError(Exception):
    """Base class of the errors; str() of one is a single line."""

    code = "error"  # in the rows of a batch
    exit_status = 1  # of the command line
    retryable = False  # whether the same request may succeed later
    status_code: int | None = None
    body: Any = None  # of the response: JSON, or text
    request_id: str | None = None
    retry_after: float | None = None  # seconds

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))

    def __init_subclass__(cls, code: str = "error", exit_status: int = 1) -> None:
        cls.code, cls.exit_status = code, exit_status


class InvalidRequestError(
    NemotronError, ValueError, code="invalid_request", exit_status=2
):
    """The caller's mistake; nothing was sent."""


class APIConnectionError(NemotronError, code="connection"):
    """There is no usable connection to the server."""


class APITimeoutError(APIConnectionError, TimeoutError, code="timeout"):
    """`timeout` or `deadline` has passed (in a stream: before its status 200)."""


class APIStatusError(NemotronError, code="api_status"):
    """The server answered with a status other than 200."""


class AuthenticationError(APIStatusError, code="authentication", exit_status=4):
    """Status 401, 402 or 403; or no usable token, and status_code is None."""


class RateLimitError(APIStatusError, code="rate_limit", exit_status=5):
    """Status 429 or 503: the server is busy."""


class ReplyError(NemotronError, code="reply"):
    """Status 200, but not an answer; partial is the Completion received so far."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.partial = Completion()


class IncompleteReplyError(ReplyError, code="incomplete_reply", exit_status=3):
    """The stream stopped before the reply ended; partial is what was received."""


# ------------------------------------------------------------------------ Parameters


def is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


KINDS: dict[str, Callable[[Any], bool]] = {
    "a number": is_number,
    "an integer": lambda value: is_number(value) and isinstance(value, int),
    "a string": lambda value: isinstance(value, str),
    "none or auto": lambda value: value in ("none", "auto"),
    "a string or a list of 1 to 16": lambda value: (
        isinstance(value, str) or is_list_of(str, value) and 1 <= len(value) <= 16
    ),
    "a list of objects": lambda value: is_list_of(dict, value),
    "an object": lambda value: isinstance(value, dict),
    "an object without messages, model and stream": lambda value: (
        isinstance(value, dict) and not {"messages", "model", "stream"} & set(value)
    ),
}


def read_table(text: str) -> list[list[str]]:
    """Return the rows of a table, one a line, whose cells are separated by "|"."""
    return [[cell.strip() for cell in row.split("|")] for row in text.splitlines()]


# Names, ranges and the server's defaults are those of the provider's page of the model,
# which prints the bound of seed, 2**63, as JavaScript does.  stop, n, tools and
# response_format are in its OpenAPI file only.
# name | kind | limits | server's default | help
PARAMETERS = read_table("""\
temperature        | a number   | 0 <= x <= 2       | 1 | lower is more focused
top_p              | a number   | 0 < x <= 1        | 1 | probability to sample from
min_p              | a number   | 0 <= x <= 1       | 0 | relative to the likeliest
top_k              | an integer | 0 <= x < 1000     | 0 | how many to choose from
max_tokens         | an integer | 0 <= x <= 1000000 |   | most tokens to generate
presence_penalty   | a number   | -2 <= x <= 2      | 0 | above 0: more new topics
frequency_penalty  | a number   | -2 <= x <= 2      | 0 | above 0: less repetition
repetition_penalty | a number   | 0.01 <= x <= 5    | 1 | above 1: less repetition
tool_choice        | none or auto |                 |   | whether it may call a tool
user               | a string   |                   |   | hashed ID of your end user
seed               | an integer | 0 <= x < 9223372036854775808 |  | to repeat a reply
stop               | a string or a list of 1 to 16 | | | end the reply before this text
n                  | an integer | 1 <= x <= 4       | 1 | number of replies
tools              | a list of objects |            |   | functions that it may call
response_format    | an object  | | | such as {"type": "json_object"}""")
# Names that are no parameters of a request; the last column says what they are.
OTHER_NAMES = read_table("""\
model    | a string   |                  | | belongs to chat() or Client()
system   | a string   |                  | | belongs to chat()
extra    | an object without messages, model and stream | | | belongs to chat()
base_url | a string   |                  | | belongs to Client()
token    | a string   |                  | | belongs to Client()
timeout  | a number   | 0 < x <= 1000000 | | belongs to Client()
deadline | a number   | 0 < x <= 1000000 | | belongs to Client()
retries  | an integer | 0 <= x <= 1000   | | belongs to Client()
jobs     | an integer | 1 <= x <= 200    | | belongs to batch()
output   | a string   |                  | | belongs to batch()
stream   |            |                  | | is chosen by calling stream()
max_cost | a number   | 0 <= x <= 1000000 | | belongs to the command line""")
SPECS = {row[0]: row for row in PARAMETERS + OTHER_NAMES}
PARAMETER_NAMES = [row[0] for row in PARAMETERS]
REQUEST_NAMES = [*PARAMETER_NAMES, "model", "system", "extra"]


def check_value(name: str, value: Any) -> None:
    """Raise InvalidRequestError unless a value fits its row of the tables."""
    _, kind, limits, _, _ = SPECS[name]
    valid = KINDS[kind](value)
    if valid and limits:
        low, low_sign, _, high_sign, high = limits.split()
        less = {"<": operator.lt, "<=": operator.le}
        above = less[low_sign](float(low), value)
        valid = above and less[high_sign](value, float(high))
    if not valid:
        expected, got = f"{kind}, {limits}".rstrip(", "), show(value)
        raise InvalidRequestError(f"{name} must be {expected}; got {got}")


def check_parameters(values: Any) -> JSON:
    """Return the values that are not None.  Raises InvalidRequestError."""
    for name, value in values.items():
        if name not in REQUEST_NAMES:
            import difflib

            nearest = difflib.get_close_matches(name, REQUEST_NAMES, 1, 0.0)[0]
            advice = f"did you mean {nearest}? (undocumented fields go into extra)"
            if name in SPECS:
                advice = f"it {SPECS[name][-1]}"
            raise InvalidRequestError(
                f"{name:.80} is not a request parameter: {advice}"
            )
        if value is not None:
            check_value(name, value)
    return {name: value for name, value in values.items() if value is not None}


# --------------------------------------------------------------------------- Request


def dig(default: T, value: Any, *path: Any) -> T:
    """Return value[path[0]]..., or default if it is missing or of another type."""
    try:
        for key in path:
            value = value[key]
    except (LookupError, TypeError):
        return default
    return value if default is None or isinstance(value, type(default)) else default


def read_json(text: str) -> Any:
    """Return the value of a JSON text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def to_json(value: object) -> str:
    """Return the value as JSON on one line, in ASCII.  Raises InvalidRequestError."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"not JSON: {error}") from None


def check_messages(messages: Any) -> list[JSON]:
    """Return copies of the messages.  Raises InvalidRequestError, which names one."""
    if not isinstance(messages, (list, tuple)):
        got = show(messages)
        raise InvalidRequestError(f"messages must be a string or a list; got {got}")
    systems = 0
    for index, message in enumerate(messages):
        role, content = dig("", message, "role"), dig(None, message, "content")
        systems += role == "system"
        if role not in ("system", "user", "assistant", "tool"):
            problem = "role must be system, user, assistant or tool"
        elif systems > 1:
            problem = "a second system message"
        elif role == "tool" and not isinstance(message.get("tool_call_id"), str):
            problem = "a tool message must have a tool_call_id"
        elif content is None and role == "assistant" and message.get("tool_calls"):
            problem = ""
        else:
            valid = isinstance(content, str) or content and is_list_of(dict, content)
            problem = "" if valid else "content must be a string or a list of objects"
        if problem:
            got = show(message)
            raise InvalidRequestError(f"messages[{index}]: {problem}; got {got}")
    return [dict(message) for message in messages]


def last_turn(messages: list[JSON]) -> tuple[int, str]:
    """Return the index and role of the last message, system messages left out."""
    turns = [(i, m["role"]) for i, m in enumerate(messages) if m["role"] != "system"]
    return turns[-1] if turns else (-1, "")


def build_request(
    messages: Messages,
    *,
    model: str | None = MODEL,
    stream: bool = False,
    system: str | None = None,
    extra: JSON | None = None,
    **params: Any,
) -> JSON:
    """Return the JSON body of a request; what is not given is not in it.

    messages  a string, which is one user message, or a list of message objects
    system    the text of a system message to put in front of them
    params    the names in PARAMETERS, with the ranges given there
    extra     other fields, which go into the body last and are not checked

    Raises InvalidRequestError.
    """
    params.update(model=model, system=system, extra=extra)
    given = check_parameters(params)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    checked = check_messages(messages)
    last, role = last_turn(checked)
    if role not in ("user", "tool"):
        problem = "the last message must be a user's or a tool's"
        raise InvalidRequestError(f"messages[{max(last, 0)}]: {problem}")
    if given.pop("system", None) is not None:
        checked = check_messages([{"role": "system", "content": system}, *checked])
    body = {"model": given.pop("model", MODEL), "messages": checked}
    if stream:
        body["stream"] = True
    fields = given.pop("extra", {})
    return {**body, **given, **fields}


# ----------------------------------------------------------------------------- Reply

STOP_TOKEN = "</s>"  # the model's own; the provider sends it as the last piece of text
INCOMPLETE = ("length", "content_filter", "abort", "error")  # values of finish_reason
RUNNING_TEXT = ("content", "reasoning_content", "reasoning", "refusal", "arguments")
MAX_DEPTH = 100  # levels of nesting in a chunk
raw_decode = json.JSONDecoder().raw_decode  # faster than json.loads()
# The keys of a chunk that only brings text.
PLAIN_CHOICE, PLAIN_MESSAGE = {"index", "delta", "finish_reason"}, {"role", "content"}
# What code that expects a chunk raises for JSON of another shape
SHAPE_ERRORS = (AttributeError, LookupError, TypeError, ValueError, RecursionError)


class Reply(dict[str, "Any"]):
    """The server's JSON, untouched.  The properties describe choice 0; none raises."""

    def _dig(self, default: T, *path: Any) -> T:
        choices: list[Any] = dig([], self, "choices")
        first = next((c for c in choices if dig(0, c, "index") == 0), None)
        return dig(default, first, *path)

    @property
    def text(self) -> str:
        """The text; "" if there is none."""
        return self._dig("", "message", "content") or self._dig("", "delta", "content")

    @property
    def finish_reason(self) -> str | None:
        """Such as "stop", "length" or "tool_calls"; None if not finished."""
        return self._dig("", "finish_reason") or None

    @property
    def usage(self) -> JSON:
        """prompt_tokens, completion_tokens, total_tokens ...; {} if there is none."""
        return dig({}, self, "usage")


class Chunk(Reply):
    """One `chat.completion.chunk` of a stream."""


class Completion(Reply):
    """A whole reply, a `chat.completion`."""

    @property
    def tool_calls(self) -> list[JSON]:
        """The tool calls; [] if there are none."""
        calls: list[JSON] = self._dig([], "message", "tool_calls")
        return calls if is_list_of(dict, calls) else []

    @property
    def message(self) -> JSON:
        """The reply as an assistant message, for the messages of the next request."""
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **calls}

    @property
    def cost(self) -> float | None:
        """US dollars: `usage.estimated_cost`, else `usage.cost`; None if unknown."""
        costs: list[Any] = [self.usage.get(name) for name in ("estimated_cost", "cost")]
        return next((c for c in costs if is_number(c) and abs(c) < 1e9), None)


def server_message(answer: Any) -> str:
    """Return what the server says went wrong, in its own words; "" if nothing."""
    while isinstance(answer, dict):
        values = map(answer.get, ("error", "detail", "error_message", "message"))
        answer = next((v for v in values if v and isinstance(v, (str, dict, list))), "")
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return "" if text.lstrip().startswith("<") else text  # a page of HTML


def find_failure(answer: Any) -> str:
    """Return the server's message if a reply or chunk is an error; "" if it is not."""
    choices = answer.get("choices") or ()
    for part in (answer, *choices):
        if part.get("error"):
            return server_message(part) or json.dumps(part["error"])
    return "" if choices else server_message(answer)


class MergedList(dict):  # type: ignore[type-arg]
    """The items of a list while it is merged, by index or a key of their own."""


def merge(target: Any, source: JSON, depth: int = 0) -> None:
    """Merge a part of a reply into what came before it, by rules, not field by field.

    Running text is a bytearray meanwhile; a list of pieces is ten times as large.
    """
    if depth > MAX_DEPTH:
        raise RecursionError
    for key, value in source.items():
        old = target.get(key)
        if isinstance(old, bytearray) and isinstance(value, (dict, list)):
            raise TypeError("text has become something else")
        if isinstance(value, dict):
            if type(old) is not dict:
                old = target[key] = {}
            merge(old, value, depth + 1)
        elif isinstance(value, list):
            if not isinstance(old, MergedList):
                old = target[key] = MergedList()
            for item in value:
                if dig(None, item, "index") is None:
                    old[object()] = item
                else:
                    rest = {k: v for k, v in item.items() if k != "index"}
                    merge(old.setdefault(item["index"], {}), rest, depth + 1)
        elif key in RUNNING_TEXT and value is not None:
            if not isinstance(old, bytearray):
                old = target[key] = bytearray()
            old += value.encode("utf-8", "surrogatepass")
        elif key not in target or value not in (None, ""):
            target[key] = value


def unmerge(value: Any) -> Any:
    """Return what was merged, in plain lists, strings and objects."""
    if isinstance(value, bytearray):
        return value.decode("utf-8", "surrogatepass")
    if isinstance(value, MergedList):
        # Items without an index came as they are.
        return [i if type(key) is object else unmerge(i) for key, i in value.items()]
    if isinstance(value, dict):
        return {key: unmerge(item) for key, item in value.items()}
    return value


class ChunkMerger:
    """Merges the chunks of a stream into one Completion."""

    def __init__(self) -> None:
        self.choices: dict[Any, JSON] = {}  # by index
        self.is_finished = False  # whether every choice that came has a finish_reason
        self._finished: set[Any] = set()  # the indexes of those that have one
        self._stop_tokens: dict[Any, str] = {}  # by index; it is text if more follows
        self._texts: dict[Any, bytearray | None] = {}  # the content of each choice
        self._head: JSON = {}  # all of the reply but its choices
        self._last_head: JSON = {}  # of the last chunk; most of it stays the same

    def add(self, chunk: JSON) -> str:
        """Merge a chunk, and return the text that it adds to choice 0.

        The choices are final once all are finished.  Raises SHAPE_ERRORS.
        """
        head, new_text = {**chunk, "choices": None}, ""
        if head != self._last_head:
            merge(self._head, head)
            self._last_head = head
        if not self.is_finished:
            for position, choice in enumerate(chunk.get("choices") or ()):
                index = choice.get("index")
                new_text += self._add_choice(
                    choice, position if index is None else index
                )
            self.is_finished = 0 < len(self.choices) == len(self._finished)
        return new_text

    def add_text(self, chunk: JSON) -> str | None:
        """Do the same, in half the time, for a chunk that only brings more text.

        Return None, and do nothing, for any other chunk.
        """
        choices: list[Any] = chunk.get("choices") or []
        if len(choices) != 1 or {**chunk, "choices": None} != self._last_head:
            return None
        choice = choices[0]
        if choice.keys() != PLAIN_CHOICE or choice["finish_reason"] or self.is_finished:
            return None
        message, content = choice["delta"] or {}, self._texts.get(choice["index"])
        if content is None or message.keys() - PLAIN_MESSAGE or self._stop_tokens:
            return None
        text: str = message.get("content") or ""
        if text == STOP_TOKEN:
            return None
        content += text.encode("utf-8", "surrogatepass")
        return text if choice["index"] == 0 else ""

    def _add_choice(self, choice: JSON, index: Any) -> str:
        """Merge one choice of a chunk, and return the text that it adds to choice 0."""
        if not isinstance(index, int):
            raise TypeError
        message = choice.get("delta") or choice.get("message") or {}
        text: str = message.get("content") or ""
        if text:
            before = self._stop_tokens.pop(index, "")
            if text == STOP_TOKEN:
                self._stop_tokens[index], text = text, ""
            text = before + text
            message = {**message, "content": text}
        whole = self.choices.setdefault(index, {"index": index, "message": {}})
        rest = {k: v for k, v in choice.items() if k not in ("delta", "message")}
        merge(whole, {**rest, "index": index, "message": message})
        found = whole["message"].get("content")
        self._texts[index] = found if isinstance(found, bytearray) else None
        if choice.get("finish_reason"):
            self._finished.add(index)
        return text if index == 0 else ""

    def completion(self) -> Completion:
        """Return what was merged so far."""
        choices = []
        for choice in map(unmerge, self.choices.values()):
            content = None if choice["message"].get("tool_calls") else ""
            message = {"role": "assistant", "content": content, **choice["message"]}
            choices.append({**choice, "message": message})
        head = {**unmerge(self._head), "object": "chat.completion"}
        return Completion({**head, "choices": choices})


# ---------------------------------------------------------------- Server-sent events
#
# https://html.spec.whatwg.org/multipage/server-sent-events.html


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a body; these end with LF, CRLF or CR."""
    unfinished: list[bytes] = []  # the pieces of a line whose end has not come
    after_cr = False
    for piece in pieces:
        if after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
        after_cr = piece.endswith(b"\r")
        lines = piece.splitlines()
        rest = lines.pop() if lines and not piece.endswith((b"\n", b"\r")) else b""
        if lines and unfinished:
            lines[0] = b"".join([*unfinished, lines[0]])
            unfinished = []
        yield from lines
        if rest:
            unfinished.append(rest)
    if unfinished:
        yield b"".join(unfinished)


def split_events(lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (event, data) for each event; a complete one may end with the body."""
    name, data = "", []
    first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")
    for line in itertools.chain([first], lines):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.decode("utf-8", "replace").strip()
        elif not line and data:
            yield name, b"\n".join(data).decode("utf-8", "replace").strip()
            name, data = "", []
        elif not line:
            name = ""
    rest = b"\n".join(data).decode("utf-8", "replace").strip()
    if name == "error" or rest == "[DONE]" or read_json(rest) is not rest:  # or torn
        yield name, rest


# ---------------------------------------------------------------------------- Client
#
# urllib follows redirects, sending Authorization along, and opens file://: this opener
# does neither.  Its timeout is for each socket operation: a deadline needs a clock.

OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
LOOPBACK = rf"(?P<loopback>localhost|127(?:\.{OCTET}){{3}}|\[::1\])"
HOST = rf"(?P<host>{LOOPBACK}|[\w.-]+|\[[0-9a-f:.]+\])"
PATH = r"(?:/[\w./~%+:@!$&'()*,;=-]*)?"
URL = rf"(?ai)(?P<scheme>https?)://{HOST}(?::(?P<port>\d{{1,5}}))?{PATH}"
JSON_PADDING = b"\xef\xbb\xbf \t\r\n"  # a BOM and white space may come before JSON
TOKEN_NAMES = ("DEEPINFRA_TOKEN", "DEEPINFRA_API_KEY", "DEEPINFRA_API_TOKEN")
HTTPException = http.client.HTTPException
FAILURES = (OSError, ValueError, OverflowError, ImportError, MemoryError, HTTPException)
RETRY_STATUSES = (408, 409, 429, 500, 502, 503, 504)
STATUSES: dict[int, tuple[type[APIStatusError], str]] = {
    401: (AuthenticationError, "the token was refused, check DEEPINFRA_TOKEN"),
    402: (AuthenticationError, "the account cannot pay, check its billing"),
    403: (AuthenticationError, "the token was refused, check DEEPINFRA_TOKEN"),
    404: (APIStatusError, "check the model and the base URL"),
    429: (RateLimitError, "busy, try later or with fewer requests at once"),
    503: (RateLimitError, "busy, try later"),
}
OVERRUN = r"(?i)context.(length|window)|input.length|maximum.{1,40}token|too long"
OVERRUN_ADVICE = "over the model's context (Nemotron-4-340B: 4,096 tokens), "
OVERRUN_ADVICE += "shorten the messages or begin a new conversation"


def log_warning(message: str) -> None:
    import logging  # it takes 4 ms, and most runs do not need it

    logging.getLogger("nemotron").warning("nemotron: %s", one_line(message))


class TimedSocket:
    """A socket that asks before every read for how long it may wait."""

    def __init__(self, sock: Any, timeout: Callable[[], float]) -> None:
        self._sock, self._timeout = sock, timeout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recv_into(self, buffer: Any) -> int:
        self._sock.settimeout(self._timeout())
        return int(self._sock.recv_into(buffer))


class Exchange:
    """One call: it owns the deadline, the attempts, and what exceptions become."""

    def __init__(self, client: Client, body: JSON, default_retries: int = 2) -> None:
        self.client, self.request_id = client, None
        self.redacted: Any = None  # the reply without the token, for a row
        self.received = 0  # bytes of the body, or since the last event
        self.deadline = client._clock() + (client.deadline or math.inf)
        default = default_retries
        self._retries = default if client.retries is None else client.retries
        self._retried = 0
        self._payload = to_json(body).encode("ascii")

    def send(self, read: Callable[[http.client.HTTPResponse], T]) -> T:
        """Send the request and return read(response); again if the error allows it."""
        delay = 0.0
        while True:
            self._wait(delay)
            response: Any = None
            try:
                response = self.client._open(self._payload, self._read_timeout())
                self._check_status(response)
                return read(response)
            except (NemotronError, *FAILURES) as cause:
                cause.args = self.client._redact(cause.args)
                is_own = isinstance(cause, NemotronError)
                error: Any = cause if is_own else self._connection_error(cause)
                if response is not None:
                    response.close()
                    error.status_code = response.status
                    error.request_id = self.request_id
                delay = self._delay_after(error)

    def _delay_after(self, error: NemotronError) -> float:
        """Return the seconds to wait before the next attempt, or raise the error."""
        if not error.retryable or self._retried >= self._retries:
            raise error
        delay = error.retry_after
        if delay is None:
            delay = min(0.5 * 2**self._retried, 8) * random.uniform(0.75, 1)
        if delay > MAX_DELAY or self.client._clock() + delay >= self.deadline:
            raise error
        self._retried += 1
        attempt = f"retry {self._retried} of {self._retries} in {delay:.1f} s"
        log_warning(f"{attempt}: {error}")
        return delay

    def _wait(self, seconds: float) -> None:
        if seconds:
            self.client._sleep(seconds)

    def _read_timeout(self) -> float:
        """Return the seconds that the server may be silent now; raise TimeoutError."""
        left = self.deadline - self.client._clock()
        if left <= 0:
            raise TimeoutError(f"the deadline of {self.client.deadline} s has passed")
        return min(self.client.timeout, left)

    def pieces(self, response: Any) -> Iterator[bytes]:
        """Yield the body as it arrives.  Raises FAILURES."""
        while response.fp:
            if self.deadline < math.inf:
                # The one way to bound a read of a body through urllib, in any Python.
                raw = response.fp.raw
                if not isinstance(raw._sock, TimedSocket):
                    raw._sock = TimedSocket(raw._sock, self._read_timeout)
            piece = response.read1(65536)
            self.received += len(piece)
            if self.received > MAX_BYTES:
                raise ReplyError(
                    f"the reply, or an event, is over {MAX_BYTES >> 20} MiB"
                )
            if not piece:
                break
            yield piece
        if response.length:  # read1 does not complain when the body is too short
            raise http.client.IncompleteRead(b"", response.length)

    def read_text(self, response: Any) -> str:
        return b"".join(self.pieces(response)).decode("utf-8-sig", "replace")

    def _check_status(self, response: http.client.HTTPResponse) -> None:
        """Raise an error for a status other than 200, or a body that is compressed."""
        redact, headers, status = self.client._redact, response.headers, response.status
        self.request_id = redact(headers.get("x-request-id"))
        encoding = redact(headers.get("Content-Encoding", "identity")).lower()
        if status == 200 and encoding != "identity":
            raise ReplyError(f"the reply is compressed ({encoding}), unasked")
        if status == 200:
            return
        body: Any = None
        with contextlib.suppress(ReplyError, RecursionError, *FAILURES):
            text = redact(self.read_text(response))
            body = redact(read_json(text)) if encoding == "identity" else None
        message = server_message(body or "") or redact(response.reason)
        kind, advice = STATUSES.get(status, (APIStatusError, ""))
        if status in (400, 413, 422, 500) and re.search(OVERRUN, message[:2000]):
            advice = OVERRUN_ADVICE
        elif 300 <= status < 400:
            advice = "redirects are not followed, check the base URL"
        parts = (f"HTTP {status} from {self.client._url}", advice, message)
        error = kind(": ".join(filter(None, parts)))
        error.retryable = status in RETRY_STATUSES and advice != OVERRUN_ADVICE
        error.body = body
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            value = headers.get("Retry-After", "")
            date = email.utils.parsedate_tz(value)
            wait = email.utils.mktime_tz(date) - time.time() if date else float(value)
            error.retry_after = max(0.0, wait) if wait == wait else None  # not a NaN
        raise error

    def _connection_error(self, cause: Exception) -> APIConnectionError:
        """Return the error for an exception of urllib, http.client or a socket."""
        reason = getattr(cause, "reason", None)
        cause = reason if isinstance(reason, Exception) else cause  # of a URLError
        is_certificate = hasattr(cause, "verify_code")
        advice = " (SSL_CERT_FILE can name your authority)" if is_certificate else ""
        if isinstance(cause, ImportError):
            advice = " (https:// needs a Python with the ssl module)"
        kind, problem = APIConnectionError, "no usable connection to"
        if isinstance(cause, (TimeoutError, socket.timeout)):  # two classes until 3.10
            kind, problem = APITimeoutError, "no complete answer in time from"
        error = kind(f"{problem} {self.client._address}: {describe(cause)}{advice}")
        is_host = isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN
        is_network = isinstance(cause, (OSError, HTTPException))
        error.retryable = is_network and not is_host and not is_certificate
        error.__cause__ = cause
        return error

    def read_completion(self, response: http.client.HTTPResponse) -> Completion:
        """Read the reply of a blocking call.  Raises ReplyError if it is not one."""
        with response:
            text = self.read_text(response)
        if not text.strip():
            raise http.client.IncompleteRead(b"")
        reply, self.redacted = read_json(text), None
        try:
            self.redacted = self.client._redact(reply)
            ChunkMerger().add(reply)  # which finds odd shapes
            problem = find_failure(reply)
            if not problem and all(c["message"] for c in reply["choices"] or [{}]):
                return Completion(reply)
        except SHAPE_ERRORS:
            problem = server_message(reply)
        problem = self.client._redact(problem or "not a chat completion")
        error = ReplyError(f"the server did not send a reply: {problem}")
        error.body = self.redacted
        raise error


class Client:
    """The settings of calls.  Creating one does no I/O; threads may share it.

    token     None: DEEPINFRA_TOKEN, DEEPINFRA_API_KEY or DEEPINFRA_API_TOKEN of the
              environment; a loopback host needs none
    base_url  None: DEEPINFRA_BASE_URL of the environment, else BASE_URL
    model     None: NEMOTRON_MODEL of the environment, else MODEL
    timeout   seconds of silence on the connection
    deadline  seconds for a whole call, with its retries and waits; None: no limit
    retries   how often to send again what may succeed later; None: 2, in a batch 6
    """

    _clock = staticmethod(time.monotonic)
    _sleep = staticmethod(time.sleep)

    def __init__(
        self,
        *,
        token: str | None = None,
        base_url: str | None = None,
        model: str | None = None,
        timeout: float | None = 600.0,
        deadline: float | None = None,
        retries: int | None = None,
    ) -> None:
        environ = os.environ
        if token is None:
            token = next(filter(str.strip, map(environ.get, TOKEN_NAMES, [""] * 3)), "")
        if not isinstance(token, str):
            raise InvalidRequestError("token must be a string")  # and is not shown
        self.base_url = base_url or environ.get("DEEPINFRA_BASE_URL") or BASE_URL
        self.model = model or environ.get("NEMOTRON_MODEL") or MODEL
        self.timeout = 600.0 if timeout is None else timeout
        self.deadline, self.retries = deadline, retries
        for name, value in vars(self).items():
            if value is not None:
                check_value(name, value)
        match: Any = re.fullmatch(URL, self.base_url)
        scheme = match and match["scheme"].lower()
        if not match or not (scheme == "https" or match["loopback"]):
            form = "https://host[:port][/path], or http:// and a loopback host"
            raise InvalidRequestError(f"the base URL must be {form}, no user, no query")
        port = int(match["port"] or {"https": 443, "http": 80}[scheme])
        if not 0 < port < 65536:
            raise InvalidRequestError("the port of the base URL must be 1 to 65535")
        self._token, self._is_loopback = token.strip(), bool(match["loopback"])
        escaped = json.dumps(self._token)[1:-1]
        unicode = "".join(f"\\u{ord(character):04x}" for character in self._token)
        forms = [self._token, escaped, escaped.replace("/", "\\/"), unicode]
        self._token_forms = forms if len(self._token) >= 8 else []  # else it is a word
        self._address = f"{match['host']}:{port}"
        self._url = self.base_url.rstrip("/") + "/chat/completions"
        self._opener: urllib.request.OpenerDirector | None = None
        self._lock = threading.Lock()  # so that there is one opener

    def __repr__(self) -> str:
        shown = [f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_")]
        return f"Client({', '.join(shown)})"

    def chat(self, messages: Messages, **params: Unpack[Params]) -> Completion:
        """Send the messages, and return the whole reply.  Raises NemotronError."""
        exchange = Exchange(self, self._body(messages, params))
        return exchange.send(exchange.read_completion)

    def stream(self, messages: Messages, **params: Unpack[Params]) -> Stream:
        """Send the messages; return the reply as it arrives.  Raises NemotronError."""
        body = {**self._body(messages, params), "stream": True}
        if body.get("n", 1) != 1:
            raise InvalidRequestError("n over 1 is not for streams: wait for the reply")
        exchange = Exchange(self, body)
        return exchange.send(lambda response: Stream(exchange, response))

    def batch(
        self,
        requests: Iterable[Any],
        jobs: int = 8,
        *,
        output: str | None = None,
        **params: Unpack[Params],
    ) -> Iterator[JSON]:
        """Send many requests, at most `jobs` (1 to 200) at a time; yield their rows.

        requests  an iterable, read as rows are taken, of strings, of bodies, of objects
                  with a prompt (and system, temperature ...), or of batch file lines
        output    a file to append the rows to; a request that has a row there, without
                  an error, is not sent again, and its row is not yielded
        params    defaults for every request, those of build_request()

        A row is {"id", "custom_id", "request", "response", "error"}, and comes when
        complete.  Raises AuthenticationError for a token that is refused, and
        NemotronError if `output` cannot be written; all other errors are in the rows.
        """
        return Batch(self, requests, jobs, output, params).rows(enumerate(requests, 1))

    def _body(self, messages: Messages, params: Any) -> JSON:
        given = {"model": self.model, **check_parameters(params)}
        return build_request(messages, **given)

    def _headers(self) -> dict[str, str]:
        """Return the headers of a request.  Raises AuthenticationError."""
        if not (self._token.isascii() and self._token.isprintable()):
            raise AuthenticationError("the token is not printable ASCII, copy it again")
        if not self._token and not self._is_loopback:
            raise AuthenticationError("no token: set DEEPINFRA_TOKEN, or try --offline")
        headers = {"Content-Type": "application/json", "User-Agent": "nemotron.py"}
        bearer = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return {**headers, **bearer}

    def _redact(self, value: Any) -> Any:
        """Return JSON without the token, if that has 8 characters or more."""
        if isinstance(value, dict):
            return {self._redact(k): self._redact(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self._redact(item) for item in value])
        if isinstance(value, str):
            for form in self._token_forms:
                value = value.replace(form, "[token]")
        return value

    def _open(self, payload: bytes, timeout: float) -> Any:
        """Send a request; follow no redirect, and open no file."""
        request = urllib.request.Request(self._url, payload)
        for name, value in self._headers().items():
            request.add_unredirected_header(name, value)
        with self._lock:
            if self._opener is None:
                opener = urllib.request.OpenerDirector()
                opener.add_handler(urllib.request.HTTPHandler())
                if not self._is_loopback:
                    opener.add_handler(urllib.request.ProxyHandler())
                if request.type == "https":
                    import ssl

                    context = ssl.create_default_context()
                    context.set_alpn_protocols(["http/1.1"])
                    opener.add_handler(urllib.request.HTTPSHandler(context=context))
                self._opener = opener
        return self._opener.open(request, timeout=timeout)


class Stream:
    """A reply as it arrives: iterating yields the text of choice 0, piece by piece.

    Raises IncompleteReplyError if the reply stops before its end, and ReplyError if the
    server sends something else; every later read then raises the same error.  Use
    `with`, or close(), to close the connection early.
    """

    def __init__(self, exchange: Exchange, response: http.client.HTTPResponse) -> None:
        self._exchange, self._response = exchange, response
        self._merger, self._reader = ChunkMerger(), self._read()
        self._is_complete = False
        self._error: ReplyError | None = None  # what every later read raises

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; nothing more is read."""
        self._reader.close()
        self._response.close()

    def __iter__(self) -> Iterator[str]:
        for _, text in self._reader:
            if text:
                yield text
        if self._error:
            raise self._error

    def __next__(self) -> str:
        return next(iter(self))

    def chunks(self) -> Iterator[Chunk]:
        """Yield every Chunk that is left, instead of the text."""
        for chunk, _ in self._reader:
            yield Chunk(chunk)
        if self._error:
            raise self._error

    def completion(self) -> Completion:
        """Read the rest, and return the whole reply, with what was read before."""
        collections.deque(self.chunks(), maxlen=0)
        if not (self._is_complete or self._merger.is_finished):
            raise self._keep_error(ConnectionError("the stream was closed"))
        return self._merger.completion()

    def _read(self) -> Generator[tuple[JSON, str], None, None]:
        """Yield each chunk and the text that it adds; all reading goes through here."""
        exchange, merger, done = self._exchange, self._merger, False
        problem: Exception = ConnectionError("the connection was closed")
        try:
            for name, data in self._events():
                exchange.received = 0
                if not data.startswith("{"):
                    if data == "[DONE]":
                        done = True
                        problem = ReplyError("the stream ended without a reply")
                        break
                    if data in ("", "null") or data.startswith(":"):
                        continue  # it keeps the connection alive
                yield self._merge_event(name, data)
                if merger.is_finished:  # the first time sets the end
                    end = exchange.client._clock() + GRACE
                    exchange.deadline = min(exchange.deadline, end)
        except (ReplyError, *FAILURES) as error:
            problem = error
        finally:
            self._response.close()
        self._is_complete = merger.is_finished or done and bool(merger.choices)
        if not self._is_complete:
            raise self._keep_error(problem)

    def _events(self) -> Iterator[tuple[str, str]]:
        """Yield the events of the body; it may also be one JSON reply, or HTML."""
        pieces, head = self._exchange.pieces(self._response), b""
        for piece in pieces:
            head += piece
            if head.strip(JSON_PADDING) or len(head) > 1000:
                break
        pieces = itertools.chain([head], pieces)
        start = head.lstrip(JSON_PADDING)[:1]
        is_json = self._response.headers.get_content_type() == "application/json"
        if not is_json and start not in (b"{", b"<"):
            return split_events(split_lines(pieces))
        text = b"".join(pieces).decode("utf-8-sig", "replace").strip()
        return iter([("", text), ("", "[DONE]")])

    def _merge_event(self, name: str, data: str) -> tuple[JSON, str]:
        """Merge the chunk of an event.  Raises ReplyError for anything else."""
        try:
            if name == "error":
                data = json.dumps({"error": read_json(data)})
            chunk, end = raw_decode(data)
            if end < len(data):
                raise ValueError
            text = self._merger.add_text(chunk)
            if text is not None:
                return chunk, text
            problem = find_failure(chunk)
            if not problem:
                return chunk, self._merger.add(chunk)
            message = f"the server failed: {problem}"
        except SHAPE_ERRORS:
            message = f"the server sent an odd chunk: {server_message(data) or 'HTML'}"
        raise ReplyError(self._exchange.client._redact(message))

    def _keep_error(self, problem: Exception) -> Any:
        """Return the error for a stream that stopped before its end, and keep it."""
        problem.args = self._exchange.client._redact(problem.args)
        error: Any = problem
        if not isinstance(problem, ReplyError):
            reason = f"the reply stopped before its end: {describe(problem)}"
            error = IncompleteReplyError(reason)
            error.__cause__ = problem
        error.status_code, error.request_id = 200, self._exchange.request_id
        error.partial = self._merger.completion()
        self._error = error
        return error


def chat(messages: Messages, **params: Unpack[Params]) -> Completion:
    """Call Client().chat(): send the messages, and return the whole reply."""
    return Client().chat(messages, **params)


def stream(messages: Messages, **params: Unpack[Params]) -> Stream:
    """Call Client().stream(): send the messages, and return the reply as it arrives."""
    return Client().stream(messages, **params)


def batch(
    requests: Iterable[Any],
    jobs: int = 8,
    *,
    output: str | None = None,
    **params: Unpack[Params],
) -> Iterator[JSON]:
    """Call Client().batch(): send many requests, and yield a row for each."""
    return Client().batch(requests, jobs, output=output, **params)


# ----------------------------------------------------------------------------- Batch


def read_request(item: Any, defaults: JSON) -> JSON:
    """Return the body for a request of a batch, in any of the forms of Client.batch().

    What it says itself goes before the defaults.  Raises InvalidRequestError.
    """
    fields = {"prompt": item} if isinstance(item, str) else item
    if dig(None, fields, "body") is not None:
        url = dig("", fields, "url") or "/chat/completions"
        if dig("POST", fields, "method") != "POST" or "/chat/completions" not in url:
            raise InvalidRequestError("only POST to /chat/completions can be sent")
        fields = fields["body"]
    if not isinstance(fields, dict):
        raise InvalidRequestError("a request must be an object or a string")
    unsent = ("custom_id", "stream", "stream_options", "messages", "prompt")
    rest = {key: value for key, value in fields.items() if key not in unsent}
    messages: Any = fields.get("messages")
    prompt = fields.get("prompt")
    if (messages is None) == (prompt is None):
        raise InvalidRequestError("a request must have either messages or a prompt")
    own = {name: rest.pop(name) for name in REQUEST_NAMES[:-1] if name in rest}
    extra = {k: v for k, v in (defaults.get("extra") or {}).items() if k not in fields}
    extra.pop("stream_options", None)
    params = {**defaults, **check_parameters(own), "extra": {**extra, **rest}}
    turns: list[Any] = dig([], fields, "messages")
    if any(dig("", turn, "role") == "system" for turn in turns):
        params["system"] = own.get("system")  # the default is for those without one
    return build_request(messages if prompt is None else prompt, **params)


def lock_file(file: Any, wait: bool) -> None:
    """Lock a file until it is closed.  Raises BlockingIOError if another run has it."""
    if sys.platform != "win32":
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except (ImportError, OSError) as error:
            log_warning(f"no lock, so do not run it twice at once: {describe(error)}")


def is_same_file(source: Any, file: Any) -> bool:
    try:
        return os.path.sameopenfile(source.fileno(), file.fileno())
    except (AttributeError, OSError, ValueError):  # it is not a file
        return False


class Checkpoint:
    """The file that a batch appends its rows to, and the requests that have one."""

    def __init__(self, path: str, source: Any) -> None:
        """Open the file, and read its rows.  It must not be the source of requests."""
        self._path, self._lock = path, threading.Lock()
        # For each request the custom_ids of its rows, counted.
        self._answered: dict[bytes, collections.Counter[str]] = {}
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise InvalidRequestError(f"{path}: not a regular file")
            self._file = open(path, "a+b", buffering=0)
        except OSError as error:
            raise InvalidRequestError(f"{path}: {describe(error)}") from None
        try:
            if is_same_file(source, self._file):
                raise InvalidRequestError(f"{path} is the input, too")
            lock_file(self._file, wait=False)
            with open(path, "rb") as lines:
                self._load(lines)
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                error = InvalidRequestError(f"{path}: another run is writing to it")
            raise error from None

    def _load(self, lines: Iterable[bytes]) -> None:
        """Remember the rows, and cut off a torn last one."""
        end = 0
        for number, line in enumerate(lines, 1):
            row = read_json(line.decode("utf-8", "replace"))
            is_whole = line.endswith(b"\n")
            is_torn = isinstance(row, str) and not is_whole
            if isinstance(row, dict) and {"custom_id", "response", "error"} <= set(row):
                if row["error"] is None:
                    key = self._key(row.get("request"))
                    names = self._answered.setdefault(key, collections.Counter())
                    names[str(row["custom_id"])] += 1
                if not is_whole:
                    self._file.write(b"\n")
                    break
            elif is_torn and b'{"id": "batch_req_'.startswith(line[:18]):
                self._file.truncate(end)
            else:
                raise InvalidRequestError(f"{self._path}: line {number} is not a row")
            end += len(line)

    def _key(self, request: Any) -> bytes:
        import hashlib

        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).digest()

    def claim(self, row: JSON, is_named: bool) -> bool:
        """Use up an earlier row of this request; return whether there was one."""
        names = self._answered.get(self._key(row["request"]), collections.Counter())
        name = row["custom_id"]
        if names[name] < 1 and not is_named:
            unnamed = (n for n in names if names[n] > 0 and re.match(r"line-\d+$", n))
            name = next(unnamed, name)
        names[name] -= 1
        return names[name] >= 0

    def append(self, row: JSON) -> None:
        """Write a row.  Once that has failed, nothing more is written."""
        line = json.dumps(row).encode("ascii") + b"\n"
        with self._lock:
            try:
                while line and not self._file.closed:  # a full disk takes a part first
                    line = line[self._file.write(line) :]
            except OSError as error:
                self._file.close()
                raise NemotronError(f"{self._path}: {describe(error)}") from error

    def close(self) -> None:
        with self._lock:
            self._file.close()


class Batch:
    """The requests of one batch, and what its workers share.

    A worker takes a slot and a request, answers it, and queues the row.  The slot
    is free again when the consumer comes back for another row: so requests in flight
    and rows not dealt with are at most `jobs`.
    """

    FIRST_PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds

    def __init__(
        self, client: Client, source: Any, jobs: int, output: str | None, params: Any
    ) -> None:
        import logging  # noqa: F401 (now, as it opens files)
        import queue

        output = os.fspath(output) if isinstance(output, os.PathLike) else output
        check_value("jobs", jobs)
        if output is not None:
            check_value("output", output)
        client._headers()
        "localhost".encode("idna")  # which looking up a host needs, and loads
        self.client, self._jobs = client, jobs
        self._params = {"model": client.model, **check_parameters(params)}
        self._slots = threading.Semaphore(jobs)
        self._rows: Any = queue.SimpleQueue()  # of rows; None wakes the consumer up
        self._source_lock = threading.Lock()  # of the next three
        self._names: set[str] = set()  # the custom_ids so far
        self._taken = 0  # requests for which there will be a row
        self.skipped = 0  # requests that have a row in the output
        self._has_ended = False  # no more requests are taken
        self._failure: BaseException | None = None  # why not
        self.stopped = threading.Event()  # nobody waits for the requests in flight
        self.pause_lock = threading.Lock()  # of the next three
        self.paused_at = self.not_before = -math.inf  # on the clock
        self.next_pause = self.FIRST_PAUSE
        self._output = None if output is None else Checkpoint(output, source)

    def rows(self, numbered: Any, parse: Any = lambda item: item) -> Iterator[JSON]:
        """Yield the rows as they come; then raise what has ended the batch early."""
        import queue

        self._numbered, self._parse, consumed = iter(numbered), parse, 0
        try:
            for started in range(self._jobs):
                try:
                    threading.Thread(target=self._work, daemon=True).start()
                except (RuntimeError, MemoryError) as error:  # the system has a limit
                    if not started:
                        raise NemotronError(f"no thread: {error}") from None
                    break
            while not self._has_ended or consumed < self._taken:
                row = None
                try:
                    row = self._rows.get(timeout=0.5)  # Ctrl-C is noticed in between
                except queue.Empty:
                    pass
                except KeyboardInterrupt as error:
                    self.stop(error)
                if row:
                    consumed += 1
                    yield row
                    self._slots.release()
                if self.stopped.is_set() and self._rows.empty():
                    break
        finally:
            self.stop()
        if self._failure:
            raise self._failure

    def _end(self, failure: BaseException | None = None) -> None:
        """Take no more requests."""
        self._failure = self._failure or failure
        self._has_ended = True
        self._rows.put(None)

    def stop(self, failure: BaseException | None = None) -> None:
        """Take no more requests, and do not wait for those in flight."""
        self._failure = self._failure or failure
        self.stopped.set()  # first: the rest needs memory
        self._end()
        for _ in range(self._jobs):  # for the workers that wait for a slot
            self._slots.release()
        if self._output:
            self._output.close()

    def _work(self) -> None:
        try:
            while self._slots.acquire():
                with self._source_lock:
                    row, body = self._next_request()
                if body:
                    self._answer(row, body)
                if not row or self.stopped.is_set():
                    break
                if self._output:
                    self._output.append(row)
                self._rows.put(row)
        except BaseException as error:  # the output is full, or no memory is left
            self.stop(error)

    def _next_request(self) -> tuple[JSON, JSON]:
        """Take the next request; return its row, and the body to send, if there is one.

        Both are empty at the end.  Taking and counting are one step, under the lock.
        """
        while not self._has_ended:
            try:
                number, item = next(self._numbered)
            except BaseException as error:
                self._end(None if isinstance(error, StopIteration) else error)
                break
            row, body = self._prepare(f"line-{number}", item)
            is_named = row["custom_id"] != f"line-{number}"
            if body and self._output and self._output.claim(row, is_named):
                self.skipped += 1
                continue
            self._taken += 1
            return row, body
        return {}, {}

    def _prepare(self, name: str, item: Any) -> tuple[JSON, JSON]:
        """Return the row of a request, and its body if it is valid."""
        row: JSON = {"id": f"batch_req_{os.urandom(12).hex()}", "custom_id": name}
        row.update(request=None, response=None, error=None)
        try:
            item = self._parse(item)
            own = item.get("custom_id") if isinstance(item, dict) else None
            if own is not None and not isinstance(own, str):
                raise InvalidRequestError("custom_id must be a string")
            name = row["custom_id"] = name if own is None else own
            if name in self._names:
                duplicate = InvalidRequestError(f"custom_id {name} was used before")
                duplicate.code = "duplicate_custom_id"
                raise duplicate
            self._names.add(name)
            body = json.loads(to_json(read_request(item, self._params)))
            row["request"] = self.client._redact(body)
            return row, body
        except Exception as error:
            if not isinstance(error, NemotronError):
                error = InvalidRequestError(f"not a request: {error}")
            row["error"] = {"code": error.code, "message": str(error)}
            return row, {}

    def _answer(self, row: JSON, body: JSON) -> None:
        """Send a request, and put what comes of it into its row."""
        exchange, status = BatchExchange(self, body), 200
        try:
            exchange.send(exchange.read_completion)
            reply = exchange.redacted
            self.next_pause = self.FIRST_PAUSE
        except Exception as cause:
            is_own = isinstance(cause, NemotronError)
            error: Any = cause if is_own else ReplyError(f"odd reply: {cause!r}")
            if isinstance(error, AuthenticationError):
                self._end(error)
            row["error"] = {"code": error.code, "message": str(error)}
            reply, status = error.body, error.status_code
        response = {"status_code": status, "request_id": exchange.request_id}
        row["response"] = {**response, "body": reply} if status else None


class BatchExchange(Exchange):
    """A call of a batch, whose workers share the pauses that a busy server needs."""

    def __init__(self, batch: Batch, body: JSON) -> None:
        super().__init__(batch.client, body, default_retries=6)
        self._batch, self._paused, self._sent_at = batch, 0.0, 0.0

    def _wait(self, seconds: float) -> None:
        """Wait these seconds, and for the pause, but not past the deadline."""
        clock, batch = self.client._clock, self._batch
        until = clock() + seconds
        while (left := min(max(until, batch.not_before), self.deadline) - clock()) > 0:
            if batch.stopped.wait(left):
                raise NemotronError("the batch was stopped")
        self._sent_at = clock()

    def _delay_after(self, error: NemotronError) -> float:
        """Pause after a busy server's answer, without using up a retry.

        The answer to a request that was sent before a pause does not begin another one.
        """
        batch, now, delay = self._batch, self.client._clock(), error.retry_after or 0.0
        cause = error.__cause__
        is_full = getattr(cause, "errno", 0) in (errno.EMFILE, errno.ENFILE)
        if is_full or isinstance(cause, MemoryError):
            delay = 0.1  # until another worker has ended a call
        elif not isinstance(error, RateLimitError):
            return super()._delay_after(error)
        elif delay <= self.client.timeout:
            with batch.pause_lock:
                if self._sent_at >= batch.paused_at:
                    batch.paused_at = now
                    if not delay:
                        delay = batch.next_pause
                        batch.next_pause = min(2 * delay, batch.MAX_PAUSE)
                    log_warning(f"all workers pause for {delay:.1f} s: {error}")
                batch.not_before = max(batch.not_before, now + delay)
                delay = max(0.0, batch.not_before - now)
        self._paused += delay
        if now + delay >= self.deadline or self._paused > self.client.timeout:
            raise error
        return delay


# -------------------------------------------------------------------- Offline server


@contextlib.contextmanager
def offline(**settings: Any) -> Iterator[Client]:
    """A Client, with these settings, for a server in this process on 127.0.0.1.

    The server answers every request with the last user message, in the documented
    shapes, and with usage counted in words.  It needs no token, network or model.
    """
    import http.server
    import socketserver

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = read_json(self.rfile.read(length).decode("utf-8", "replace"))
            chunks, merger = list(echo(body)), ChunkMerger()
            collections.deque(map(merger.add, chunks), maxlen=0)
            kind, answer = "application/json", to_json(merger.completion())
            if dig(False, body, "stream"):
                kind, events = "text/event-stream", [*map(to_json, chunks), "[DONE]"]
                answer = "".join(f"data: {event}\n\n" for event in events)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(answer.encode("ascii"))

        def log_message(self, *args: Any, **kwargs: Any) -> None:
            pass

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, request_queue_size = True, 1024

        def handle_error(self, *args: Any, **kwargs: Any) -> None:
            pass  # the client has gone

    with Server(("127.0.0.1", 0), Handler) as server:
        # It polls for the shutdown every 0.01 seconds.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1/openai"
        try:
            yield Client(**{**settings, "token": "", "base_url": url})
        finally:
            server.shutdown()


def echo(body: Any) -> Iterator[JSON]:
    """Yield the last user message of a request as a stream, word by word."""
    prompt, sent = "", 0
    messages: list[Any] = dig([], body, "messages")
    for message in messages:
        content: Any = dig(None, message, "content")
        parts = content if isinstance(content, list) else [{"text": content}]
        text = "".join(dig("", part, "text") for part in parts)
        sent += len(text.split())
        prompt = text if message["role"] == "user" else prompt
    words = re.findall(r"\s*\S+|\s+$", prompt)
    usage = {"prompt_tokens": sent, "completion_tokens": len(words)}
    usage.update(total_tokens=sent + len(words), estimated_cost=0)
    head: JSON = {
        "id": f"chatcmpl-{os.urandom(12).hex()}",
        "model": dig("", body, "model"),
    }
    head = {**head, "object": "chat.completion.chunk", "created": int(time.time())}
    for piece in ("", *words, STOP_TOKEN, None):
        for index in range(dig(1, body, "n")):
            delta = {} if piece is None else {"role": "assistant", "content": piece}
            reason = "stop" if piece is None else None
            choice = {"index": index, "delta": delta, "finish_reason": reason}
            yield {**head, "choices": [choice]}
    yield {**head, "choices": [], "usage": usage}


# --------------------------------------------------------------- Command line: options

HELP_END = f"""\
examples:
  %(prog)s 'Name two techniques to cook lamb.'
  git diff | %(prog)s -s 'Be brief.' 'Write a commit message for this diff.'
  %(prog)s --batch topics.txt --output rows.jsonl 'Write a question about {{}}.'

exit status:
  0    a complete reply; every row of a batch complete
  1    the API or the network failed; a batch has error rows
  2    usage: a bad option, parameter, message or file; nothing was sent
  3    the reply is not complete: it stopped early, or its finish_reason is
       {", ".join(INCOMPLETE)}; a batch with such rows,
       or stopped by --max-cost
  4    the token is missing or refused (401, 402, 403)
  5    busy after all retries (429, 503): try later
  130  Ctrl-C
  141  the reader of standard output closed the pipe"""
OPTIONS = """\
request    | -s --system       | TEXT | system message
request    | -m --model        | TEXT | model; default: NEMOTRON_MODEL
request    | -o --option       | KEY VALUE | any field; VALUE is JSON, @FILE or a string
request    | -c --conversation | FILE | continue the conversation in FILE (JSON)
request    | -i --interactive  |      | chat, a turn a line; exit or Ctrl-D ends it
request    | -n --no-stdin     |      | leave standard input alone
reply      | --no-stream       |      | wait for the whole reply
reply      | --json            |      | print the server's JSON on one line
reply      | -u --usage        |      | then tokens, cost and seconds on standard error
reply      | --dry-run         |      | print the JSON body and send nothing
batch      | --batch           | FILE | send each line of FILE (-: standard input)
batch      | --output          | FILE | append the rows to FILE, and skip those it has
batch      | -j --jobs         | N    | requests at a time, 1 to 200; default: 8
batch      | --max-cost        | N    | send no more after so many US dollars
connection | --base-url        | TEXT | default: DEEPINFRA_BASE_URL
connection | --timeout         | N    | seconds of silence; default: 600
connection | --deadline        | N    | seconds for a whole call
connection | --retries         | N    | default: 2, in a batch 6
connection | --offline         |      | use a built-in server that echoes the prompt"""


def write_stderr(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed
        sys.stderr.write(text)
        sys.stderr.flush()


def warn(message: object) -> None:
    """Write one line to standard error."""
    write_stderr(f"nemotron: {one_line(str(message))}\n")


def number(text: str) -> float:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def utf8(text: str) -> str:
    """Return an argument decoded as UTF-8, whatever the locale."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8")


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Return the options.  Raises InvalidRequestError, or SystemExit for -h."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise InvalidRequestError(f"{message} (-h shows the options)")

    program = os.path.basename(sys.argv[0])
    parser = Parser(
        prog="nemotron.py" if program[:1] in ("", "-") else program,
        usage="%(prog)s [options] [PROMPT ...]",
        description="Send PROMPT, and standard input if it is not a terminal, to\n"
        f"{MODEL} or any OpenAI-compatible endpoint.\nThe token is in DEEPINFRA_TOKEN.",
        epilog=HELP_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", type=utf8, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__)
    rows = read_table(OPTIONS)
    for name, _, limits, _, text in PARAMETERS:
        if name not in ("n", "tools", "response_format"):  # which need -o
            flag, kind = f"--{name.replace('_', '-')}", "N" if limits else "TEXT"
            rows.append(["sampling", flag, kind, f"{text}; {limits}".rstrip("; ")])
    for title, group in itertools.groupby(rows, operator.itemgetter(0)):
        add = parser.add_argument_group(title).add_argument
        for _, flags, kind, text in group:
            convert = {"N": number, "FILE": str}.get(kind, utf8)
            settings: JSON = {"metavar": kind, "type": convert}
            if not kind:
                settings = {"action": "store_true"}
            elif kind == "KEY VALUE":
                settings.update(metavar=("KEY", "VALUE"), nargs=2, action="append")
            elif flags == "--stop":
                settings["action"] = "append"
            add(*flags.split(), help=text, **settings)
    end = argv.index("--") if "--" in argv else len(argv)  # after it, all are words
    options = parser.parse_intermixed_args(argv[:end])
    options.words += map(utf8, argv[end + 1 :])
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raise InvalidRequestError for options that do not go together."""
    is_batch = options.batch is not None
    given = {k for k, v in vars(options).items() if v is not None and v is not False}
    single, several = "conversation interactive dry_run json", "output jobs max_cost"
    wrong = given & set((single if is_batch else several).split())
    if wrong:
        reason = "does not go with" if is_batch else "needs"
        raise InvalidRequestError(f"--{min(wrong).replace('_', '-')} {reason} --batch")
    if {"interactive", "dry_run"} <= given:
        raise InvalidRequestError("--dry-run does not go with -i")
    if sys.stdout is None and options.output is None:
        raise InvalidRequestError("standard output is closed")


def read_params(options: argparse.Namespace) -> JSON:
    """Return the parameters that the options give; the fields of -o go into extra."""
    extra: JSON = {}
    for key, value in options.option or ():
        if value.startswith("@"):
            value = read_file(value[1:])
        extra[key] = read_json(value)
    is_blocking = options.no_stream or options.json or options.batch is not None
    if options.usage and not is_blocking:
        extra.setdefault("stream_options", {"include_usage": True})
    allows_n = options.json or options.batch or options.dry_run
    if extra.get("n", 1) != 1 and not allows_n:
        raise InvalidRequestError("n over 1 needs --json or --batch")
    params = {name: getattr(options, name, None) for name in PARAMETER_NAMES}
    return check_parameters({**params, "system": options.system, "extra": extra})


# ------------------------------------------- Command line: one reply and conversations


class OutputError(NemotronError, code="output"):
    """Standard output cannot be written; exit_status is 141 if its reader has gone."""


def write_output(text: str) -> None:
    """Write to standard output, and flush.  Raises OutputError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as cause:
        error = OutputError(f"standard output: {describe(cause)}")
        gone = (errno.EPIPE, errno.EINVAL if os.name == "nt" else errno.EPIPE)
        error.exit_status = 141 if cause.errno in gone else 1
        with contextlib.suppress(OSError, ValueError):  # or exiting would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise error from cause


def is_terminal(file: Any) -> bool:
    return file is not None and file.isatty()


def write_reply(pieces: Iterable[str]) -> None:
    """Write a reply: no white space before it, and one newline after it."""
    begun, on_terminal, newlines = False, is_terminal(sys.stdout), ""
    try:
        for piece in pieces:
            piece = piece if begun else piece.lstrip()
            text = piece.rstrip("\r\n")
            if text:
                begun, line = True, newlines + text
                write_output(escape_controls(line) if on_terminal else line)
                newlines = piece[len(text) :]
            else:
                newlines += piece  # which may be the last
        begun = True  # an empty reply is an empty line
    except KeyboardInterrupt:
        begun = begun or on_terminal  # which shows ^C
        raise
    finally:
        if begun:
            write_output("\n")


def open_input(path: str) -> Any:
    """Open a file, or standard input for "-", for which it may have to wait."""
    if path != "-":
        return open(path, "rb")
    # Not the buffer of sys.stdin, which a thread may still hold when the program ends.
    file = open(os.dup(sys.stdin.fileno()) if sys.stdin else os.devnull, "rb")
    with contextlib.suppress(OSError, AttributeError):  # Windows, until 3.12
        os.set_blocking(file.fileno(), True)  # or silence would be taken for the end
    note = "waiting for standard input (-n leaves it alone)"
    timer = threading.Timer(2.0, warn, [note])
    timer.daemon = True
    timer.start()
    try:
        file.peek(1)
    finally:
        timer.cancel()
    return file


def read_file(path: str) -> str:
    """Return the text of a file, or of "-".  Raises InvalidRequestError."""
    try:
        with open_input(path) as file:
            return str(file.read(), "utf-8-sig")
    except (OSError, ValueError) as error:
        name = "standard input" if path == "-" else path
        raise InvalidRequestError(f"{name}: {describe(error)}") from None


def read_prompt(words: list[str], no_stdin: bool) -> str:
    """Return the words, and standard input where the word "-" is, or after them."""
    if no_stdin:
        return " ".join(words)
    has_input = "-" in words or not is_terminal(sys.stdin)
    text = read_file("-").rstrip("\r\n") if has_input else ""
    place = words.index("-") if "-" in words else len(words)
    parts = (" ".join(words[:place]), text, " ".join(words[place + 1 :]))
    return "\n\n".join(filter(None, parts))


class Conversation:
    """The messages so far, and the file that keeps them, if there is one."""

    def __init__(self, path: str | None, system: str | None) -> None:
        self._path = path and os.path.realpath(path)
        self._text = self._read()
        try:
            text = "[]" if self._text is None else self._text
            self.messages = check_messages(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{path}: {error}") from None
        if system is not None:
            others = [m for m in self.messages if m["role"] != "system"]
            self.messages = [{"role": "system", "content": system}, *others]

    def _read(self) -> str | None:
        """Return the text of the file, or None if there is none yet.

        Raises InvalidRequestError, also if the file could not be replaced later.
        """
        import tempfile

        if self._path is None:
            return None
        try:
            tempfile.TemporaryFile(dir=os.path.dirname(self._path)).close()
        except OSError as error:
            message = f"{os.path.dirname(self._path)}: {describe(error)}"
            raise InvalidRequestError(message) from None
        if os.path.exists(self._path) and not os.path.isfile(self._path):
            raise InvalidRequestError(f"{self._path}: not a regular file")
        return read_file(self._path) if os.path.exists(self._path) else None

    def save(self, messages: list[JSON]) -> None:
        """Go on from these messages, and replace the file in one step.

        Raises NemotronError, and leaves the file as it is, if it cannot be written, or
        was changed since it was read.
        """
        path = self._path
        if path is not None:
            text = json.dumps(messages, indent=1) + "\n"
            try:
                self._replace(path, os.path.dirname(path), text.encode("ascii"))
            except (OSError, InvalidRequestError) as error:
                raise NemotronError(f"{path}: {describe(error)}") from error
            self._text = text
        self.messages = messages

    def _replace(self, path: str, folder: str, content: bytes) -> None:
        import tempfile

        with contextlib.ExitStack() as stack:
            if sys.platform != "win32":  # which cannot open a folder
                lock = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, lock)
                lock_file(lock, wait=True)
            if self._read() != self._text:
                raise NemotronError(f"{path} was changed meanwhile, and is kept so")
            temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
            new = os.path.join(temporary, "new")
            with open(new, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(OSError):  # not every file system has modes
                mode = os.stat(path).st_mode if os.path.exists(path) else 0o600
                os.chmod(new, mode & 0o7777)
            os.replace(new, path)


def finish_problem(reply: Completion) -> str:
    """Return the finish_reason by which a choice is not complete; "" if all are."""
    choices: list[Any] = dig([], reply, "choices")
    reasons = [dig("", choice, "finish_reason") for choice in choices]
    return next((reason for reason in reasons if reason in INCOMPLETE), "")


def format_cost(cost: float | None) -> str:
    return "cost unknown" if cost is None else f"${cost:.8f}".rstrip("0").rstrip(".")


def print_reply(client: Client, options: Any, messages: Any, params: JSON) -> Any:
    """Send the messages, print the reply as it arrives, and return it."""
    began = time.monotonic()
    if options.json or options.no_stream:
        reply = client.chat(messages, **params)
        write_reply([json.dumps(reply) if options.json else reply.text])
    else:
        with client.stream(messages, **params) as stream:
            write_reply(stream)
            reply = stream.completion()
    problem = finish_problem(reply)
    if problem:
        cure = " (--max-tokens sets it)" if problem == "length" else ""
        warn(f"the reply is not complete, its finish_reason is {problem}{cure}")
    if reply.tool_calls and not options.json:
        warn("the reply calls tools: --json shows how")
    if options.usage:
        usage, model = reply.usage, dig("", reply, "model")
        tokens = [str(usage.get(f"{x}_tokens", "?")) for x in ("prompt", "completion")]
        other = f", model {model}" if model not in ("", params["model"]) else ""
        cost, seconds = format_cost(reply.cost), time.monotonic() - began
        warn(f"{' + '.join(tokens)} tokens, {cost}, {seconds:.1f} s{other}")
    return reply


def read_turns(words: list[str], no_stdin: bool) -> Iterator[str]:
    """Yield the turns of a chat: the words, then standard input line by line."""
    yield " ".join(words)
    if no_stdin:
        return
    if not is_terminal(sys.stdin):
        yield from (line.decode("utf-8-sig", "replace") for line in open_input("-"))
        return
    stdin: Any = sys.stdin
    stdin.reconfigure(encoding="utf-8", errors="replace")
    warn("exit or Ctrl-D ends the chat, Ctrl-C drops a turn")
    with contextlib.suppress(ImportError):
        import readline  # which input() then uses

        editor: Any = readline  # which Windows has from elsewhere
        editor.parse_and_bind("set enable-bracketed-paste on")  # a paste is one turn
    while True:
        try:
            if is_terminal(sys.stdout):
                yield input("> ")
            else:
                write_stderr("> ")
                yield sys.stdin.readline() or "exit"
        except (KeyboardInterrupt, EOFError) as error:
            write_stderr("\n")
            if isinstance(error, EOFError):
                return


def run_chat(client: Client, options: argparse.Namespace, params: JSON) -> int:
    """Chat until the user ends it; a turn that fails is dropped."""
    conversation = Conversation(options.conversation, params.pop("system", None))
    client._headers()  # without a token, no turn can succeed
    for text in map(str.strip, read_turns(options.words, options.no_stdin)):
        if text == "exit":
            break
        try:
            if text:
                turn = [*conversation.messages, {"role": "user", "content": text}]
                reply = print_reply(client, options, turn, params)
                conversation.save([*turn, reply.message])
        except OutputError:
            raise
        except NemotronError as error:
            warn(error)
        except KeyboardInterrupt:
            warn("stopped, this turn is dropped")
    return 0


def run_prompt(client: Client, options: argparse.Namespace, params: JSON) -> int:
    """Send one prompt, and print the reply."""
    conversation = Conversation(options.conversation, params.pop("system", None))
    messages = conversation.messages
    prompt = read_prompt(options.words, options.no_stdin)
    if prompt:
        messages = [*messages, {"role": "user", "content": prompt}]
    elif last_turn(messages)[1] not in ("user", "tool"):
        usage = "nemotron.py [options] [PROMPT ...] (-h shows the options)"
        raise InvalidRequestError(f"no prompt: {usage}")
    if options.dry_run:
        is_stream = not (options.json or options.no_stream)
        body = build_request(messages, stream=is_stream, **params)
        write_output(to_json(body) + "\n")
        return 0
    reply = print_reply(client, options, messages, params)
    conversation.save([*messages, reply.message])
    return 3 if finish_problem(reply) else 0


# ------------------------------------------------ Command line: batches, and the start


class Progress:
    """What has become of a batch so far, and why it is to stop."""

    MAX_FAILURES = 20  # in a row

    def __init__(self, total: int, max_cost: float | None) -> None:
        self._total, self._max_cost = total, max_cost  # a total of 0 is not known
        self._began, self._drawn, self._cost = time.monotonic(), 0.0, 0.0
        self._done = self._truncated = self._failures_in_a_row = 0
        self._codes: collections.Counter[str] = collections.Counter()  # of error rows
        self.stop_reason, self.has_stopped = "", False

    def add(self, row: JSON, skipped: int) -> None:
        """Count a row, and show the progress."""
        self._done += 1
        if row["error"]:
            if not self._codes:
                self.draw("")
                warn(f"first failure, {row['custom_id']}: {row['error']['message']}")
            self._codes[row["error"]["code"]] += 1
            self._failures_in_a_row += row["request"] is not None
            if self._failures_in_a_row >= self.MAX_FAILURES:
                self.stop_reason = f"stopped by {self.MAX_FAILURES} failures in a row"
        else:
            reply = Completion(row["response"]["body"])
            self._failures_in_a_row = 0
            self._truncated += finish_problem(reply) != ""
            self._cost += reply.cost or 0.0
            if self._max_cost is not None and (reply.cost is None or reply.cost < 0):
                self.stop_reason = "stopped: --max-cost, but a reply names no cost"
            elif self._max_cost is not None and self._cost >= self._max_cost:
                self.stop_reason = "stopped by --max-cost"
        if time.monotonic() > self._drawn + 0.1:
            self._drawn = time.monotonic()
            self.draw(self.summary(skipped))

    def summary(self, skipped: int) -> str:
        seconds = time.monotonic() - self._began
        done, rate = self._done + skipped, self._done / max(seconds, 0.001)
        left = max(0, self._total - done) / max(rate, 0.001)
        codes = ", ".join(f"{n} {code}" for code, n in self._codes.most_common())
        parts = (
            f"{done} of {self._total} done" if self._total else f"{done} done",
            f"{skipped} of them before" if skipped else "",
            f"{sum(self._codes.values())} failed" + (f" ({codes})" if codes else ""),
            f"{self._truncated} not complete" if self._truncated else "",
            f"{rate:.1f}/s, {format_cost(self._cost)}, {seconds:.1f} s",
            f"{left:.0f} s left" if left else "",
            self.stop_reason if self.has_stopped else "",
        )
        return ", ".join(filter(None, parts))

    def draw(self, text: str) -> None:
        """Redraw the progress line in place, on a terminal."""
        if is_terminal(sys.stderr):
            import shutil

            width = (shutil.get_terminal_size().columns or 80) - 1
            write_stderr("\r" + text[:width].ljust(width) + "\r")

    def status(self) -> int:
        return 1 if self._codes else 3 if self._truncated or self.has_stopped else 0


def parse_line(template: str, line: bytes) -> Any:
    """Return the request in a line of a batch file.  Raises ValueError."""
    text = line.decode("utf-8-sig").strip()
    item = json.loads(text) if text[:1] in ("{", "[", '"') else text
    if not isinstance(item, str) or not template:
        return item
    return template.replace("{}", item) if "{}" in template else f"{template}\n\n{item}"


def read_lines(file: Any, progress: Progress) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not empty, with their numbers, until progress stops."""
    for number, line in enumerate(file, 1):
        if line.strip() and progress.stop_reason:
            progress.has_stopped = True
            break
        if line.strip():
            yield number, line


def run_batch(client: Client, options: argparse.Namespace, params: JSON) -> int:
    """Send each line of a file; the rows go to a file, or to standard output."""
    if options.max_cost is not None:
        check_value("max_cost", options.max_cost)
    total, template = 0, " ".join(options.words)
    try:
        file = open_input(options.batch)
    except OSError as error:
        raise InvalidRequestError(f"{options.batch}: {describe(error)}") from None
    if is_terminal(sys.stderr) and options.batch != "-" and file.seekable():
        total = sum(1 for line in file if line.strip())
        file.seek(0)
    progress = Progress(total, options.max_cost)
    jobs = 8 if options.jobs is None else options.jobs
    batch = Batch(client, file, jobs, options.output, params)
    rows = batch.rows(read_lines(file, progress), lambda x: parse_line(template, x))

    def drain() -> None:
        for row in rows:
            if options.output is None:
                write_output(json.dumps(row) + "\n")
            progress.add(row, batch.skipped)

    try:
        drain()
    except KeyboardInterrupt as error:
        batch.stop(error)
        drain()  # those that are complete
        raise
    finally:
        progress.draw("")
        warn(progress.summary(batch.skipped))
        if options.batch != "-":  # where a worker may wait for a line
            file.close()
    return progress.status()


def run(options: argparse.Namespace) -> int:
    check_options(options)
    params = read_params(options)
    names = ("model", "base_url", "timeout", "deadline", "retries")
    settings = {name: getattr(options, name) for name in names}
    with contextlib.ExitStack() as stack:
        if options.offline:
            client = stack.enter_context(offline(**settings))
        else:
            client = Client(**settings)
        params["model"] = client.model
        if options.batch is not None:
            return run_batch(client, options, params)
        converse = run_chat if options.interactive else run_prompt
        return converse(client, options, params)


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit status.

    argv is without the program's name; None: sys.argv[1:].
    """
    streams: list[Any] = [sys.stdout, sys.stderr]
    for file in streams:
        with contextlib.suppress(AttributeError):  # it is closed
            file.reconfigure(encoding="utf-8", errors="replace")
    try:
        try:
            return run(parse_options(sys.argv[1:] if argv is None else argv))
        except SystemExit as end:  # of -h and --version
            if sys.stdout is not None:
                write_output("")  # which flushes
            return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except NemotronError as error:
        if error.exit_status != 141:
            warn(error)
        return error.exit_status
    except (OSError, MemoryError) as error:
        warn(f"{getattr(error, 'filename', None) or 'failed'}: {describe(error)}")
        return 1


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.flush()
    os._exit(status)  # tearing Python down would add a tenth to the time of a call
