#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The nemotron.py authors
"""Talk to Nemotron-4-340B-Instruct, or any OpenAI-compatible chat endpoint.

One file, nothing but the standard library.  A reply is whole or it is an error.

    import nemotron
    print(nemotron.chat("Hello!").text)
    for text in nemotron.stream("Hello!"):
        print(text, end="", flush=True)

    $ export DEEPINFRA_TOKEN=...
    $ python3 nemotron.py 'Name two techniques to cook lamb.'
    $ git diff | python3 nemotron.py 'Write a commit message for this diff.'

The errors are in the section "Errors", the exit statuses at the end of `nemotron.py
-h`.  The sections stand bottom-up: all is pure down to "Client", which has all the
network there is; "Batch", "Offline server" and "Command line" are built on it.
"""

from __future__ import annotations

import _thread
import codecs
import collections
import contextlib
import email.utils
import errno
import http.client
import io
import itertools
import json
import math
import operator
import os
import random
import re
import select
import socket
import sys
import time
import urllib.parse
import urllib.request

TYPE_CHECKING = False  # typing is slow to import, and only type checkers need it
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Iterable, Iterator
    from queue import SimpleQueue
    from typing import Any, TypeVar

    JSON = dict[str, Any]
    Messages = str | list[JSON]
    AnyError = TypeVar("AnyError", bound=Exception)
    Result = TypeVar("Result")

__version__ = "1.0.0"
__all__ = [
    "MODEL", "BASE_URL", "chat", "stream", "batch", "build_request", "Client",
    "Completion", "Chunk", "Stream", "offline", "main", "NemotronError",
    "InvalidRequestError", "APIConnectionError", "APITimeoutError", "APIStatusError",
    "AuthenticationError", "RateLimitError", "ReplyError", "IncompleteReplyError",
]

MODEL = "nvidia/Nemotron-4-340B-Instruct"
BASE_URL = "https://api.deepinfra.com/v1/openai"
STOP_TOKEN = "</s>"  # the model's own; the provider sends it as a last piece of text
MAX_REPLY = 64 << 20  # bytes of a blocking reply
MAX_EVENT = 16 << 20  # bytes of one server-sent event
MAX_ERROR = 1 << 20  # bytes of the body of an error
MAX_WAIT = 120.0  # seconds; a server that asks for more is not waited for
MAX_LINE = 300  # characters of a diagnostic

# ---------------------------------------------------------------------------- Errors


def one_line(text: str) -> str:
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    r"""The text with control characters but newline and tab shown as \x1b."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text
    )


class NemotronError(Exception):
    """Anything that goes wrong here; `str()` of it is one line.

    `code` names it in the rows of a batch.  The others are the server's where it
    answered, else None: `body` is JSON or text, `retry_after` seconds.
    """

    code = "error"
    status_code: int | None = None
    body: Any = None
    request_id: str | None = None
    retry_after: float | None = None

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InvalidRequestError(NemotronError, ValueError):
    """The caller's mistake; nothing was sent."""

    code = "invalid_request"


class APIConnectionError(NemotronError):
    """No usable connection to the server."""

    code = "connection"


class APITimeoutError(APIConnectionError, TimeoutError):
    """`timeout` or `deadline` has passed (for a stream: before its 200)."""

    code = "timeout"


class APIStatusError(NemotronError):
    """The server answered with a status other than 200."""

    code = "api_status"


class AuthenticationError(APIStatusError):
    """401, 402, 403; or there is no usable token (`status_code` is None)."""

    code = "authentication"


class RateLimitError(APIStatusError):
    """429, 503: busy, try later."""

    code = "rate_limit"


class ReplyError(NemotronError):
    """A 200, but not an answer; `partial` is the `Completion` of what came before."""

    code = "reply"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.partial = Completion()


class IncompleteReplyError(ReplyError):
    """The stream stopped before its end; `partial` is the `Completion` so far."""

    code = "incomplete_reply"


# ------------------------------------------------------------------------ Parameters


def not_(value: object) -> str:
    return f"not {value!r:.80}"


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return is_integer(value) or isinstance(value, float) and math.isfinite(value)


def is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


KINDS: dict[str, Callable[[Any], bool]] = {
    "a number": is_number,
    "an integer": is_integer,
    "a string": lambda value: isinstance(value, str),
    "none or auto": lambda value: value in ("none", "auto"),
    "a string, or a list of 1 to 16": lambda value: isinstance(value, str)
    or is_list_of(str, value) and 1 <= len(value) <= 16,
    "a list of objects": lambda value: is_list_of(dict, value),
    "an object": lambda value: isinstance(value, dict),
}


class Parameter(
    collections.namedtuple("Parameter", "name kind range default help", defaults=[""])
):
    """A row of the table; `range` reads as in the provider's documentation."""

    def check(self, value: Any) -> None:
        """Raise InvalidRequestError unless value is of the kind and in the range."""
        fits = KINDS[self.kind](value)
        if fits and self.range:
            low, above, _, below, high = self.range.split()
            less = {"<": operator.lt, "<=": operator.le}
            fits = less[above](float(low), value) and less[below](value, float(high))
        if not fits:
            wanted = f"{self.kind}, {self.range}".rstrip(", ")
            raise InvalidRequestError(f"{self.name} must be {wanted}; {not_(value)}")


# Names, ranges and defaults are those of the provider's page for the model.  `seed` is
# below 2^63, which that page prints as JavaScript does, 9223372036854776000.  `stop`,
# `n`, `tools` and `response_format` are in the provider's OpenAPI file only.
PARAMETERS = tuple(Parameter(*row) for row in (
    ("temperature", "a number", "0 <= temperature <= 2", "1",
     "how random: 0.2 is focused, 0.8 is varied"),
    ("top_p", "a number", "0 < top_p <= 1", "1",
     "sample from the likeliest tokens that together have this probability"),
    ("min_p", "a number", "0 <= min_p <= 1", "0",
     "leave out tokens less likely than this share of the likeliest; 0 is off"),
    ("top_k", "an integer", "0 <= top_k < 1000", "0",
     "sample from this many likeliest tokens; 0 is off"),
    ("max_tokens", "an integer", "0 <= max_tokens <= 1000000", "",
     "the most tokens to generate; input and output share the context"),
    ("presence_penalty", "a number", "-2 <= presence_penalty <= 2", "0",
     "above 0: less of what has appeared, more new topics"),
    ("frequency_penalty", "a number", "-2 <= frequency_penalty <= 2", "0",
     "above 0: less of what has appeared often"),
    ("repetition_penalty", "a number", "0.01 <= repetition_penalty <= 5", "1",
     "the same, multiplied: above 1 penalizes, below 1 encourages"),
    ("tool_choice", "none or auto", "", "",
     "whether the model may call a tool"),
    ("user", "a string", "", "",
     "a hashed id of your end user, to detect abuse"),
    ("seed", "an integer", "0 <= seed < 9223372036854775808", "",
     "for replies that repeat, as far as the server can; random if not given"),
    ("stop", "a string, or a list of 1 to 16", "", "",
     "end the reply before this text"),
    ("n", "an integer", "1 <= n <= 4", "1",
     "how many replies"),
    ("tools", "a list of objects", "", "",
     "the functions that the model may call"),
    ("response_format", "an object", "", "",
     'such as {"type": "json_object"}'),
))
SETTINGS = tuple(Parameter(*row) for row in (
    ("model", "a string", "", MODEL),
    ("base_url", "a string", "", BASE_URL),
    ("timeout", "a number", "0 < timeout <= 1e6", "600"),
    ("deadline", "a number", "0 < deadline <= 1e6", ""),
    ("retries", "an integer", "0 <= retries <= 1000", "2"),
    ("jobs", "an integer", "1 <= jobs <= 200", "8"),
    ("max_cost", "a number", "0 <= max_cost <= 1e9", ""),
    ("system", "a string", "", ""),
    ("extra", "an object", "", ""),
))
BY_NAME = {row.name: row for row in (*PARAMETERS, *SETTINGS)}
DOCUMENTED = tuple(row.name for row in PARAMETERS)


def given(values: JSON) -> JSON:
    """The values that are not None, each of them checked."""
    values = {name: value for name, value in values.items() if value is not None}
    for name, value in values.items():
        BY_NAME[name].check(value)
    return values


# --------------------------------------------------------------------------- Request


def problem_with(message: Any) -> str:
    """What is wrong with a message; "" if nothing."""
    if not isinstance(message, dict):
        return "a message must be an object"
    role, content, calls = (message.get(k) for k in ("role", "content", "tool_calls"))
    if role not in ("system", "user", "assistant", "tool"):
        return f"role must be system, user, assistant or tool; {not_(role)}"
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        return "a tool's message must have its tool_call_id"
    silent = role == "assistant" and content is None and calls
    if isinstance(content, str) or silent and is_list_of(dict, calls):
        return ""
    return f"content must be a string; {not_(content)}"


def check_messages(messages: Any) -> list[JSON]:
    """A copy of the messages, each of them sound, and at most one the system's.

    Raises InvalidRequestError, which names the message by its index.
    """
    if not isinstance(messages, (list, tuple)):
        raise InvalidRequestError(f"messages must be text or a list; {not_(messages)}")
    systems = 0
    for index, message in enumerate(messages):
        problem = problem_with(message)
        systems += not problem and message["role"] == "system"
        if problem or systems > 1 and message["role"] == "system":
            problem = problem or "a second system message"
            raise InvalidRequestError(f"messages[{index}]: {problem}")
    return [dict(message) for message in messages]


def build_request(messages: Messages, *, model: str | None = MODEL,
                  stream: bool = False, system: str | None = None,
                  extra: JSON | None = None, **params: Any) -> JSON:
    """The JSON body of a request, validated; what is not given is not in it.

    `messages` is one user message, or a list of message objects: (user, assistant,
    tool)*, user, and one system message anywhere.  `system` is put in front of them.
    `params` are those of `PARAMETERS`.  `extra` holds any other fields, which go into
    the body as they are.  Raises InvalidRequestError.
    """
    for name in params:
        if name not in DOCUMENTED:
            import difflib

            known = (*DOCUMENTED, "model", "system", "extra")
            nearest = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise InvalidRequestError(f"unknown parameter {name:.80}: did you mean "
                                      f"{nearest}? (any other field goes into extra)")
    settings = given({"model": model or None, "system": system, "extra": extra})
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    checked = check_messages(messages)
    turns = [i for i, message in enumerate(checked) if message["role"] != "system"]
    if not turns:
        raise InvalidRequestError("messages: there is no user message")
    if checked[turns[-1]]["role"] == "assistant":
        raise InvalidRequestError(f"messages[{turns[-1]}]: the last message must be "
                                  "the user's, or a tool's")
    if system is not None:
        if len(turns) < len(checked):
            raise InvalidRequestError("system is given, and is in messages too")
        checked.insert(0, {"role": "system", "content": system})
    body: JSON = {"model": settings.get("model", MODEL), "messages": checked}
    if stream:
        body["stream"] = True
    body.update(given(params))
    extra = settings.get("extra", {})
    for name in ("messages", "model", "stream"):
        if name in extra:
            raise InvalidRequestError(f"any other field: {name} has a place of its own")
    return {**body, **extra}


def custom_id(number: int, item: object) -> str:
    """The name of a request of a batch: its own, or its number's."""
    name = item.get("custom_id") if isinstance(item, dict) else None
    return name if isinstance(name, str) else f"line-{number}"


def read_request(item: Any, defaults: JSON) -> JSON:
    """The body of a request of a batch, in any of the forms that a batch takes.

    `defaults` are keywords of `build_request`.  Raises InvalidRequestError.
    """
    fields = {"prompt": item} if isinstance(item, str) else item
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"a request must be an object or text; {not_(item)}")
    if not isinstance(fields.get("custom_id") or "", str):
        raise InvalidRequestError("custom_id must be a string")
    if "body" in fields:
        url, method = fields.get("url"), fields.get("method")
        if method not in (None, "POST") or not (
            url is None or str(url).endswith("/chat/completions")
        ):
            raise InvalidRequestError(f"not a chat completion: {method} {url!s:.80}")
        fields = fields["body"]
        if not isinstance(fields, dict):
            raise InvalidRequestError(f"body must be an object; {not_(fields)}")
    rest = {k: v for k, v in fields.items() if k not in ("custom_id", "stream")}
    messages, prompt = rest.pop("messages", None), rest.pop("prompt", None)
    if (messages is None) == (prompt is None) or not isinstance(prompt or "", str):
        raise InvalidRequestError("a request must have messages, or a prompt, a string")
    known = {name: rest.pop(name, None) for name in ("model", "system", *DOCUMENTED)}
    params = {**defaults, **{k: v for k, v in known.items() if v is not None}}
    params["extra"] = {**(defaults.get("extra") or {}), **rest}
    if known["system"] is None and is_list_of(dict, messages) and any(
            message.get("role") == "system" for message in messages):
        params["system"] = None  # its own goes before the default
    return build_request(prompt if messages is None else messages, **params)


def to_json(value: object) -> bytes:
    """Strict JSON on one line, in ASCII, which survives any locale, and in which the
    halves of a surrogate pair that came apart meet again."""
    try:
        return json.dumps(value, allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"this is not JSON: {error}") from None


# ----------------------------------------------------------------------------- Reply

raw_decode = json.JSONDecoder().raw_decode  # loads() would look for white space again


def read_json(text: str) -> Any:
    """The value of a JSON text; the very text where it is none."""
    stripped = text.strip()
    try:
        value, end = raw_decode(stripped)
    except (ValueError, RecursionError):
        return text
    return value if end == len(stripped) else text


def step(value: Any, *path: Any) -> Any:
    """value[a][b]..., or None where there is no such thing."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def index_of(choice: JSON, position: int) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else position


class Reply(dict[str, "Any"]):
    """The server's JSON, untouched; no property of it raises."""

    @property
    def choices(self) -> list[JSON]:
        choices: list[JSON] = self.get("choices", [])
        return choices if is_list_of(dict, choices) else []

    def first(self, *path: Any) -> Any:
        """What is at this path in choice 0; None if nothing is."""
        for position, choice in enumerate(self.choices):
            if index_of(choice, position) == 0:
                return step(choice, *path)
        return None

    @property
    def text(self) -> str:
        """The text of choice 0; or ""."""
        text = self.first("delta", "content") or self.first("message", "content")
        return text if isinstance(text, str) else ""

    @property
    def finish_reason(self) -> str | None:
        """"stop", "length", "tool_calls", "content_filter"... of choice 0; or None."""
        reason = self.first("finish_reason")
        return reason if isinstance(reason, str) else None

    @property
    def usage(self) -> JSON:
        """prompt_tokens, completion_tokens, total_tokens...; or {}."""
        usage = self.get("usage")
        return usage if isinstance(usage, dict) else {}


class Chunk(Reply):
    """One `chat.completion.chunk` of a stream."""


class Completion(Reply):
    """A whole reply, a `chat.completion`."""

    @property
    def tool_calls(self) -> list[JSON]:
        """The tool calls of choice 0; or []."""
        calls: list[JSON] = self.first("message", "tool_calls")
        return calls if is_list_of(dict, calls) else []

    @property
    def message(self) -> JSON:
        """The reply as an assistant's message, for the `messages` of the next turn."""
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **calls}

    @property
    def cost(self) -> float | None:
        """US dollars, as the provider estimates them (`usage.estimated_cost`)."""
        cost: Any = self.usage.get("estimated_cost")
        return cost if is_number(cost) and abs(cost) < 1e9 else None

    @property
    def cut(self) -> str:
        """"length" or "content_filter", if that ended a choice; else ""."""
        reasons = [choice.get("finish_reason") for choice in self.choices]
        return next((r for r in ("length", "content_filter") if r in reasons), "")


def server_words(answer: Any, depth: int = 8) -> str:
    """What the server says has gone wrong, in its own words; or ""."""
    if isinstance(answer, dict) and depth:
        keys = ("error", "detail", "error_message", "message", "msg", "title")
        found = (server_words(answer.get(key), depth - 1) for key in keys)
        loc = answer.get("loc")  # FastAPI's
        where = ".".join(map(str, loc)) if isinstance(loc, list) else ""
        return ": ".join(filter(None, (where, next(filter(None, found), ""))))
    if isinstance(answer, list) and depth:
        found = (server_words(item, depth - 1) for item in answer[:8])
        return "; ".join(filter(None, found))
    if not isinstance(answer, str) or not answer.lstrip().startswith("<"):
        return answer if isinstance(answer, str) else ""
    import html

    title = re.search(r"<title[^>]*>(.*?)</title", answer, re.I | re.S)
    return html.unescape(title[1]) if title else ""


def read_object(text: str, event: str = "") -> JSON:
    """The JSON object of a reply or a chunk; ReplyError where it is anything else."""
    answer = read_json(text)
    if event == "error":
        raise ReplyError(f"the server failed: {server_words(answer) or text}")
    if not isinstance(answer, dict):
        words = server_words(text) or text
        raise ReplyError(f"the reply is not a JSON object: {words}")
    if answer.get("error") or not answer.get("choices"):
        for name in ("error", "detail", "error_message"):
            if answer.get(name) is not None:
                raise ReplyError(f"the server failed: {server_words(answer) or text}")
    return answer


class Choice:
    """One choice, joined from its deltas."""

    def __init__(self) -> None:
        self.text = bytearray()  # of UTF-8: a list of pieces would take ten times that
        self.held = ""  # a stop token, which is text if text follows it
        self.finish_reason: Any = None
        self.tool_calls: list[JSON] = []

    def add(self, delta: JSON) -> str:
        """Take in a delta, or a message; the text that it adds."""
        if delta.get("tool_calls"):
            self.add_tool_calls(delta["tool_calls"])
        content = delta.get("content")
        if not content or not isinstance(content, str):
            return ""
        fresh, self.held = self.held + content, ""
        if content == STOP_TOKEN:
            fresh, self.held = fresh[: -len(STOP_TOKEN)], STOP_TOKEN
        self.text += fresh.encode("utf-8", "surrogatepass")
        return fresh

    def add_tool_calls(self, deltas: Any) -> None:
        """Deltas with one `index` are one call; without, a name begins a call."""
        for delta in deltas if is_list_of(dict, deltas) else ():
            index, function = delta.get("index"), delta.get("function")
            function = function if isinstance(function, dict) else {}
            known = [call for call in self.tool_calls if call["index"] == index]
            if not known or index is None and function.get("name"):
                known = [{"index": index, "function": {"name": "", "arguments": ""}}]
                self.tool_calls += known
            call = known[-1]
            call.update((k, v) for k, v in delta.items() if v and k != "function")
            whole, more = call["function"], function.get("arguments")
            whole["name"] = function.get("name") or whole["name"]
            whole["arguments"] += more if isinstance(more, str) else ""

    def whole(self, index: int) -> JSON:
        text = self.text.decode("utf-8", "surrogatepass")
        message: JSON = {"role": "assistant", "content": text}
        if self.tool_calls:
            calls = [{k: call[k] for k in call if k != "index"}
                     for call in self.tool_calls]
            message = {**message, "content": text or None, "tool_calls": calls}
        return {"index": index, "message": message,
                "finish_reason": self.finish_reason}


class Joiner:
    """Chunks in, one `Completion` out."""

    def __init__(self, several: bool) -> None:
        self.several = several  # choices were asked for, so one more may always come
        self.fields: JSON = {}  # of the reply, but its choices
        self.choices: dict[int, Choice] = {}
        self.unfinished = 0  # of the choices
        self.done = False  # [DONE] came

    @property
    def ended(self) -> bool:
        return bool(self.choices) and (self.done or not self.unfinished)

    @property
    def closed(self) -> bool:
        """No chunk can change the choices any more."""
        return not (self.unfinished or self.several) and bool(self.choices)

    def add(self, chunk: Chunk) -> str:
        """Take in a chunk; the text that it adds to choice 0."""
        if not self.fields:
            self.fields = {k: v for k, v in chunk.items() if k != "choices"}
        if chunk.get("usage"):
            self.fields["usage"] = chunk["usage"]
        parts, fresh = chunk.get("choices"), ""
        if not isinstance(parts, list) or self.closed:
            return ""
        for position, part in enumerate(parts):
            if not isinstance(part, dict):
                continue
            index = index_of(part, position)
            choice = self.choices.get(index)
            if choice is None:
                choice = self.choices[index] = Choice()
                self.unfinished += 1
            delta = part.get("delta") or part.get("message")
            if isinstance(delta, dict) and not choice.finish_reason:
                text = choice.add(delta)
                fresh = fresh if index else text
            if part.get("finish_reason") and not choice.finish_reason:
                choice.finish_reason = part["finish_reason"]
                self.unfinished -= 1
        return fresh

    def completion(self) -> Completion:
        choices = [self.choices[index].whole(index) for index in sorted(self.choices)]
        return Completion(
            {**self.fields, "object": "chat.completion", "choices": choices})


# ---------------------------------------------------------------- Server-sent events
#
# https://html.spec.whatwg.org/multipage/server-sent-events.html, and what servers do:
# - LF, CRLF and CR end a line, and nothing else does: bytes.splitlines() splits at just
#   these, str.splitlines() at eight more.  The two bytes of a CRLF may come apart.
# - Lines are cut from bytes and decoded whole, so UTF-8 may be cut anywhere.
# - An event ends at an empty line.  Some servers end the body without it, so the rest
#   is given out too, marked as possibly torn.


def events(pieces: Iterable[bytes]) -> Iterator[tuple[str, str, bool]]:
    """(event, data, whole) for each event in the pieces of a body.

    `whole` is False for what the body's end left without an empty line.  Raises
    ReplyError for an event over MAX_EVENT bytes.
    """
    name, data, size = "", [], 0  # of an event that has not ended
    rest, pending = [], 0  # of a line that has not ended, and its bytes
    first, after_cr = True, False
    for piece in itertools.chain(pieces, [b""]):
        ended = not piece or piece.endswith((b"\n", b"\r"))  # the body, or a line
        if after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
        after_cr = piece.endswith(b"\r")
        lines = piece.splitlines()
        if not ended and len(lines) < 2:
            rest += lines
            pending += len(piece)
            lines = []
        else:
            if rest:
                lines[:1] = [b"".join([*rest, *lines[:1]])]
            if first and lines:
                lines[0], first = lines[0].removeprefix(codecs.BOM_UTF8), False
            rest = [] if ended else [lines.pop()]
            pending = len(rest[0]) if rest else 0
        if size + pending > MAX_EVENT:
            raise ReplyError(f"an event of the stream is over {MAX_EVENT >> 20} MiB")
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                size += len(line)
            elif not line:
                if data:
                    yield name, b"\n".join(data).decode("utf-8", "replace"), True
                name, data, size = "", [], 0
            elif line == b"data":
                data.append(b"")
            elif line.startswith(b"event:"):
                name = line[6:].decode("utf-8", "replace").strip()
    if data:
        yield name, b"\n".join(data).decode("utf-8", "replace"), False


def stream_events(pieces: Iterator[bytes]) -> Iterator[tuple[str, str, bool]]:
    """`events`, of a body that may also be one plain JSON reply (or a page of HTML)."""
    head = b""
    while not head.lstrip(codecs.BOM_UTF8 + b" \t\r\n"):
        piece = next(pieces, b"")
        head += piece
        if not piece:
            return
    if head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[0] not in b'{[<"':
        yield from events(itertools.chain([head], pieces))
        return
    body, size = [head], len(head)
    for piece in pieces:
        body.append(piece)
        size += len(piece)
        if size > MAX_REPLY:
            raise ReplyError(f"the reply is over {MAX_REPLY >> 20} MiB")
    text = b"".join(body).decode("utf-8-sig", "replace")
    yield "", text, text.lstrip().startswith("<")  # of JSON, a part may have come
    if read_json(text) is not text:
        yield "", "[DONE]", True


# ---------------------------------------------------------------------------- Client
#
# What urllib does, and what is done about it:
# - It follows redirects with the Authorization header, opens file://, and raises for a
#   status: the opener here has none of those handlers.
# - A body that was cut may look as if it had ended: whether a reply is whole is judged
#   by its JSON, its finish_reason and its [DONE].
# - Its timeout is for each operation on the socket, so a server that drips bytes is
#   never timed out: the deadline has a clock of its own.

OVERRUN = r"(?i)context.(length|window)|input.length|maximum.{1,40}token|too long"
ADVICE = {
    401: "the token was refused, check DEEPINFRA_TOKEN",
    402: "the account cannot pay, check its billing",
    403: "the token was refused, check DEEPINFRA_TOKEN",
    404: "not found, check the model and the base URL",
    410: "the model is retired, choose another",
    429: "busy, try later or with fewer requests at once",
    503: "busy, try later",
}


def is_loopback(host: str) -> bool:
    digits = host.replace(".", "").isdigit() and host.count(".") == 3
    return host in ("localhost", "::1") or digits and host.startswith("127.")


def parse_base_url(url: str) -> tuple[str, str, bool]:
    """(scheme, host, whether it is loopback); InvalidRequestError if it is not safe."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidRequestError("the base URL must be https://host[:port][/path]")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidRequestError("the base URL must have no user, query or fragment")
    if parts.scheme != "https" and (parts.scheme != "http" or not is_loopback(host)):
        raise InvalidRequestError("the base URL must be https:// (or http:// to this "
                                  f"machine), not {parts.scheme}://{parts.netloc}")
    return parts.scheme, host, is_loopback(host)


class TimedReader(io.RawIOBase):
    """What a response is read from: each wait for bytes is as long as it may be now."""

    def __init__(self, sock: socket.socket, raw: Any, silence: Callable[[], float]):
        self._sock, self._raw, self._silence = sock, raw, silence
        self.patience = math.inf  # seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        self._sock.settimeout(min(self.patience, self._silence()))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class Handler(urllib.request.AbstractHTTPHandler):
    """urllib's handlers of http and https, whose reads keep to `request.silence`."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, context: Any) -> None:
        super().__init__()
        self._https = {"context": context}

    def http_open(self, request: Any) -> Any:
        return self._open_timed(request, http.client.HTTPConnection, {})

    def https_open(self, request: Any) -> Any:
        return self._open_timed(request, http.client.HTTPSConnection, self._https)

    def _open_timed(self, request: Any, kind: Any, kwargs: JSON) -> Any:
        def respond(sock: socket.socket, *args: Any, **named: Any) -> Any:
            response: Any = http.client.HTTPResponse(sock, *args, **named)
            reader = TimedReader(sock, response.fp.detach(), request.silence)
            response.fp, response.reader = io.BufferedReader(reader), reader
            return response

        def connect(host: str, **named: Any) -> Any:
            connection = kind(host, **named)
            connection.response_class = respond
            return connection

        return self.do_open(connect, request, **kwargs)


def build_opener(scheme: str, host: str,
                 loopback: bool) -> urllib.request.OpenerDirector:
    """An opener that does HTTP and nothing else; APIConnectionError if it cannot."""
    opener, context = urllib.request.OpenerDirector(), None
    if scheme == "https":
        try:
            import ssl
        except ImportError:
            raise APIConnectionError("this Python was built without the ssl module, "
                                     "which https:// needs") from None
        context = ssl.create_default_context()  # 30 ms
        context.set_alpn_protocols(["http/1.1"])
    opener.add_handler(Handler(context))
    if not loopback:
        proxies = urllib.request.getproxies()
        socks = proxies.get("https", "").lower().startswith("socks")
        if socks and not urllib.request.proxy_bypass(host):
            raise APIConnectionError(
                "https_proxy is a SOCKS proxy, which urllib cannot speak to: "
                "name an HTTP proxy, or put the host into no_proxy")
        opener.add_handler(urllib.request.ProxyHandler(proxies))
    return opener


def read_retry_after(headers: http.client.HTTPMessage) -> float | None:
    """Seconds to wait, of `retry-after-ms` or `Retry-After` (seconds or a date)."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        value, seconds = headers.get(name, ""), math.nan
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            date = email.utils.parsedate_tz(value)
            seconds = email.utils.mktime_tz(date) - time.time() if date else (
                float(value) / unit)
        if not math.isnan(seconds):
            return max(0.0, seconds)
    return None


def status_error(response: http.client.HTTPResponse, text: str) -> APIStatusError:
    """The error for a status other than 200, in the server's own words."""
    status, headers = response.status, response.headers
    body = read_json(text)
    words = server_words(body) or response.reason or "no reason given"
    advice = ADVICE.get(status, "")
    if status in (400, 413, 422, 500) and re.search(OVERRUN, words):
        advice = ("input and output are over the model's context (Nemotron-4-340B: "
                  "4,096 tokens), shorten the messages or begin a new conversation")
    elif 300 <= status < 400:
        advice = "redirects are not followed, check the base URL"
        words = headers.get("Location", words)
    kind: type[APIStatusError] = APIStatusError
    if status in (401, 402, 403):
        kind = AuthenticationError
    elif status in (429, 503):
        kind = RateLimitError
    error = kind(f"HTTP {status}{advice and ', ' + advice}: {words}")
    error.status_code, error.body = status, body
    error.request_id = headers.get("x-request-id")
    error.retry_after = read_retry_after(headers)
    return error


def connection_error(cause: BaseException, host: str) -> APIConnectionError:
    words = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    if isinstance(cause, (TimeoutError, socket.timeout)):  # two classes until 3.10
        return APITimeoutError(f"no whole answer from {host} in time: {words}")
    if hasattr(cause, "verify_message"):
        words += " (a certificate authority of your own goes into SSL_CERT_FILE)"
    return APIConnectionError(f"no usable connection to {host}: {words}")


def may_pass(error: NemotronError) -> bool:
    """Whether another attempt may go better."""
    if isinstance(error, APIStatusError):
        return error.status_code in (408, 409, 429, 500, 502, 503, 504)
    cause = error.__cause__
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN  # the others: there is no such host
    return (isinstance(error, APIConnectionError) and cause is not None
            and not hasattr(cause, "verify_message"))  # of a certificate


class Client:
    """Settings, and one opener for all calls with them; threads may share it.

    `timeout`: seconds of silence on the connection.  `deadline`: seconds for a whole
    call, retries and waits included, or None.  `retries`: how often a call is sent
    again after what may pass; None is 2, in a batch 6.  `token`, `base_url` and
    `model`: where None, DEEPINFRA_TOKEN, DEEPINFRA_BASE_URL and NEMOTRON_MODEL of the
    environment, else `BASE_URL` and `MODEL`.  Raises InvalidRequestError.
    """

    _clock = staticmethod(time.monotonic)
    _sleep = staticmethod(time.sleep)
    _grace = 5.0  # seconds that usage and [DONE] may take when a reply has ended

    def __init__(self, *, token: str | None = None, base_url: str | None = None,
                 model: str | None = None, timeout: float | None = 600.0,
                 deadline: float | None = None, retries: int | None = None) -> None:
        environ = os.environ
        for name in ("DEEPINFRA_TOKEN", "DEEPINFRA_API_KEY", "DEEPINFRA_API_TOKEN"):
            token = environ.get(name, "").strip() or None if token is None else token
        if not isinstance(token or "", str):
            raise InvalidRequestError("token must be a string")  # which is not shown
        self._token = (token or "").strip()
        self.base_url = base_url or environ.get("DEEPINFRA_BASE_URL") or BASE_URL
        self.model = model or environ.get("NEMOTRON_MODEL") or MODEL
        self.timeout = 600.0 if timeout is None else timeout
        self.deadline, self.retries = deadline, retries
        given(self._settings())
        self._server = parse_base_url(self.base_url)
        self._opener: urllib.request.OpenerDirector | None = None
        self._lock = _thread.allocate_lock()  # so that there is one opener

    def _settings(self) -> JSON:
        names = ("model", "base_url", "timeout", "deadline", "retries")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"Client({', '.join(f'{k}={v!r}' for k, v in self._settings().items())})"

    def chat(self, messages: Messages, **params: Any) -> Completion:
        """Send the messages, and wait for the whole reply.

        `params` are those of `build_request`, but `stream`.  Raises NemotronError.
        """
        body = self._body(messages, params)
        return self._exchange(body, self._read_completion)[0]

    def stream(self, messages: Messages, **params: Any) -> Stream:
        """Send the messages; the reply is in the `Stream` as it comes.

        Returns when the status has come, and is a 200.  `params` are those of
        `build_request`, but `stream`.  Raises NemotronError.
        """
        body = self._body(messages, params, stream=True)
        return self._exchange(body, lambda response, until: Stream(
            self, response, until, body.get("n", 1) != 1))

    def batch(self, requests: Iterable[Any], jobs: int = 8) -> Iterator[JSON]:
        """Send many requests, at most `jobs` (1 to 200) at a time; a row for each.

        `requests` may be endless: it is read as rows are taken.  A request is a line of
        a batch file, a body, `{"prompt", "system", ...}`, or text.  A row is `{"id",
        "custom_id", "response", "error"}`; rows come as they are ready.  Raises
        InvalidRequestError for `jobs`, AuthenticationError for a token that is refused
        (after the rows in flight), and what `requests` raises; all else is in the rows.
        """
        return Batch(self, enumerate(requests, 1), jobs, {}).rows()

    def _body(self, messages: Any, params: JSON, stream: bool = False) -> JSON:
        if "stream" in params:
            raise InvalidRequestError("stream is no parameter: it is a call of its own")
        params = {**params, "model": params.get("model") or self.model}
        return build_request(messages, stream=stream, **params)

    def _headers(self) -> dict[str, str]:
        """Raises AuthenticationError where there is no usable token."""
        if not (self._token.isascii() and self._token.isprintable()):
            raise AuthenticationError("the token has control characters or characters "
                                      "outside ASCII: copy it again")
        headers = {"Content-Type": "application/json",
                   "User-Agent": f"nemotron.py/{__version__}"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        elif not self._server[2]:
            raise AuthenticationError("no token: set DEEPINFRA_TOKEN, or use offline()")
        return headers

    def _redact(self, text: str) -> str:
        token = re.escape(self._token)
        if len(token) < 8:  # not in the middle of a word: there it is none
            token = rf"(?<!\w){token}(?!\w)"
        return re.sub(token, "[token]", text) if self._token else text

    def _scrub(self, error: AnyError) -> AnyError:
        """No diagnostic shows the token, or a part that clipping would leave of it."""
        error.args = tuple(self._redact(x)[:MAX_LINE] if isinstance(x, str) else x
                           for x in error.args)
        return error

    def _exchange(self, body: JSON,
                  read: Callable[[http.client.HTTPResponse, float | None], Result],
                  wait: Callable[[float, NemotronError], None] | None = None,
                  retries: int = 2) -> Result:
        """Post the body and read the response; again, after what may pass.

        All that is sent is sent here.  `until` is the deadline, on the clock.
        """
        payload, headers = to_json(body), self._headers()
        with self._lock:
            self._opener = self._opener or build_opener(*self._server)
        retries = retries if self.retries is None else self.retries
        until = None if self.deadline is None else self._clock() + self.deadline
        attempt = 1
        while True:
            try:
                with self._translated():
                    return read(self._open(payload, headers, until), until)
            except NemotronError as error:
                pause = error.retry_after
                if pause is None:
                    pause = min(0.5 * 2 ** (attempt - 1), 8) * random.uniform(0.75, 1)
                late = until is not None and self._clock() + pause >= until
                if attempt > retries or pause > MAX_WAIT or late or not may_pass(error):
                    raise
                failure = error
            import logging

            line = f"nemotron: retry {attempt} of {retries} in {pause:.1f} s: {failure}"
            logging.getLogger("nemotron").warning("%s", line[:MAX_LINE])
            wait(pause, failure) if wait else self._sleep(pause)
            attempt += 1

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """What urllib and http.client raise becomes an error of this module."""
        try:
            yield
        except NemotronError as error:  # first: some of them are OSError or ValueError
            self._scrub(error)
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None)  # of a URLError
            cause = self._scrub(reason if isinstance(reason, Exception) else error)
            raise self._scrub(connection_error(cause, self._server[1])) from cause

    def _silence(self, until: float | None) -> float:
        """Seconds that the server may be silent; TimeoutError after the deadline."""
        left = self.timeout if until is None else until - self._clock()
        if left <= 0:
            raise TimeoutError(f"the deadline of {self.deadline} s has passed")
        return min(self.timeout, left)

    def _open(self, payload: bytes, headers: dict[str, str],
              until: float | None) -> http.client.HTTPResponse:
        """One attempt: the response, if it is a 200 that can be read."""
        url = self.base_url.rstrip("/") + "/chat/completions"
        request: Any = urllib.request.Request(url, payload)
        request.silence = lambda: self._silence(until)
        for name, value in headers.items():
            request.add_unredirected_header(name, value)
        assert self._opener
        response = self._opener.open(request, timeout=self._silence(until))
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if response.status != 200:
            body = bytearray()
            with contextlib.suppress(OSError, http.client.HTTPException), response:
                for piece in self._pieces(response, until):
                    body += piece
                    if len(body) > MAX_ERROR:
                        break
            text = body.decode("utf-8", "replace") if encoding == "identity" else ""
            raise status_error(response, self._redact(text))
        if encoding != "identity":
            response.close()
            raise ReplyError(f"the reply is compressed ({encoding}), unasked")
        return response  # type: ignore[no-any-return]

    def _pieces(self, response: http.client.HTTPResponse,
                until: float | None) -> Iterator[bytes]:
        """The body as it arrives; raises as http.client does, or at the deadline."""
        while True:
            if until is not None:
                self._silence(until)
            piece = response.read1(65536)
            if not piece:
                break
            yield piece
        if response.length:  # which read1 lets pass
            raise http.client.IncompleteRead(b"", response.length)

    def _read_completion(self, response: http.client.HTTPResponse,
                         until: float | None) -> tuple[Completion, str | None]:
        """The whole reply, and the server's name for the request."""
        body, request_id = bytearray(), response.headers.get("x-request-id")
        with response:
            for piece in self._pieces(response, until):
                body += piece
                if len(body) > MAX_REPLY:
                    raise ReplyError(f"the reply is over {MAX_REPLY >> 20} MiB")
        text = body.decode("utf-8-sig", "replace")
        try:
            reply = Completion(read_object(text))
            if not reply.choices:
                raise ReplyError("the reply has no choices")
        except ReplyError as error:
            error.status_code, error.request_id = 200, request_id
            error.body = read_json(self._redact(text))
            raise
        return reply, request_id


class Stream:
    """A reply as it comes: iterate it for the text of choice 0, piece by piece.

    Raises ReplyError, or IncompleteReplyError where the reply stops before its end; an
    error stays one, however often the stream is asked.  `with` closes the connection.
    """

    def __init__(self, client: Client, response: Any, until: float | None,
                 several: bool) -> None:
        self._client, self._response, self._until = client, response, until
        self._joiner = Joiner(several)
        self._fresh = ""  # the text that the last chunk added
        self._broken: Exception | None = None  # what ended the body before its time
        self._error: ReplyError | None = None
        self._chunks = self._follow()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; nothing more is read."""
        self._chunks.close()
        self._response.close()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        for _ in self._chunks:
            if self._fresh:
                return self._fresh
        if self._error:
            raise self._error
        raise StopIteration

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk that is left, instead of the text."""
        for chunk in self._chunks:  # noqa: UP028  (it would close with this one)
            yield chunk
        if self._error:
            raise self._error

    def completion(self) -> Completion:
        """Read what is left; the whole reply, with what was read before."""
        for _ in self.chunks():
            pass
        if not self._joiner.ended:
            raise self._failure("the stream was closed here")
        return self._joiner.completion()

    def _pieces(self) -> Iterator[bytes]:
        """The body.  What breaks it is kept: it counts if the reply has not ended."""
        try:
            yield from self._client._pieces(self._response, self._until)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._broken = self._client._scrub(error)

    def _follow(self) -> Generator[Chunk, None, None]:
        """The one reader, behind every way to read a stream."""
        joiner, failure = self._joiner, None
        try:
            for event, data, whole in stream_events(self._pieces()):
                data = data.strip()
                if data == "[DONE]":
                    joiner.done = True
                    break
                if not data or data == "null" or data[0] == ":":
                    continue  # it keeps the connection alive
                if not (whole or event) and read_json(data) is data:
                    continue  # torn
                chunk = Chunk(read_object(data, event))
                self._fresh = joiner.add(chunk)
                yield chunk
                if joiner.closed:
                    if joiner.fields.get("usage"):
                        break  # nothing is missing: the server may fall silent now
                    self._response.reader.patience = self._client._grace
        except ReplyError as error:
            failure = error
        finally:
            self._response.close()
        if not joiner.ended:
            words = str(self._broken or "") or "the server closed the connection"
            self._error = failure or self._failure(words)
            self._error.partial = joiner.completion()
            raise self._client._scrub(self._error) from self._broken

    def _failure(self, words: str) -> ReplyError:
        if self._joiner.done:
            return ReplyError("the server ended the stream with no reply in it")
        error = IncompleteReplyError(f"the reply stopped before its end: {words}")
        error.partial = self._joiner.completion()
        return error


def chat(messages: Messages, **params: Any) -> Completion:
    """`Client().chat`: send the messages, and wait for the whole reply."""
    return Client().chat(messages, **params)


def stream(messages: Messages, **params: Any) -> Stream:
    """`Client().stream`: send the messages; the reply comes piece by piece."""
    return Client().stream(messages, **params)


def batch(requests: Iterable[Any], jobs: int = 8) -> Iterator[JSON]:
    """`Client().batch`: send many requests at once; a row for each, none lost."""
    return Client().batch(requests, jobs)


# ----------------------------------------------------------------------------- Batch


class Batch:
    """The requests of one batch, and what its workers share.

    A worker takes a slot and the next request, and answers it.  The slot is free again
    when the consumer, done with the row, comes for another: so requests in flight and
    rows not dealt with are at most `jobs`.
    """

    def __init__(self, client: Client, requests: Iterable[tuple[int, Any]], jobs: int,
                 defaults: JSON, seen: set[str] | None = None) -> None:
        import queue
        import threading

        BY_NAME["jobs"].check(jobs)
        client._headers()  # no token, no batch
        self._client, self._requests, self._jobs = client, iter(requests), jobs
        self._defaults = {"model": client.model, **defaults}
        self._rows: SimpleQueue[JSON | None] = queue.SimpleQueue()  # None: look again
        self._slots = threading.Semaphore(jobs)
        self._source = threading.Lock()  # held while the next request is made
        self._seen: set[str] = set() if seen is None else seen
        self._state = threading.Lock()  # never held for long; of the next four:
        self._over = False  # no more requests are taken
        self._flying = 0  # requests taken whose rows were not
        self._resume = 0.0  # on the clock: when the server wants to be asked again
        self._failure: BaseException | None = None
        self._halt = threading.Event()  # nobody waits for rows any more

    def rows(self) -> Iterator[JSON]:
        """The rows as they come; then raises what ended the batch early."""
        import threading

        for _ in range(self._jobs):
            threading.Thread(target=self._work, name="nemotron", daemon=True).start()
        try:
            while self._unfinished():
                row = self._rows.get()
                if row is not None:
                    with self._state:
                        self._flying -= 1
                    yield row
                    self._slots.release()
        finally:
            self._end()
            self._halt.set()
            for _ in range(self._jobs):  # who waits for a slot sees that it is over
                self._slots.release()
        if self._failure:
            raise self._failure

    def interrupt(self) -> None:
        """For a signal handler: the rows that are ready, and then KeyboardInterrupt."""
        self._failure = KeyboardInterrupt()  # no lock: it may be held where this cut in
        self._rows.put(None)

    def _unfinished(self) -> bool:
        if isinstance(self._failure, KeyboardInterrupt):
            return not self._rows.empty()
        with self._state:
            return self._flying > 0 or not self._over

    def _end(self, failure: BaseException | None = None) -> None:
        """Take no more requests."""
        with self._state:
            self._over, self._failure = True, self._failure or failure
        self._rows.put(None)

    def _work(self) -> None:
        while self._slots.acquire():
            taken = self._take()
            if not taken:
                break
            row = self._answer(*taken)
            if not self._halt.is_set():
                self._rows.put(row)

    def _take(self) -> tuple[str, Any] | None:
        """The next request, and its custom_id; None if there is none."""
        with self._source:
            if self._over:
                return None
            try:
                number, item = next(self._requests)
            except BaseException as error:
                self._end(None if isinstance(error, StopIteration) else error)
                return None
            name = custom_id(number, item)
            if name in self._seen:
                item = InvalidRequestError(f"custom_id {name:.80} was used before")
                item.code = "duplicate_custom_id"
            self._seen.add(name)
        with self._state:
            if self._over:
                return None
            self._flying += 1
            return name, item

    def _answer(self, name: str, item: Any) -> JSON:
        """The row of a request, whatever becomes of it."""
        status: int | None = 200
        error = None
        try:
            if isinstance(item, NemotronError):
                raise item
            request = read_request(item, self._defaults)
            self._wait(0.0)
            body, request_id = self._client._exchange(
                request, self._client._read_completion, self._wait, 6)
        except Exception as failure:  # whatever it is, the request gets its row
            if isinstance(failure, AuthenticationError):
                self._end(failure)
            if not isinstance(failure, NemotronError):
                failure = NemotronError(repr(failure))
            error = {"code": failure.code, "message": str(failure)}
            status, body = failure.status_code, failure.body
            request_id = failure.request_id
        response = {"status_code": status, "request_id": request_id, "body": body}
        return {"id": f"batch_req_{os.urandom(12).hex()}", "custom_id": name,
                "response": response if status else None, "error": error}

    def _wait(self, seconds: float, failure: NemotronError | None = None) -> None:
        """Wait before an attempt; a wait that the busy server named is everyone's."""
        until = self._client._clock() + seconds
        if isinstance(failure, RateLimitError) and failure.retry_after is not None:
            with self._state:
                self._resume = max(self._resume, until)
        while (left := max(until, self._resume) - self._client._clock()) > 0:
            self._halt.wait(left)
            if self._halt.is_set():
                raise NemotronError("the batch has ended")


# -------------------------------------------------------------------- Offline server


@contextlib.contextmanager
def offline(**settings: Any) -> Iterator[Client]:
    """A `Client` (with these settings) for a server in this process, on 127.0.0.1.

    The server answers every request, blocking or streamed, in the documented shapes,
    with the last user message, and usage, in words.  No token, no network, no model.
    """
    import http.server
    import socketserver
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = read_json(self.rfile.read(length).decode("utf-8", "replace"))
            streamed, joiner = step(body, "stream") is True, Joiner(True)
            self.send_response(200)
            self.send_header("Content-Type",
                             "text/event-stream" if streamed else "application/json")
            self.end_headers()
            for chunk in echo(body):
                joiner.add(chunk)
                if streamed:
                    self.wfile.write(b"data: " + to_json(chunk) + b"\n\n")
            self.wfile.write(
                b"data: [DONE]\n\n" if streamed else to_json(joiner.completion()))

        def log_message(self, *args: object) -> None:
            pass

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 1024

        def handle_error(self, *args: object) -> None:
            pass  # a client that goes away is no news

    with Server(("127.0.0.1", 0), Handler) as server:
        # It looks every 0.01 s whether it is to stop: that is how long leaving takes.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1/openai"
        try:
            yield Client(**{**settings, "token": "", "base_url": url})
        finally:
            server.shutdown()


def echo(body: Any) -> Iterator[Chunk]:
    """The last user message of a request as a stream, word by word."""
    messages = [Chunk(choices=[{"message": m}]) for m in step(body, "messages") or ()]
    said = [m.text for m in messages if m.first("message", "role") == "user"]
    words = re.findall(r"\s*\S+|\s+$", said[-1] if said else "")
    sent = sum(len(m.text.split()) for m in messages)
    usage = {"prompt_tokens": sent, "completion_tokens": len(words),
             "total_tokens": sent + len(words), "estimated_cost": 0.0}
    head = {"id": f"chatcmpl-{os.urandom(12).hex()}", "object": "chat.completion.chunk",
            "created": int(time.time()), "model": step(body, "model")}
    for index in range(step(body, "n") or 1):
        for piece in ("", *words, STOP_TOKEN):
            delta = {"role": "assistant", "content": piece}
            choice = {"index": index, "delta": delta, "finish_reason": None}
            yield Chunk(head, choices=[choice])
        choice = {"index": index, "delta": {}, "finish_reason": "stop"}
        yield Chunk(head, choices=[choice], usage=usage)


# ---------------------------------------------------------------------- Command line

EXITS = """exit status:
  0    a whole reply; every row of a batch whole
  1    the API or the network failed; a batch has error rows
  2    usage: a bad option, parameter, message or file; nothing was sent
  3    the reply is not whole: it stopped early, or at length or content_filter;
       a batch with such rows, or stopped by --max-cost
  4    the token is missing or refused (401, 402, 403)
  5    busy after all retries (429, 503): try later
  130  Ctrl-C
  141  the reader closed the pipe"""
STATUSES: dict[type[NemotronError], int] = {
    InvalidRequestError: 2, IncompleteReplyError: 3, AuthenticationError: 4,
    RateLimitError: 5, NemotronError: 1,
}


def write_stderr(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed
        sys.stderr.write(text)
        sys.stderr.flush()


def say(text: str) -> None:
    """One line on standard error, in its encoding."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    line = f"nemotron: {one_line(text)}".encode(encoding, "backslashreplace")
    write_stderr(line.decode(encoding)[: MAX_LINE - 1] + "\n")


def write_all(file: Any, raw: bytes) -> None:
    """Write all of it, also to a file without a buffer, which takes what it can."""
    while raw:
        written = file.write(raw)
        if written is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        raw = raw[written:]


class Page:
    """A reply on standard output: UTF-8 whatever the locale, each piece flushed.

    No white space in front, one newline at the end; on a terminal, control characters
    are shown and not obeyed.
    """

    def __init__(self) -> None:
        if sys.stdout is None:
            raise InvalidRequestError("standard output is closed")
        self.terminal = sys.stdout.isatty()
        self._file = getattr(sys.stdout, "buffer", None)
        self._held = ""  # what only the next piece can decide about
        self.begun = False

    def write(self, piece: str) -> None:
        text = self._held + piece if self.begun else piece.lstrip()
        shown = text.rstrip("\r\n")
        self._held = text[len(shown) :]
        if shown:
            self.begun = True
            self._put(visible(shown) if self.terminal else shown)

    def end(self) -> None:
        """The reply is over; if any of it was written, so is its last newline."""
        if self.begun:
            self._put(self._held.rstrip("\r\n") + "\n")
        self._held, self.begun = "", False

    def line(self, value: object) -> None:
        """A JSON value, alone on its line."""
        self.write(json.dumps(value))
        self.end()

    def _put(self, text: str) -> None:
        try:
            raw = text.encode()
        except UnicodeEncodeError:  # two halves make a character, one is replaced
            if "\ud800" <= text[-1] <= "\udbff":
                text, self._held = text[:-1], text[-1] + self._held
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            raw = text.encode()
        if self._file is None:  # a StringIO, say
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            write_all(self._file, raw)
            self._file.flush()


def is_terminal(file: Any) -> bool:
    return file is not None and file.isatty()


def wait_for_stdin() -> bool:
    """After two silent seconds, say that it is being waited for; whether it was."""
    try:
        silent = not select.select([sys.stdin], [], [], 2.0)[0]
    except (OSError, ValueError, TypeError):  # Windows: select is for sockets only
        return False
    if silent:
        say("waiting for standard input (-n leaves it alone)")
    return silent


def read_stdin() -> str:
    """All of standard input, without a BOM and the newlines at its end."""
    file = getattr(sys.stdin, "buffer", None)
    if file is None:  # closed, or a StringIO, say
        return sys.stdin.read().rstrip("\r\n") if sys.stdin else ""
    pieces, said = [b""], wait_for_stdin()
    try:
        while piece := file.read1(65536):
            pieces.append(piece)
            said = said or wait_for_stdin()
        return b"".join(pieces).decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"standard input is not UTF-8: {error}") from None
    except OSError as error:
        raise InvalidRequestError(f"standard input: {error.strerror}") from None


def stdin_lines() -> Iterator[bytes]:
    """The lines of standard input as they come."""
    wait_for_stdin()
    try:
        # Its own buffer: when Python ends a thread may still wait for a line here.
        file = open(sys.stdin.fileno(), "rb", closefd=False)
    except (OSError, AttributeError):
        yield from (line.encode() for line in sys.stdin or ())
    else:
        yield from file


# (group, flags, the value's name or "" for a switch, help); the sampling options are
# made of PARAMETERS.  A value that is called N, S, X or USD is a number.
OPTIONS = (
    ("request", "-s --system", "TEXT", "system message"),
    ("request", "-m --model", "ID", "model (or in NEMOTRON_MODEL)"),
    ("request", "-o --option", "KEY VALUE",
     "any other field of the body; VALUE is JSON, else a string"),
    ("request", "-c --conversation", "FILE",
     "continue the conversation in FILE, a JSON list of messages"),
    ("request", "-i --interactive", "", "a chat, one turn a line"),
    ("request", "-n --no-stdin", "", "leave standard input alone"),
    ("reply", "--no-stream", "", "wait for the whole reply"),
    ("reply", "--json", "", "print the server's JSON on one line"),
    ("reply", "-u --usage", "", "then tokens, cost and seconds on standard error"),
    ("reply", "--dry-run", "", "print the JSON body and send nothing"),
    *(("sampling", "--" + row.name.replace("_", "-"), "X" if row.range else "TEXT",
       f"{row.help}; {row.range}".strip("; ")) for row in PARAMETERS
      if row.name not in ("n", "tools", "response_format")),
    ("many requests", "--batch", "FILE", "send the lines of FILE (-: standard input)"),
    ("many requests", "--output", "FILE", "add the rows to FILE, the checkpoint"),
    ("many requests", "-j --jobs", "N", "requests at a time, 1 to 200 (8)"),
    ("many requests", "--max-cost", "USD", "send no more once replies cost so much"),
    ("connection", "--base-url", "URL", f"(or in DEEPINFRA_BASE_URL; {BASE_URL})"),
    ("connection", "--timeout", "S", "seconds of silence (600)"),
    ("connection", "--deadline", "S", "seconds for the whole call"),
    ("connection", "--retries", "N", "after what may pass (2, in a batch 6)"),
    ("connection", "--offline", "",
     "talk to a server in this process, which sends the prompt back"),
)


def parse_options(argv: list[str]) -> argparse.Namespace:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise InvalidRequestError(f"{message} (-h shows the options)")

    parser = Parser(
        prog="nemotron.py", usage="nemotron.py [options] [PROMPT ...]", epilog=EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        description="Send PROMPT, and standard input if it is a pipe or a file, to\n"
        f"{MODEL} or any OpenAI-compatible endpoint.\nThe token is in DEEPINFRA_TOKEN.")
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for group, rows in itertools.groupby(OPTIONS, operator.itemgetter(0)):
        add = parser.add_argument_group(group).add_argument
        for _, flags, value, text in rows:
            kwargs: JSON = {"action": "store_true"}
            if value:
                kwargs = {"metavar": value, "type": str}
                if value in ("N", "S", "X", "USD"):
                    kwargs["type"] = lambda text: text if text == "null" else (
                        read_json(text))
                elif value == "KEY VALUE":
                    kwargs = {"metavar": tuple(value.split()), "nargs": 2,
                              "action": "append", "default": []}
                elif flags == "--stop":
                    kwargs["action"] = "append"
            add(*flags.split(), help=text, **kwargs)
    parser.add_argument("--version", action="version", version=__version__)
    end = argv.index("--") if "--" in argv else len(argv)  # after it, all are words
    options = parser.parse_intermixed_args(argv[:end])
    options.words += argv[end + 1 :]
    try:
        " ".join([*options.words, options.system or ""]).encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("the prompt is not UTF-8") from None
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raise InvalidRequestError for options that do not go together."""
    single = ("words", "conversation", "interactive", "dry_run")
    for names, wrong, reason in (
        (single, options.batch is not None, "does not go with --batch"),
        (("output", "jobs", "max_cost"), options.batch is None, "needs --batch"),
        (("dry_run",), options.interactive, "does not go with -i"),
    ):
        for name in names if wrong else ():
            if getattr(options, name) not in (None, False, []):
                option = "PROMPT" if name == "words" else "--" + name.replace("_", "-")
                raise InvalidRequestError(f"{option} {reason}")


def read_params(options: argparse.Namespace) -> JSON:
    """The keywords of `build_request` that the options give."""
    params = {name: getattr(options, name, None) for name in DOCUMENTED}
    extra: JSON = {}
    for key, text in options.option:
        value = read_json(text)
        with contextlib.suppress(InvalidRequestError):
            to_json(value)  # which NaN is not
            text = value
        (params if key in params else extra)[key] = text
    return {**params, "extra": extra}


def read_prompt(words: list[str], no_stdin: bool) -> str:
    """The words, and standard input where the word "-" is, or after them."""
    if no_stdin:
        return " ".join(words)
    text = "" if "-" not in words and is_terminal(sys.stdin) else read_stdin()
    at = words.index("-") if "-" in words else len(words)
    parts = (" ".join(words[:at]), text, " ".join(words[at + 1 :]))
    return "\n\n".join(filter(None, parts))


class Conversation:
    """Messages, and the file where they are kept, if there is one."""

    def __init__(self, name: str | None, system: str | None) -> None:
        self._path = "" if name is None else os.path.realpath(name)
        self.messages: list[JSON] = []
        if self._path:
            try:
                self._load()
            except FileNotFoundError:
                pass
            except (OSError, ValueError, RecursionError) as error:
                words = getattr(error, "strerror", None) or error
                raise InvalidRequestError(f"{name}: {words}") from None
        if system is not None:
            others = [m for m in self.messages if m["role"] != "system"]
            self.messages = [{"role": "system", "content": system}, *others]

    def _load(self) -> None:
        if not os.access(os.path.dirname(self._path), os.W_OK):
            raise InvalidRequestError("its folder cannot be written to")
        with open(self._path, encoding="utf-8-sig") as file:
            messages = json.load(file)
        if not isinstance(messages, list):
            raise InvalidRequestError("not a list of messages")
        self.messages = check_messages(messages)

    def with_prompt(self, prompt: str) -> list[JSON]:
        return [*self.messages, {"role": "user", "content": prompt}]

    def keep(self, messages: list[JSON]) -> None:
        """Go on from these.  The file is the old one or the new one, never a part."""
        if self._path:
            try:
                self._replace(messages)
            except OSError as error:
                raise NemotronError(f"{self._path}: {error.strerror}") from error
        self.messages = messages

    def _replace(self, messages: list[JSON]) -> None:
        import shutil
        import tempfile

        folder = os.path.dirname(self._path)
        handle, temporary = tempfile.mkstemp(prefix=".nemotron.", dir=folder)
        try:
            with open(handle, "w", encoding="ascii") as file:
                json.dump(messages, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(self._path, temporary)
            os.replace(temporary, self._path)
        except BaseException:
            os.unlink(temporary)
            raise


def dollars(cost: float | None) -> str:
    return "cost unknown" if cost is None else f"${cost:.8f}".rstrip("0").rstrip(".")


def ask(client: Client, options: argparse.Namespace, messages: list[JSON],
        params: JSON) -> Completion:
    """Send the messages, print the reply as it comes, and say what is to say of it."""
    page, began = Page(), time.monotonic()
    try:
        if options.json or options.no_stream:
            reply = client.chat(messages, **params)
            page.write(json.dumps(reply) if options.json else reply.text)
        else:
            with client.stream(messages, **params) as pieces:
                for piece in pieces:
                    page.write(piece)
                reply = pieces.completion()
        page.begun = True  # an empty reply is an empty line
    except KeyboardInterrupt:
        page.begun |= page.terminal  # ^C is there already
        raise
    finally:
        page.end()
    if reply.cut:
        say(f"the reply is not whole: it stopped at {reply.cut}"
            + (" (see --max-tokens)" if reply.cut == "length" else ""))
    if reply.tool_calls and not options.json:
        say("the reply calls tools: --json shows how")
    if options.usage:
        usage, model = reply.usage, reply.get("model")
        tokens = (str(usage.get(f"{x}_tokens", "?")) for x in ("prompt", "completion"))
        other = f", model {model}" if model not in (None, params["model"]) else ""
        say(f"{' + '.join(tokens)} tokens, {dollars(reply.cost)}, "
            f"{time.monotonic() - began:.1f} s{other}")
    return reply


def read_turns(words: list[str], no_stdin: bool) -> Iterator[str]:
    """What is said in a chat, turn by turn: the words, then standard input by lines."""
    if words:
        yield " ".join(words)
    if no_stdin:
        return
    if not is_terminal(sys.stdin):
        for line in stdin_lines():
            yield line.decode("utf-8-sig", "replace")
        return
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    edited = is_terminal(sys.stdout) and is_terminal(sys.stderr)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines, and knows the last)
    while True:
        try:
            if edited:
                yield input("> ")
                continue
            write_stderr("> ")
            text = sys.stdin.readline()
            if not text:
                raise EOFError
            yield text
        except KeyboardInterrupt:
            write_stderr("\n")
        except EOFError:
            write_stderr("\n")
            return


def converse(client: Client, options: argparse.Namespace, conversation: Conversation,
             params: JSON) -> int:
    """A chat: a turn that fails is dropped, and the chat goes on."""
    client._headers()  # without a token, or without an output, no turn could go well
    Page()
    for line in map(str.strip, read_turns(options.words, options.no_stdin)):
        messages = conversation.with_prompt(line)
        try:
            if line:
                reply = ask(client, options, messages, params)
                conversation.keep([*messages, reply.message])
        except KeyboardInterrupt:
            say("stopped; this turn is dropped")
        except NemotronError as error:
            say(str(error))
    return 0


class Rows:
    """The file of a batch's rows, which is its checkpoint.

    `answered`: the custom_id of each request with its reply, and whether it is whole.
    """

    FIELDS = frozenset(("custom_id", "response", "error"))
    START = b'{"id": "batch_req_'  # by which a torn row is known

    def __init__(self, path: str) -> None:
        self._path = path
        self.answered: dict[str, bool] = {}
        if os.path.exists(path) and not os.path.isfile(path):
            raise InvalidRequestError(f"{path}: not a regular file")
        try:
            self._file = open(path, "a+b", buffering=0)
            self._lock()
            with open(path, "rb") as lines:
                self._load(lines)
        except BlockingIOError:
            raise InvalidRequestError(f"{path}: another run is writing to it") from None
        except OSError as error:
            raise InvalidRequestError(f"{path}: {error.strerror}") from None

    def _lock(self) -> None:
        """Raise BlockingIOError if another process has it."""
        if sys.platform == "win32":
            import msvcrt

            self._file.seek(1 << 40)  # a byte that nobody reads
            try:
                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError as error:
                raise BlockingIOError from error
        else:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _load(self, lines: Iterable[bytes]) -> None:
        end = 0
        for number, line in enumerate(lines, 1):
            row = read_json(line.decode("utf-8", "replace"))
            whole = line.endswith(b"\n")
            torn = isinstance(row, str) and (
                line.startswith(self.START) or self.START.startswith(line))
            if isinstance(row, dict) and self.FIELDS <= row.keys():
                if row["error"] is None:
                    reply = Completion(step(row, "response", "body") or {})
                    self.answered[str(row["custom_id"])] = not reply.cut
                if not whole:  # all of it but its end was written
                    write_all(self._file, b"\n")
                    break
            elif whole or not torn:
                raise InvalidRequestError(f"{self._path}: line {number} is no row")
            else:
                self._file.truncate(end)
            end += len(line)

    def add(self, value: object) -> None:
        try:
            write_all(self._file, json.dumps(value).encode("ascii") + b"\n")
        except OSError as error:
            raise NemotronError(f"{self._path}: {error.strerror}") from error


class Tally:
    """How far a batch has come; on a terminal it is shown all the while."""

    def __init__(self, total: int, live: bool) -> None:
        self._total, self._live = total, live
        self._began, self._shown = time.monotonic(), 0.0
        self.sent = self.failed = self.cut = self.before = self.unpriced = 0
        self.cost = 0.0
        self.stopped = False  # by --max-cost

    def add(self, row: JSON) -> None:
        self.sent += 1
        if row["error"]:
            self.failed += 1
        else:
            reply = Completion(row["response"]["body"])
            self.cut += bool(reply.cut)
            self.unpriced += reply.cost is None
            self.cost += reply.cost or 0.0
        if self._live and time.monotonic() > self._shown + 0.1:
            self._shown = time.monotonic()
            self._draw(str(self))

    def __str__(self) -> str:
        done, seconds = self.sent + self.before, time.monotonic() - self._began
        rate = self.sent / max(seconds, 1e-3)
        left = (self._total - done) / rate if rate else 0
        parts = (
            f"{done} of {self._total} done" if self._total else f"{done} done",
            f"{self.before} of them before" if self.before else "",
            f"{self.failed} failed",
            f"{self.cut} cut short" if self.cut else "",
            f"{rate:.1f}/s, {dollars(self.cost)}",
            f"{self.unpriced} replies without a cost" if self.unpriced else "",
            f"{seconds:.1f} s",
            f"{left:.0f} s left" if left > 0 else "",
            "stopped by --max-cost" if self.stopped else "",
        )
        return ", ".join(filter(None, parts))

    def _draw(self, text: str) -> None:
        """Over the same line; what is said next goes over it."""
        import shutil

        width = (shutil.get_terminal_size().columns or 80) - 1
        write_stderr("\r" + text[:width].ljust(width) + "\r")

    def finish(self) -> None:
        if self._live:
            self._draw("")
        say(str(self))

    def status(self) -> int:
        return 1 if self.failed else 3 if self.cut or self.stopped else 0


def unanswered(lines: Iterable[bytes], answered: dict[str, bool], seen: set[str],
               tally: Tally, max_cost: float | None) -> Iterator[tuple[int, Any]]:
    """(number, request) of each line that has no row yet, while there is money left."""
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            request = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            request = InvalidRequestError(f"line {number} is not JSON: {error}")
        name = custom_id(number, request)
        whole = answered.get(name)
        if whole is not None and name not in seen:
            seen.add(name)
            tally.before += 1
            tally.cut += not whole
        elif max_cost is not None and tally.cost >= max_cost:
            tally.stopped = True
            return
        else:
            yield number, request


def run_batch(client: Client, options: argparse.Namespace, params: JSON) -> int:
    """Send the requests of a file; the rows go to a file, or to standard output."""
    build_request("", **params, system=options.system)  # the defaults are sound
    jobs = 8 if options.jobs is None else options.jobs
    given({"jobs": jobs, "max_cost": options.max_cost})
    client._headers()
    total, live = 0, is_terminal(sys.stderr)
    with contextlib.ExitStack() as stack:
        if options.batch == "-":
            lines: Iterable[bytes] = stdin_lines()
        else:
            try:
                lines = file = stack.enter_context(open(options.batch, "rb"))
                if live and file.seekable():
                    total = sum(1 for line in file if line.strip())
                    file.seek(0)
            except OSError as error:
                words = f"{options.batch}: {error.strerror}"
                raise InvalidRequestError(words) from None
        answered: dict[str, bool] = {}
        if options.output is None:
            write = Page().line
        else:
            rows = Rows(options.output)
            write, answered = rows.add, rows.answered
        tally = Tally(total, live)
        seen: set[str] = set()
        requests = unanswered(lines, answered, seen, tally, options.max_cost)
        defaults = {**params, "system": options.system}
        batch = Batch(client, requests, jobs, defaults, seen)
        stack.callback(tally.finish)
        stack.enter_context(on_interrupt(batch.interrupt))
        for row in batch.rows():
            write(row)
            tally.add(row)
        return tally.status()


@contextlib.contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Act at the first Ctrl-C; the second one is as ever."""
    import signal
    import threading

    def handle(*args: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        act()

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, handle) if main_thread else None
    try:
        yield
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)


def run(options: argparse.Namespace) -> int:
    check_options(options)
    params = read_params(options)
    names = ("model", "base_url", "timeout", "deadline", "retries")
    settings = {name: getattr(options, name) for name in names}
    context: contextlib.AbstractContextManager[Client] = (
        offline(**settings) if options.offline
        else contextlib.nullcontext(Client(**settings)))
    with context as client:
        params["model"] = client.model
        if options.batch is not None:
            return run_batch(client, options, params)
        conversation = Conversation(options.conversation, options.system)
        streamed = not (options.json or options.no_stream)
        build_request(conversation.with_prompt(""), **params)
        if params["n"] not in (None, 1) and not (options.json or options.dry_run):
            raise InvalidRequestError("n over 1 needs --json or --batch")
        if options.interactive:
            return converse(client, options, conversation, params)
        if not options.words and is_terminal(sys.stdin):
            raise InvalidRequestError("no prompt: nemotron.py [options] [PROMPT ...] "
                                      "(-h shows the options)")
        prompt = read_prompt(options.words, options.no_stdin)
        if not prompt:
            raise InvalidRequestError("no prompt (-h shows the options)")
        messages = conversation.with_prompt(prompt)
        if options.dry_run:
            body = build_request(messages, stream=streamed, **params)
            Page().line(json.loads(to_json(body)))
            return 0
        reply = ask(client, options, messages, params)
        conversation.keep([*messages, reply.message])
        return 3 if reply.cut else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status.  `argv` is without the program's name."""
    try:
        try:
            return run(parse_options(sys.argv[1:] if argv is None else argv))
        except SystemExit as end:  # of -h and --version
            sys.stdout.flush()
            return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except NemotronError as error:
        say(str(error))
        return next(STATUSES[kind] for kind in STATUSES if isinstance(error, kind))
    except OSError as error:  # of standard output: all others are dealt with
        with contextlib.suppress(OSError, ValueError):  # or exiting would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        say(f"standard output: {error.strerror}")
        return 1


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    os._exit(status)  # tearing Python down would add a tenth to the time of a call
